"""Wan's transformer computed by Weft on diffusers' own modules: the same numbers, with less kept and less moved.

A block keeps 9 tensors of its tokens' width and one of its ffn's for the backward pass; each time that there is is
embedded once, and modulates rows of tokens. Letters: B items, N video tokens, d width, L text tokens, D width of a
head, U rows of modulation (see math/norms.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import gcd, sqrt
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from weft.math.attention import Attention
from weft.math.by_tokens import Given, by_tokens, can_be_parted
from weft.math.normed_attention import Heads, Source, cross_attention, self_attention
from weft.math.norms import GELU, Modulated, gated, modulated
from weft.math.products import products
from weft.math.rotary import doubled, signed
from weft.math.traced import RECOMPUTED
from weft.models import SequenceGroup
from weft.projection import SPREAD, computing_dtype, projection

TEXT_LENGTH = 512  # tokens of text, behind those of a picture where there are any
PARTED = "weft_parted"  # attribute of a network and its blocks: ranks that part its tokens
TABLES = "weft_tables"  # attribute of a network: tables of places, by frames, rows, columns
KEPT_TABLES = 8  # shapes whose tables are kept
KERNELS = {  # that we call past autograd, beside torch's own choice
    AttentionBackendName._NATIVE_CUDNN: "cudnn",
    AttentionBackendName._NATIVE_EFFICIENT: "efficient",
}


def make_lean(network: Any) -> None:
    """Give a network and its blocks our own forward; modules, names and parameters stay."""
    setattr(network, TABLES, {})
    network.forward = MethodType(_network_forward, network)
    lean_blocks(network.blocks)


def lean_blocks(blocks: Iterable[Any]) -> None:
    """Give WanTransformerBlocks our own forward, which takes times and places in other shapes than diffusers'."""
    for block in blocks:
        block.forward = MethodType(_block_forward, block)


def is_lean(network: nn.Module) -> bool:
    """Whether a network computes in our way."""
    return hasattr(network, TABLES)


@dataclass
class Parted:
    """Ranks that part a network's tokens. tokens: of all ranks, in the forward pass that is under way."""

    sequence: SequenceGroup
    tokens: int = 0


def part(network: Any, sequence: SequenceGroup) -> None:
    """Let a lean network's blocks attend to the tokens of all ranks."""
    parted = Parted(sequence)
    for module in (network, *network.blocks):
        setattr(module, PARTED, parted)


# ---- The network ----


def _network_forward(
    network: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None, return_dict: bool = True,
    attention_kwargs: Mapping[str, Any] | None = None, given: Tensor | None = None,
) -> Any:  # fmt: skip
    """diffusers' forward. given (B, F): frames that are known, whose time is 0; timestep may also be that of each token
    (B, N), as diffusers' pipelines have it."""
    assert not attention_kwargs, "scales of adapters are not given with a question"
    patch = network.config.patch_size
    sizes = [size // step for size, step in zip(hidden_states.shape[2:], patch, strict=True)]
    x = network.patch_embedding(hidden_states).flatten(2).mT.contiguous()  # (B, N, d)
    temb, modulation, text = _conditions(network, timestep, encoder_hidden_states, encoder_hidden_states_image, given)
    if given is not None:
        temb, modulation = (_by_frame(each, given[:, :: patch[0]]) for each in (temb, modulation))
    parted: Parted | None = getattr(network, PARTED, None)
    if parted is not None:
        parted.tokens = x.shape[1]
        temb, modulation = (_own_rows(parted, each) for each in (temb, modulation))
    tables = _tables(network, sizes, x.device)
    for block in network.blocks:
        x = block(x, text, modulation, tables)
    shift, scale = (network.scale_shift_table + temb[:, :, None]).unbind(2)  # (B, U, d) each
    head = Modulated(1 + scale, shift, network.norm_out.eps, x.dtype)
    out = network.proj_out(modulated(x, head))
    out = out.reshape(len(out), *sizes, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    out = out.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _conditions(
    network: Any, timestep: Tensor, text: Tensor, image: Tensor | None, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(temb (B, U, d), modulation (B, U, 6, d), text with the picture's tokens before it (B, L, d)).

    Text is in the dtype that is multiplied in: all blocks read it.
    """
    if given is not None:
        timestep = torch.stack([timestep, torch.zeros_like(timestep)], 1)  # all the times that there are
    elif timestep.ndim == 1:
        timestep = timestep[:, None]
    temb, modulation, text, image = network.condition_embedder(
        timestep.flatten(), text, image, timestep_seq_len=timestep.shape[1]
    )
    states = text if image is None else torch.cat([image, text], 1)
    return temb, modulation.unflatten(2, (6, -1)), states.to(computing_dtype(states))


def _by_frame(by_time: Tensor, given: Tensor) -> Tensor:
    """(B, F, ...) of (B, 2, ...): at time t, and at 0 where a frame is given (B, F)."""
    at_t, at_0 = by_time.unbind(1)
    known = given.reshape(*given.shape, *(1,) * (at_t.ndim - 1))
    return torch.where(known, at_0[:, None], at_t[:, None])


def _own_rows(parted: Parted, rows: Tensor) -> Tensor:
    """Of U rows over all N tokens (B, U, ...) those over this rank's tokens: as few as are of equal length."""
    if rows.shape[1] == 1:
        return rows
    of_row, own = parted.tokens // rows.shape[1], -(-parted.tokens // parted.sequence.size)
    step = gcd(of_row, own)
    first = parted.sequence.rank * own + torch.arange(0, own, step, device=rows.device)
    return rows[:, (first // of_row).clamp(max=rows.shape[1] - 1)]  # padding repeats the last token


def _tables(network: Any, sizes: list[int], device: torch.device) -> Tensor:
    """cos and sin (2, n, 1, D) of this rank's tokens, as `rotary.turned` takes them, times sqrt(d); made once."""
    kept: dict[Any, Tensor] = getattr(network, TABLES)
    key = (*sizes, device)
    if key in kept:
        return kept[key]
    made = _made_tables(network, sizes)
    # What is made in inference mode, or fake of a network that is not, serves nobody else.
    if type(made) is type(network.rope.freqs_cos) and not torch.is_inference_mode_enabled():
        while len(kept) >= KEPT_TABLES:
            kept.pop(next(iter(kept)))
        kept[key] = made
    return made


@torch.no_grad()
def _made_tables(network: Any, sizes: list[int]) -> Tensor:
    rope = network.rope
    widths = [rope.t_dim, rope.h_dim, rope.w_dim]
    halves = []
    for table in (rope.freqs_cos[:, ::2], rope.freqs_sin[:, 1::2]):  # (places, D / 2): diffusers has each twice
        axes = table.split([width // 2 for width in widths], 1)
        spread = [
            axis[:size].view(*(size if i == n else 1 for i in range(3)), -1).expand(*sizes, -1)
            for n, (axis, size) in enumerate(zip(axes, sizes, strict=True))
        ]
        halves.append(torch.cat(spread, -1).flatten(0, 2).float())  # (N, D / 2)
    root = sqrt(network.config.num_attention_heads * network.config.attention_head_dim)
    tables = torch.stack([doubled(halves[0] * root), signed(halves[1] * root)])[:, :, None]
    parted: Parted | None = getattr(network, PARTED, None)
    return tables if parted is None else parted.sequence.split(tables, 1)


# ---- A block ----


def _block_forward(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor
) -> Tensor:
    """hidden_states x (B, N, d), encoder_hidden_states (B, L, d), temb (B, U, 6, d), rotary_emb: tables of places.

    Linear layers are asked what they are and not called, and hooks on the modules around them are not either.
    """
    if hasattr(block.scale_shift_table, SPREAD):  # ZeRO-3 gathers what a module holds when the module is called
        return _by_diffusers(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    x, text = hidden_states, encoder_hidden_states
    table = block.scale_shift_table + temb.float()  # (B, U, 6, d)
    shift, scale, gate = table[:, :, :3].unbind(2)
    norm = Modulated(1 + scale, shift, block.norm1.eps, computing_dtype(x))
    attn = block.attn1
    q, k, v = products(x, [projection(each) for each in (attn.to_q, attn.to_k, attn.to_v)], norm)
    found = self_attention(q, Source(k, attn.norm_k.weight, v), attn.norm_q.weight, rotary_emb, _heads(block, attn))
    del q, k, v  # autograd has them where it needs them
    (out,) = products(found, [projection(attn.to_out[0])])
    x = gated(x, attn.to_out[1](out) if _drops(attn) else out, gate)
    layers = block.attn2.to_q, block.attn2.to_out[0], block.ffn.net[0].proj, block.ffn.net[2]
    given = Given((x,), (table[:, :, 3:],), (), tuple(map(projection, layers)))
    if _goes_in_pieces(block) and can_be_parted(given):
        given = replace(given, whole=_of_text(block.attn2, text))
        return by_tokens(partial(_after_attention, block, None), given)
    return _after_attention(block, text, given)


def _of_text(attn: Any, text: Tensor) -> tuple[Tensor, ...]:
    """Keys and values (B, L, d) of text, and behind them of a picture where there are any."""
    pictured = text.shape[1] - TEXT_LENGTH if attn.add_k_proj is not None else 0
    of_text = products(text[:, pictured:], [projection(attn.to_k), projection(attn.to_v)])
    if attn.add_k_proj is None:
        return of_text
    return *of_text, *products(text[:, :pictured], [projection(attn.add_k_proj), projection(attn.add_v_proj)])


def _after_attention(block: Any, text: Tensor | None, given: Given) -> Tensor:
    """What each token (B, N, d) does by itself: it attends to the text, and passes through the feed-forward layer.
    text: where its keys and values are not given; asked after the queries, as diffusers does, since layers with a
    dropout draw in their order."""
    (x,), (table,), layers = given.tokens, given.rows, given.layers
    attn, dtype = block.attn2, computing_dtype(x)
    (q,) = products(x, layers[:1], _norm2(block, dtype))
    of_text = given.whole if text is None else _of_text(attn, text)
    pairs = zip(of_text[::2], of_text[1::2], strict=True)
    sources = [Source(k, norm.weight, v) for (k, v), norm in zip(pairs, _norms_of_keys(attn), strict=True)]
    (out,) = products(cross_attention(q, attn.norm_q.weight, sources, _heads(None, attn)), layers[1:2])
    x = x + (attn.to_out[1](out) if _drops(attn) else out)
    shift, scale, gate = table.unbind(2)
    (inner,) = products(x, layers[2:3], Modulated(1 + scale, shift, block.norm3.eps, dtype))
    (out,) = products(inner, layers[3:], GELU)
    return gated(x, out, gate)


def _goes_in_pieces(block: Any) -> bool:
    """Whether tokens may go through a block's second half some at a time: it runs again in the backward pass anyway,
    and nothing of it is trained, or drawn, that pieces would know nothing of."""
    attn = block.attn2
    others = [block.norm2, attn.norm_q, *_norms_of_keys(attn)]
    trained = any(parameter.requires_grad for module in others for parameter in module.parameters())
    return getattr(block, RECOMPUTED, False) and not trained and not _drops(attn)


def _norms_of_keys(attn: Any) -> list[Any]:
    """Of text, and of a picture."""
    return [attn.norm_k] if attn.add_k_proj is None else [attn.norm_k, attn.norm_added_k]


def _drops(attn: Any) -> bool:
    return attn.to_out[1].p > 0 and attn.training


def _norm2(block: Any, dtype: torch.dtype) -> Modulated | None:
    norm = block.norm2
    if isinstance(norm, nn.Identity):
        return None
    weight, bias = (each.float().view(1, 1, -1) for each in (norm.weight, norm.bias))
    return Modulated(weight, bias, norm.eps, dtype)


def _heads(block: Any, attn: Any) -> Heads:
    """How a layer attends: by the kernel that was chosen for it, and a block's own to the tokens of all ranks."""
    chosen, eps = attn.processor._attention_backend, attn.norm_q.eps
    backend = None if chosen is None else AttentionBackendName(chosen)
    parted: Parted | None = None if block is None else getattr(block, PARTED, None)
    few = block is not None and getattr(block, RECOMPUTED, False)
    if parted is None and backend in (None, AttentionBackendName.NATIVE):
        return Heads(attn.heads, eps, few=few)

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return dispatch_attention_fn(q, k, v, backend=backend)

    if parted is None:
        known = None if backend is None else KERNELS.get(backend)
        return Heads(attn.heads, eps, known, kernel, fused=known is not None, few=few)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parted.sequence.attend(Attention(kernel), q, k, v, (parted.tokens,))

    return Heads(attn.heads, eps, attend=attend, fused=False)


def _by_diffusers(block: Any, x: Tensor, text: Tensor, temb: Tensor, tables: Tensor) -> Tensor:
    """The block's own forward, in the shapes that it takes."""
    temb = temb[:, 0] if temb.shape[1] == 1 else temb.repeat_interleave(x.shape[1] // temb.shape[1], 1)
    cos, sin = (tables / sqrt(x.shape[-1])).unbind()
    return type(block).forward(block, x, text, temb, (cos[None], sin[None]))
