"""HunyuanVideo's transformer computed by Weft on diffusers' own modules: the same numbers, less kept, masks trimmed.

A double block keeps 6 tensors of its video tokens' width and one of its ffn's, a single block 5 and one. Text is masked
only where the texts of a batch have different lengths. Letters: B items, N video tokens, L text tokens, T = N + L,
d width, D width of a head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from weft.families.lean_wan import KEPT_TABLES, KERNELS, PARTED, TABLES
from weft.math.attention import Attention, rows_of, seen_by
from weft.math.by_tokens import Given, are_many, by_tokens
from weft.math.joint_attention import Stream, joint_attention, whole_mask
from weft.math.normed_attention import Heads
from weft.math.norms import GELU, Modulated, gated, modulated
from weft.math.products import products
from weft.math.rotary import signed
from weft.math.traced import RECOMPUTED
from weft.models import SequenceGroup
from weft.projection import PLAIN, SPREAD, LowRank, Projection, computing_dtype, projection

TEXT_ROOM = 256  # tokens of text by which tables of places grow


def make_lean(network: Any) -> None:
    """Give a network and its blocks our own forward; modules, names and parameters stay."""
    setattr(network, TABLES, {})
    network.forward = MethodType(_network_forward, network)
    lean_blocks(network.transformer_blocks, network.single_transformer_blocks)


def lean_blocks(double: Iterable[Any], single: Iterable[Any]) -> None:
    """Give blocks our own forward, which takes masks and places in other shapes than diffusers'."""
    for block in double:
        block.forward = MethodType(_double_forward, block)
    for block in single:
        block.forward = MethodType(_single_forward, block)


@dataclass
class Parted:
    """Ranks that part a network's tokens. lengths: of video and text of all ranks, in the forward pass under way."""

    sequence: SequenceGroup
    lengths: tuple[int, int] = (0, 0)


def part(network: Any, sequence: SequenceGroup) -> None:
    """Let a lean network answer for a group of ranks that part its tokens."""
    parted = Parted(sequence)
    for module in (network, *network.transformer_blocks, *network.single_transformer_blocks):
        setattr(module, PARTED, parted)


# ---- The network ----


def _network_forward(
    network: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None, pooled_projections: Tensor, guidance: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None, return_dict: bool = True,
) -> Any:  # fmt: skip
    """diffusers' forward. encoder_attention_mask (B, L): True, or 1, where text is, which it begins with; None: all of
    it is."""
    assert not attention_kwargs, "scales of adapters are not given with a question"
    side, depth = network.config.patch_size, network.config.patch_size_t
    sizes = [size // step for size, step in zip(hidden_states.shape[2:], (depth, side, side), strict=True)]
    temb = network.time_text_embed(timestep, pooled_projections, guidance)[0]
    x = network.x_embedder(hidden_states)
    text = network.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None]
    tokens, parted = x.shape[1], _parted(network)
    if parted is not None:
        parted.lengths = tokens, text.shape[1]
        x, text = (parted.sequence.split(each, 1) for each in (x, text))
    turn = _tables(network, sizes, hidden_states, text.shape[1])
    for block in network.transformer_blocks:
        x, text = block(x, text, temb, mask, turn)
    if len(network.single_transformer_blocks):
        own, x = x.shape[1], torch.cat([x, text], 1)
        for block in network.single_transformer_blocks:
            x = block(x, temb, mask, turn)
        x = x[:, :own]
    scale, shift = network.norm_out.linear(network.norm_out.silu(temb).to(x.dtype)).float()[:, None].chunk(2, -1)
    out = network.proj_out(modulated(x, Modulated(1 + scale, shift, network.norm_out.norm.eps, x.dtype)))
    if parted is not None:
        out = parted.sequence.gather(out, 1, tokens)
    out = out.reshape(len(out), *sizes, -1, depth, side, side).permute(0, 4, 1, 5, 2, 6, 3, 7)
    out = out.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def _parted(module: nn.Module) -> Parted | None:
    return getattr(module, PARTED, None)


@torch.no_grad()
def _tables(network: Any, sizes: list[int], latents: Tensor, text: int) -> Tensor:
    """cos and sin (2, T, 1, D) of this rank's tokens, as `rotary.turned` takes them: of the video's places, and behind
    them for text, which has none and is not turned. Made once for each shape of latents, with room for more text."""
    kept: dict[Any, Tensor] = getattr(network, TABLES)
    # What is made on fake tensors, or in inference mode, serves nobody else.
    lasting = type(latents) is Tensor and not torch.is_inference_mode_enabled()
    room = -(-text // TEXT_ROOM) * TEXT_ROOM
    key = (*sizes, latents.device, room)
    made = kept.get(key) if lasting else None
    if made is None:
        made = _made_tables(network, latents, room)
        if lasting:
            while len(kept) >= KEPT_TABLES:
                kept.pop(next(iter(kept)))
            kept[key] = made
    return made[:, : made.shape[1] - room + text]


def _made_tables(network: Any, latents: Tensor, text: int) -> Tensor:
    cos, sin = network.rope(latents)  # (N, D), each number of a pair twice
    video = torch.stack([cos.float(), signed(sin[:, ::2].float())])[:, :, None]
    parted = _parted(network)
    if parted is not None:
        video = parted.sequence.split(video, 1)
    still = video.new_zeros(2, text, *video.shape[2:])
    still[0] = 1
    return torch.cat([video, still], 1)


# ---- Blocks ----


def _double_forward(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None,
    freqs_cis: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden_states x (B, N, d), encoder_hidden_states (B, L, d), temb (B, d), attention_mask (B, 1, 1, L) of text,
    freqs_cis (2, T, 1, D).

    Linear layers are asked what they are and not called, and hooks on the modules around them are not either.
    """
    x, text, attn, turn = hidden_states, encoder_hidden_states, block.attn, freqs_cis
    if hasattr(attn.norm_q.weight, SPREAD):  # ZeRO-3 gathers what a module holds when the module is called
        mask = None if attention_mask is None else whole_mask(attention_mask, x.shape[1] + text.shape[1])
        return type(block).forward(block, x, text, temb, mask, _as_diffusers(turn[:, : x.shape[1]]))
    shift, scale, gate, *of_ffn = _modulation(block.norm1, temb, 6)
    text_shift, text_scale, text_gate, *of_text_ffn = _modulation(block.norm1_context, temb, 6)
    own = (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = products(x, [projection(each) for each in own], _norm(block.norm1.norm, shift, scale, x))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    norm = _norm(block.norm1_context.norm, text_shift, text_scale, text)
    text_q, text_k, text_v = products(text, [projection(each) for each in added], norm)
    streams = [
        Stream(q, k, v, attn.norm_q.weight, attn.norm_k.weight, turn[:, : x.shape[1]]),
        Stream(text_q, text_k, text_v, attn.norm_added_q.weight, attn.norm_added_k.weight, None),
    ]
    del q, k, v, text_q, text_k, text_v
    found, of_text = joint_attention(streams, _heads(block, attention_mask), attention_mask)
    del streams  # autograd has them where it needs them
    (out,) = products(found, [projection(attn.to_out[0])])
    x = gated(x, attn.to_out[1](out) if attn.to_out[1].p and attn.training else out, gate)
    (out,) = products(of_text, [projection(attn.to_add_out)])
    text = gated(text, out, text_gate)
    x = _fed(block, x, block.ff, block.norm2.eps, of_ffn)
    return x, _fed(block, text, block.ff_context, block.norm2_context.eps, of_text_ffn)


def _single_forward(
    block: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None, image_rotary_emb: Tensor
) -> Tensor:
    """hidden_states x (B, T, d): video, then text. temb (B, d), attention_mask (B, 1, 1, L) of text, image_rotary_emb
    (2, T, 1, D)."""
    x, attn, turn = hidden_states, block.attn, image_rotary_emb
    if hasattr(attn.norm_q.weight, SPREAD):
        return _single_by_diffusers(block, x, temb, attention_mask, turn)
    shift, scale, gate = _modulation(block.norm, temb, 3)
    # What each token does by itself is then done some tokens at a time; where there are few, both halves of the block
    # stay together, and recomputation changes no bit.
    parted = getattr(block, RECOMPUTED, False) and are_many(x)
    own = [attn.to_q, attn.to_k, attn.to_v, *([] if parted else [block.proj_mlp])]
    norm = _norm(block.norm.norm, shift, scale, x)
    q, k, v, *inner = products(x, [projection(each) for each in own], norm)
    stream = Stream(q, k, v, attn.norm_q.weight, attn.norm_k.weight, turn)
    del q, k, v
    (found,) = joint_attention([stream], _heads(block, attention_mask), attention_mask)
    if not parted:
        return gated(x, _both(found, inner[0], projection(block.proj_out)), gate)
    del stream, norm
    layers = projection(block.proj_mlp), projection(block.proj_out)
    return by_tokens(partial(_beside, block.norm.norm.eps), Given((x, found), (shift, scale, gate), (), layers))


def _beside(eps: float, given: Given) -> Tensor:
    """The feed-forward layer of tokens x beside what their attention has found."""
    (x, found), (shift, scale, gate), (into, out) = given.tokens, given.rows, given.layers
    (inner,) = products(x, [into], Modulated(1 + scale, shift, eps, computing_dtype(x)))
    return gated(x, _both(found, inner, out), gate)


def _modulation(norm: Any, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, 1, d) fp32 each."""
    return norm.linear(norm.silu(temb)).float()[:, None].chunk(count, -1)


def _norm(norm: nn.LayerNorm, shift: Tensor, scale: Tensor, x: Tensor) -> Modulated:
    return Modulated(1 + scale, shift, norm.eps, computing_dtype(x))


def _fed(block: Any, x: Tensor, ff: Any, eps: float, modulation: Sequence[Tensor]) -> Tensor:
    given = Given((x,), tuple(modulation), (), (projection(ff.net[0].proj), projection(ff.net[2])))
    run = partial(_through, eps)
    return by_tokens(run, given) if getattr(block, RECOMPUTED, False) else run(given)


def _through(eps: float, given: Given) -> Tensor:
    """What a feed-forward layer does to each token by itself."""
    (x,), (shift, scale, gate), (into, out) = given.tokens, given.rows, given.layers
    (inner,) = products(x, [into], Modulated(1 + scale, shift, eps, computing_dtype(x)))
    (answer,) = products(inner, [out], GELU)
    return gated(x, answer, gate)


def _both(found: Tensor, inner: Tensor, layer: Projection) -> Tensor:
    """What a layer answers to found (B, T, d) and gelu(inner) (B, T, f) side by side, which are never laid so."""
    if layer.kernel is not PLAIN:  # whose weight cannot be cut
        (out,) = products(torch.cat([found, nn.functional.gelu(inner, approximate="tanh")], -1), [layer])
        return out
    width = found.shape[-1]
    left, right = _columns(layer, slice(None, width)), _columns(layer, slice(width, None))
    weight, _ = right.tensors
    (one,) = products(found, [left])
    (other,) = products(inner, [Projection(right.module, PLAIN, (weight, None), right.change)], GELU)
    return one + other


def _columns(layer: Projection, columns: slice) -> Projection:
    """A plain layer of some of its inputs."""
    weight, bias = layer.tensors
    assert weight is not None
    change = layer.change
    if change is not None:
        narrow = None if change.narrow is None else (change.narrow[0][:, columns], change.narrow[1])
        change = LowRank(change.a[:, columns], change.b, change.scale, narrow)
    return Projection(layer.module, PLAIN, (weight[:, columns], bias), change)


def _heads(block: Any, mask: Tensor | None) -> Heads:
    """How a block attends: by the kernel that was chosen for it, to the tokens of all ranks."""
    attn = block.attn
    chosen, parted = attn.processor._attention_backend, _parted(block)
    backend = None if chosen is None else AttentionBackendName(chosen)
    eps = attn.norm_q.eps
    few = getattr(block, RECOMPUTED, False)
    if parted is None and backend in (None, AttentionBackendName.NATIVE):
        return Heads(attn.heads, eps, few=few)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if parted is None:
            return dispatch_attention_fn(q, k, v, attn_mask=_whole(mask, k), backend=backend)
        whole = None if mask is None else whole_mask(mask, sum(parted.lengths))

        def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
            seen = None if whole is None else rows_of(whole, rows)
            return dispatch_attention_fn(q, k, v, attn_mask=seen, backend=backend)

        attention = Attention(kernel, None if whole is None else seen_by(whole))
        return parted.sequence.attend(attention, q, k, v, parted.lengths)

    known = None if backend is None or parted is not None else KERNELS.get(backend)
    return Heads(attn.heads, eps, known, attend, fused=known is not None, few=few)


def _whole(mask: Tensor | None, k: Tensor) -> Tensor | None:
    return None if mask is None else whole_mask(mask, k.shape[1])


# ---- As diffusers computes them ----


def _single_by_diffusers(block: Any, x: Tensor, temb: Tensor, mask: Tensor | None, turn: Tensor) -> Tensor:
    """The block's own forward, which wants video and text apart. Text has no place, so the count of tokens is enough to
    tell where it begins: cos 1 and sin 0 turn nothing, and one token may stand for the text."""
    whole = None if mask is None else whole_mask(mask, x.shape[1])
    # All but the last token are turned by their tables; text is turned by angles of 0.
    video, text = type(block).forward(block, x[:, :-1], x[:, -1:], temb, whole, _as_diffusers(turn[:, :-1]))
    return torch.cat([video, text], 1)


def _as_diffusers(turn: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) each."""
    cos, sin = turn[:, :, 0].unbind()
    return cos, sin[:, 1::2].repeat_interleave(2, -1)
