"""Video transformers that answer for a group of ranks, each with a part of the tokens, wired from outside.

Tokens are split before block 0 and gathered behind the last projection. In between everything works on single tokens
but attention, whose exchange is put under diffusers' own processors. Letters: N video tokens, n of them on this rank.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from weft.errors import ConfigError
from weft.families.lean_hunyuan import part as part_hunyuan
from weft.families.lean_wan import is_lean, part
from weft.math.attention import Attention, rows_of, seen_by
from weft.models import SequenceGroup

DISPATCH = dispatch_attention_fn.__name__


def divide_wan(network: nn.Module, sequence: SequenceGroup) -> None:
    """Split what block 0 is given and the times of single tokens, gather velocities. Once adapters are attached."""
    assert isinstance(network, WanTransformer3DModel)
    _split_and_gather(network.blocks[0], 1, network.proj_out, sequence)
    if is_lean(network):
        part(network, sequence)
        return
    for block in network.blocks:
        attention: Any = block.attn1
        attention.set_processor(_taking_over(_WanExchange(sequence), attention.processor))

    def own_times(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        length = kwargs["timestep_seq_len"]
        if length is None:
            return None
        by_token = sequence.split(args[0].unflatten(0, (-1, length)), 1)  # (B, n)
        return (by_token.flatten(), *args[1:]), {**kwargs, "timestep_seq_len": by_token.shape[1]}

    network.condition_embedder.register_forward_pre_hook(own_times, with_kwargs=True)


def divide_hunyuan(network: nn.Module, sequence: SequenceGroup) -> None:
    """Split the video and the text that block 0 is given, gather velocities. Once adapters are attached."""
    assert isinstance(network, HunyuanVideoTransformer3DModel)
    if is_lean(network):
        part_hunyuan(network, sequence)
        return
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    for block in blocks:
        attention: Any = block.attn
        attention.set_processor(_taking_over(_HunyuanExchange(sequence), attention.processor))
    _split_and_gather(blocks[0], 2, network.proj_out, sequence)


def _split_and_gather(first: nn.Module, streams: int, last: nn.Module, sequence: SequenceGroup) -> None:
    """Split the first arguments of block 0, as many as there are streams of tokens (B, N, D); gather what the last
    layer gives to the length of the first."""
    whole: list[int] = [0]  # of the forward pass that is under way

    def split(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        whole[0] = args[0].shape[1]
        return (*(sequence.split(x, 1) for x in args[:streams]), *args[streams:])

    def gather(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return sequence.gather(output, 1, whole[0])

    first.register_forward_pre_hook(split)
    last.register_forward_hook(gather)


class _WanExchange(WanAttnProcessor):
    """Self-attention of own tokens (B, n, D) over all. It is given the rotary tables (1, N, 1, D) of all tokens."""

    def __init__(self, sequence: SequenceGroup) -> None:
        super().__init__()
        self.sequence = sequence

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        assert rotary_emb is not None and encoder_hidden_states is None and attention_mask is None
        dispatch = _exchanging(self.sequence, (rotary_emb[0].shape[1],))
        own = tuple(self.sequence.split(table, 1) for table in rotary_emb)
        return _with_dispatch(WanAttnProcessor.__call__, dispatch)(self, attn, hidden_states, rotary_emb=own)


class _HunyuanExchange(HunyuanVideoAttnProcessor2_0):
    """Joint attention of own video and own text over all. It is given the mask (B, 1, 1, N + L) and the rotary tables
    (N, D) of all tokens."""

    def __init__(self, sequence: SequenceGroup) -> None:
        super().__init__()
        self.sequence = sequence

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        assert image_rotary_emb is not None and attention_mask is not None
        video = len(image_rotary_emb[0])
        dispatch = _exchanging(self.sequence, (video, attention_mask.shape[-1] - video))
        own = tuple(self.sequence.split(table, 0) for table in image_rotary_emb)
        run = _with_dispatch(HunyuanVideoAttnProcessor2_0.__call__, dispatch)
        return run(self, attn, hidden_states, encoder_hidden_states, attention_mask, own)


def _exchanging(sequence: SequenceGroup, lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    """dispatch_attention_fn for own tokens, as parts of segments of these lengths: whichever backend is chosen gets
    whole sequences."""

    def dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
            mask = None if attn_mask is None else rows_of(attn_mask, rows)
            return dispatch_attention_fn(q, k, v, attn_mask=mask, **options)

        seen = None if attn_mask is None else seen_by(attn_mask)
        return sequence.attend(Attention(kernel, seen), query, key, value, lengths)

    return dispatch


def _with_dispatch(call: Callable[..., Any], dispatch: Callable[..., Tensor]) -> Callable[..., Any]:
    """A processor's own code, that finds another function under the name dispatch_attention_fn. diffusers has no seam
    there: its backends are a closed list, and its own context parallelism knows no padding."""
    assert isinstance(call, FunctionType)
    if DISPATCH not in call.__code__.co_names:
        raise ConfigError(
            f"parallel.sequence: the installed diffusers attends in another way than through {DISPATCH}, and Weft does "
            "not know how to part its tokens. Write sequence=1, or install diffusers 0.42."
        )
    return FunctionType(call.__code__, {**call.__globals__, DISPATCH: dispatch}, call.__name__, call.__defaults__)


def _taking_over(new: Any, old: Any) -> Any:
    """A processor with another's choice of backend."""
    new.__dict__.update(old.__dict__)
    return new
