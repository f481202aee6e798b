"""How a decoder's attention is computed, and how it is told where packed conversations begin."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flex_attention_mask

from weft.errors import ConfigError
from weft.families.text_packed import register_packed
from weft.math.packed_attention import Lengths
from weft.math.sdpa_policy import HOPPER
from weft.math.sending import sent

FLEX = "weft_flex"
TRANSFORMERS_NAMES = {"flash": "flash_attention_2", "flex": FLEX}
LATER_FLASH = "flash_attn_interface"  # of the third version, which Hopper wants

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # item, head, query, key -> whether it is seen


def set_attention(network: PreTrainedModel, choice: str, *, packed: bool = False) -> None:
    """Choose how attention is computed. packed: whether sdpa may attend to packed texts one by one. Raises ConfigError
    for what the model or this machine has not."""
    config = network.config
    softcap = config.to_dict().get("attn_logit_softcapping")
    if choice == "auto":
        choice = "sdpa" if network._supports_sdpa and softcap is None else "eager"
    place = f"family.kernels.attention: '{choice}'"
    can = {"sdpa": network._supports_sdpa, "flex": network._supports_flex_attn, "flash": network._supports_flash_attn}
    if not can.get(choice, True):
        others = [name for name, able in can.items() if able]
        raise ConfigError(
            f"{place} is nothing that {type(network).__name__} can. Write {', '.join([*others, 'eager'])}."
        )
    if choice == "sdpa" and softcap is not None:
        raise ConfigError(f"{place} cannot cap the logits of attention, as this model does. Write eager, flex or auto.")
    if choice == "flash":
        check_flash(place)
    if choice == "flex":
        AttentionInterface.register(FLEX, flex)
        AttentionMaskInterface.register(FLEX, flex_mask)
    if choice == "sdpa" and packed:
        choice = register_packed()
    later = choice == "flash" and has_later_flash()
    config._attn_implementation = "flash_attention_3" if later else TRANSFORMERS_NAMES.get(choice, choice)


def has_later_flash() -> bool:
    """Whether this is a Hopper and flash-attn 3 is installed. The second version runs there too, at about 0.6 of the
    speed, and is not refused: torch has no other kernel that keeps packed conversations apart without a mask, and of a
    language model's step attention to short conversations is a small part."""
    if not torch.cuda.is_available() or torch.version.hip is not None or find_spec(LATER_FLASH) is None:
        return False
    return torch.cuda.get_device_capability()[0] == HOPPER


def check_flash(place: str) -> None:
    """Raises ConfigError where flash-attn cannot run."""
    if find_spec("flash_attn") is None and not has_later_flash():
        raise ConfigError(
            f"{place} needs the package flash-attn, which is not installed. Install it with pip install 'weft[flash]', "
            "or write family.kernels.attention=auto."
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"{place} runs on a GPU, and torch sees none. Write family.kernels.attention=auto.")


@functools.cache
def _flex(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def flex_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: MaskFunction, device: torch.device | str = "cpu",
    q_offset: Any = 0, kv_offset: int = 0, attention_mask: Tensor | None = None, **options: Any,
) -> BlockMask:  # fmt: skip
    """Who sees whom, by blocks. Made once for all layers of a kind."""
    if torch.device(device).type != "cpu" or attention_mask is not None or kv_length != q_length:
        return flex_attention_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, **options
        )
    # transformers compiles the making: on a CPU that costs more than all that it saves.
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device)


def flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    softcap: float | None = None, dropout: float = 0.0, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """torch's flex_attention as transformers calls attentions: q (B, heads, L, d) -> (B, L, heads, d). On a CPU it is
    not compiled: slow, and without a backward pass."""
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise ConfigError("family.kernels.attention: 'flex' has no backward pass on a CPU. Write sdpa or auto.")
    if dropout or s_aux is not None:
        raise ConfigError("family.kernels.attention: 'flex' knows no attention dropout and no sinks. Write eager.")

    def capped(score: Tensor, *places: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out = _flex(query.device.type != "cpu")(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=attention_mask, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def cuts(positions: Tensor, texts: Lengths | None = None) -> dict[str, Any]:
    """Where conversations begin in all rows laid end to end, as varlen kernels are told. texts: their lengths, where
    the host knows them; else it waits for the device."""
    flat = positions.flatten()
    if texts is None:
        starts = (flat == 0).nonzero().squeeze(1).to(torch.int32)
        ends = torch.cat([starts, starts.new_tensor([len(flat)])])
        longest = int(ends.diff().max())
    else:
        lengths = [length for row in texts for length in row]
        ends = sent(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), flat.device)
        longest = max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
