"""How a transformers decoder is asked for the losses of tokens: packed conversations kept apart, no needless logits.

Letters: B rows, L tokens of a row, D width, V words of the vocabulary.
"""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from weft.contracts import UNLEARNED
from weft.errors import ConfigError, ModelError
from weft.families.kernels import Kernels
from weft.families.lean_text import lean_layers
from weft.families.liger import liger
from weft.families.text_attention import cuts, set_attention
from weft.families.text_kernels import apply_kernels
from weft.families.text_packed import PACKED, Packing, seen, told
from weft.math.cross_entropy import Head, Kernel, Logits, head_losses, losses_through, softmax_losses
from weft.math.packed_attention import Lengths
from weft.math.traced import COMPILED

KINDS = ("full_attention", "sliding_attention", "chunked_attention")  # of layers, that keep nothing but keys and values
GRID = (-300.0, -40.0, -3.0, -0.5, 0.0, 0.1, 1.0, 7.0, 90.0)  # of a head's output, to know what becomes of it
HUGE = 1e6
WIDTH = 8  # of the hidden states in a shell
ASKED = torch.tensor([[0, 1, 2, 0, 1]], device="cpu")  # positions of two conversations


@dataclass(frozen=True)
class Asking:
    """How a network is asked. base: path of the decoder without its head. logits: what becomes of the head's output;
    None: unknown, and the model computes its own logits, all of them. flash: attention is told where rows are cut."""

    base: str
    head: str
    words: int
    logits: Logits | None
    kernel: Kernel
    flash: bool


def prepared(network: PreTrainedModel, kernels: Kernels) -> PreTrainedModel:
    """The network, frozen, on its kernels; called with ids, positions and labels it answers with losses (B, L), and
    called in transformers' own words as before. Raises ConfigError and ModelError."""
    network.requires_grad_(False).eval()
    causal = check_apart(network)
    set_attention(network, kernels.attention, packed=causal)
    apply_kernels(network, kernels.rms_norm, kernels.mlp, kernels.rotary)
    lean_layers(network, blocks_of(network), kernels.layer, {kernels.rms_norm, kernels.mlp, kernels.rotary})
    kernel = liger("cross_entropy").losses if kernels.cross_entropy == "liger" else softmax_losses
    logits = None if kernels.cross_entropy == "eager" else logits_of(network)
    if logits is None and kernels.cross_entropy not in ("auto", "eager"):
        raise ConfigError(
            f"family.kernels.cross_entropy: {type(network).__name__} makes its logits in a way that Weft does not know "
            f"and '{kernels.cross_entropy}' would not follow. Write auto or eager."
        )
    words = network.get_submodule(head_path(network)).get_parameter("weight").shape[0]
    asking = Asking(network.base_model_prefix, head_path(network), words, logits, kernel, kernels.attention == "flash")
    own = type(network).forward

    @functools.wraps(own)  # generate() looks at the signature
    def forward(self: Any, *args: Any, ids: Tensor | None = None, **kwargs: Any) -> Any:
        if ids is None:
            return own(self, *args, **kwargs)
        return token_losses(self, asking, ids, **kwargs)

    network.forward = MethodType(forward, network)  # type: ignore[method-assign]
    return network


# ---- What the network is ------------------------------------------------------------------------------------------


def check_apart(network: PreTrainedModel) -> bool:
    """Refuse a network that cannot keep packed conversations apart: one whose layers carry a state along the row, or
    whose attention is not told of positions. Whether each token sees all before it, or a window of them, and no less.
    """
    name = type(network).__name__
    foreign = sorted(set(network.config.to_dict().get("layer_types") or ()) - set(KINDS))
    if foreign or network._is_stateful:
        raise ModelError(
            f"family.source: {name} has layers that carry a state along the row ({', '.join(foreign) or 'stateful'}). "
            "Weft packs conversations into rows, and these layers would read across. Choose a model of attention alone."
        )
    takes = inspect.signature(type(network.base_model).forward).parameters
    masks = noted_masks(network)
    if "position_ids" not in takes or not network._supports_attention_backend or not keep_apart(masks):
        raise ModelError(
            f"family.source: {name} does not mask attention by the positions of tokens, by which packed conversations "
            "are kept apart. Choose a model that does, such as Qwen3, Llama, Mistral or Gemma."
        )
    window = network.config.to_dict().get("sliding_window")
    known = [seen(ASKED), *([seen(ASKED, window)] if window else [])]
    chunked = "chunked_attention" in (network.config.to_dict().get("layer_types") or ())
    return not chunked and all(any(torch.equal(mask, form) for form in known) for mask in masks)


def noted_masks(network: PreTrainedModel) -> list[Tensor]:
    """Who sees whom in packed conversations of 3 and 2 tokens, found by asking a shell of the decoder: its layers note
    the masks that they are given."""
    layers = blocks_of(network)
    owner = next(m for m in network.modules() if any(_holds(child, layers) for child in m._modules.values()))
    noted: list[Tensor] = []
    shell = copy.copy(owner)
    shell._modules = {
        name: nn.ModuleList(_Stub(noted) for _ in layers) if _holds(child, layers) else _Stub(noted, _turns(child))
        for name, child in owner._modules.items()
    }
    network.config._attn_implementation = "eager"  # whose masks are plain numbers
    try:
        with torch.no_grad():
            type(owner).forward(shell, input_ids=ASKED, position_ids=ASKED, use_cache=False)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        pass  # after its layers a stub may not do; what they noted counts
    return noted


def keep_apart(masks: Sequence[Tensor]) -> bool:
    """Whether none of those masks lets a token see another conversation, or itself not."""
    allowed = seen(ASKED)
    return bool(masks) and all(not (mask & ~allowed).any() and mask.diagonal(0, -2, -1).all() for mask in masks)


def _holds(module: nn.Module | None, layers: Sequence[nn.Module]) -> bool:
    return isinstance(module, nn.ModuleList) and list(module) == layers


def _turns(module: nn.Module | None) -> bool:
    return "Rotary" in type(module).__name__


class _Stub(nn.Module):
    """In the place of a decoder's parts: notes masks (B, 1, L, L) as who is seen, and answers with zeros of some width
    to ids, with two tables of them to a rotary embedding's question, else with what it was given."""

    def __init__(self, noted: list[Tensor], turns: bool = False) -> None:
        super().__init__()
        self.noted, self.turns = noted, turns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.noted += [
            m if m.dtype == torch.bool else m == 0 for m in given if m.dim() == 4 and m.shape[2] == m.shape[3]
        ]
        if self.turns:
            return torch.zeros(2, given[0].shape[1], WIDTH, device="cpu")
        return given[0] if given[0].is_floating_point() else torch.zeros(*given[0].shape, WIDTH, device="cpu")


def head_path(network: PreTrainedModel) -> str:
    """Path of the layer that gives logits. Raises ModelError."""
    head = network.get_output_embeddings()
    found = next((path for path, module in network.named_modules() if module is head), None)
    if head is None or found is None:
        raise ModelError(f"family.source: {type(network).__name__} has no head that predicts words.")
    return found


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """The decoder's layers: the list that is as long as the config says. Raises ModelError."""
    assert isinstance(network, PreTrainedModel)
    depth = network.config.num_hidden_layers
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    found = next((listed for listed in lists if len(listed) == depth), lists[0] if lists else None)
    if found is None:
        raise ModelError(f"family.source: {type(network).__name__} has no list of layers.")
    return list(found)


def logits_of(network: PreTrainedModel) -> Logits | None:
    """What the model makes of its head's output, found by asking a shell of it whose layers hand on known numbers; None
    for anything but a scale and a soft cap."""
    numbers = torch.tensor([HUGE, 1e-3, *GRID], device="cpu", dtype=torch.float32)
    shell = copy.copy(network)
    shell._modules = dict(network._modules)
    shell._modules[network.base_model_prefix] = _Given(numbers[None, :, None])
    path = head_path(network)
    if "." in path or path == network.base_model_prefix:
        return None
    shell._modules[path] = nn.Identity()
    ids = torch.zeros(1, len(numbers), dtype=torch.long, device="cpu")
    try:
        with torch.no_grad():
            out = type(network).forward(shell, input_ids=ids)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # it needs more of its decoder than that
        return None
    found = out.logits.float()[0, :, 0]
    top, scale = float(found[0]), float(found[1]) / 1e-3
    logits = Logits(_rounded(scale), _rounded(top) if top < 0.5 * scale * HUGE else None)
    return logits if torch.allclose(logits.of(numbers), found, rtol=1e-4, atol=1e-4) else None


def _rounded(number: float) -> float:
    """Six digits: what a config says, without the rounding of the question."""
    return float(f"{number:.6g}")


class _Given(nn.Module):
    """In the place of a decoder: hidden states (1, L, 1) that are known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:  # of all decoders' answers the widest
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)  # type: ignore[arg-type]


# ---- Losses -------------------------------------------------------------------------------------------------------


def token_losses(
    network: nn.Module, asking: Asking, ids: Tensor, positions: Tensor, labels: Tensor, learned: Tensor | None = None,
    texts: Lengths | None = None,
) -> Tensor:  # fmt: skip
    """-log p of labels (B, L), fp32, 0 where nothing is learned. positions: a 0 begins a conversation. learned, texts:
    see Tokens."""
    # With a cache transformers would not look where positions begin anew, and conversations would see each other.
    asked: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    asked |= apart(network, asking, positions, texts)
    if asking.logits is None:
        logits = type(network).forward(network, **asked).logits
        flat = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=UNLEARNED
        )
        return flat.view_as(labels)
    hidden = network.get_submodule(asking.base)(**asked).last_hidden_state  # (B, L, D)
    return learned_losses(hidden, labels, network.get_submodule(asking.head), asking, learned)


def apart(network: Any, asking: Asking, positions: Tensor, texts: Lengths | None) -> dict[str, Any]:
    """How attention is told where conversations begin; nothing, where transformers looks for itself."""
    if asking.flash:
        return cuts(positions, texts)
    if texts is None or network.config._attn_implementation != PACKED:
        return {}
    if not hasattr(blocks_of(network)[0], COMPILED):
        return told(Packing(texts, positions))
    # A graph must not know lengths, which change with every batch: it takes a mask.
    windowed = "sliding_attention" in (network.config.to_dict().get("layer_types") or ())
    return {} if windowed else {"attention_mask": seen(positions)}


def learned_losses(
    hidden: Tensor, labels: Tensor, head: nn.Module, asking: Asking, learned: Tensor | None = None
) -> Tensor:
    """Losses (B, L) of hidden states (B, L, D): the head is asked about learned tokens alone."""
    assert asking.logits is not None
    flat = labels.flatten()
    places = learned_places(flat) if learned is None else learned
    x, wanted = hidden.flatten(0, 1)[places], flat[places]
    if is_frozen(head):
        assert isinstance(head, nn.Linear)
        found = head_losses(x, wanted, Head(head.weight, head.bias, asking.logits, asking.kernel))
    else:
        found = losses_through(head, x, wanted, asking.logits, asking.words)
    return torch.zeros_like(flat, dtype=torch.float32).index_copy(0, places, found).view_as(labels)


def learned_places(labels: Tensor) -> Tensor:
    """Numbers of the places (B L,) that are learned, for which the host waits; of fake tensors, which an estimate is
    made with, all of them."""
    if isinstance(labels, FakeTensor):
        return torch.arange(len(labels), device=labels.device)
    return (labels != UNLEARNED).nonzero().squeeze(1)


def is_frozen(head: nn.Module) -> bool:
    """Whether a head is a linear layer that nothing is learned in and no adapter stands on."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._modules
    return isinstance(head, nn.Linear) and not hooked and not head.weight.requires_grad
