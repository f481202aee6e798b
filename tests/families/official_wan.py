"""Wan's forward pass written from its formulas, on tensors under their official names: a second way to compute.

No module, no autocast, no broadcasting trick: fp32, frequencies in fp64. Letters: B batch, N video tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv3d, gelu, layer_norm, pad, silu, softmax


@dataclass(frozen=True)
class Sizes:
    """Of a small Wan: head_dim is dim / heads."""

    dim: int = 24
    heads: int = 2
    ffn: int = 40
    layers: int = 2
    taken: int = 16
    given: int = 16
    text: int = 20
    freq: int = 32
    clip: int | None = None

    def official_config(self) -> dict[str, object]:
        """As in config.json of an official checkpoint."""
        return {
            "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": self.dim, "eps": 1e-6,
            "ffn_dim": self.ffn, "freq_dim": self.freq, "in_dim": self.taken, "num_heads": self.heads,
            "num_layers": self.layers, "out_dim": self.given, "text_dim": self.text, "text_len": 512,
            "model_type": "t2v" if self.taken == self.given else "i2v",
        }  # fmt: skip


def random_weights(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of the official state dict, with values that let each one matter."""
    d, chance = sizes.dim, torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (d, sizes.taken, 1, 2, 2), "patch_embedding.bias": (d,),
        **linear("text_embedding.0", sizes.text, d), **linear("text_embedding.2", d, d),
        **linear("time_embedding.0", sizes.freq, d), **linear("time_embedding.2", d, d),
        **linear("time_projection.1", d, 6 * d),
        **linear("head.head", d, 4 * sizes.given), "head.modulation": (1, 2, d),
    }  # fmt: skip
    if sizes.clip:
        c = sizes.clip
        shapes |= {**linear("img_emb.proj.1", c, c), **linear("img_emb.proj.3", c, d)}
        shapes |= {f"img_emb.proj.0.{end}": (c,) for end in ("weight", "bias")}
        shapes |= {f"img_emb.proj.4.{end}": (d,) for end in ("weight", "bias")}
    for i in range(sizes.layers):
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes |= linear(f"blocks.{i}.{attention}.{name}", d, d)
            shapes |= {f"blocks.{i}.{attention}.norm_{name}.weight": (d,) for name in "qk"}
        if sizes.clip:
            shapes |= {**linear(f"blocks.{i}.cross_attn.k_img", d, d), **linear(f"blocks.{i}.cross_attn.v_img", d, d)}
            shapes |= {f"blocks.{i}.cross_attn.norm_k_img.weight": (d,)}
        shapes |= {**linear(f"blocks.{i}.ffn.0", d, sizes.ffn), **linear(f"blocks.{i}.ffn.2", sizes.ffn, d)}
        shapes |= {f"blocks.{i}.norm3.{end}": (d,) for end in ("weight", "bias")}
        shapes |= {f"blocks.{i}.modulation": (1, 6, d)}
    scale = 0.2
    return {name: scale * torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def linear(name: str, fan_in: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, fan_in), f"{name}.bias": (out,)}


def velocity(
    w: Mapping[str, Tensor], sizes: Sizes, x: Tensor, timestep: Tensor, text: Tensor, clip: Tensor | None = None
) -> Tensor:
    """x (B, C, F, H, W), timestep (B, N) in thousandths, text (B, L, D), clip (B, 257, D): the network's answer."""
    grid = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
    tokens = conv3d(x, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2)).flatten(2).mT
    e = apply(w, "time_embedding.2", silu(apply(w, "time_embedding.0", sinusoid(timestep, sizes.freq))))  # (B, N, D)
    e0 = apply(w, "time_projection.1", silu(e)).unflatten(2, (6, sizes.dim))  # (B, N, 6, D)
    context = pad(text, (0, 0, 0, 512 - text.shape[1]))
    context = apply(w, "text_embedding.2", gelu(apply(w, "text_embedding.0", context), approximate="tanh"))
    picture = None
    if clip is not None:
        h = norm(clip, w["img_emb.proj.0.weight"], w["img_emb.proj.0.bias"], eps=1e-5)
        h = apply(w, "img_emb.proj.3", gelu(apply(w, "img_emb.proj.1", h)))
        picture = norm(h, w["img_emb.proj.4.weight"], w["img_emb.proj.4.bias"], eps=1e-5)
    turns = rotations(grid, sizes.dim // sizes.heads)
    for i in range(sizes.layers):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        m = (block["modulation"] + e0).unbind(2)  # shift, scale, gate of attention; shift, scale, gate of the ffn
        h = norm(tokens) * (1 + m[1]) + m[0]
        tokens = tokens + m[2] * attention(block, "self_attn", h, h, sizes.heads, turns=turns)
        h = norm(tokens, block["norm3.weight"], block["norm3.bias"])
        tokens = tokens + attention(block, "cross_attn", h, context, sizes.heads, picture=picture)
        h = norm(tokens) * (1 + m[4]) + m[3]
        tokens = tokens + m[5] * apply(block, "ffn.2", gelu(apply(block, "ffn.0", h), approximate="tanh"))
    shift, scale = (w["head.modulation"] + e[:, :, None]).unbind(2)
    out = apply(w, "head.head", norm(tokens) * (1 + scale) + shift)  # (B, N, 1 * 2 * 2 * C)
    patches = out.unflatten(2, (2, 2, sizes.given)).unflatten(1, grid)  # (B, F, H/2, W/2, 2, 2, C)
    return torch.einsum("bfhwpqc->bcfhpwq", patches).flatten(3, 4).flatten(4, 5)


def apply(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return layer_norm(x, x.shape[-1:], weight, bias, eps)


def root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """(B, N) -> (B, N, width): cosines, then sines, of frequencies 10000^(-i / (width / 2))."""
    half = width // 2
    angle = timestep.double()[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def rotations(grid: tuple[int, int, int], width: int) -> Tensor:
    """(N, width / 2) complex: a token's turn, by its frame, its row and its column, each in its share of a head."""
    shares = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)  # (3, N)
    turns = []
    for place, share in zip(places, shares, strict=True):
        frequency = 10000.0 ** (-torch.arange(0, share, 2, dtype=torch.float64) / share)
        turns.append(torch.polar(torch.ones(()).double(), place[:, None] * frequency))
    return torch.cat(turns, dim=1)


def attention(
    w: Mapping[str, Tensor], name: str, x: Tensor, y: Tensor, heads: int, turns: Tensor | None = None,
    picture: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Tokens x (B, N, D) ask tokens y (B, L, D), and apart from them those of a picture."""
    q = split(root_mean_square(apply(w, f"{name}.q", x), w[f"{name}.norm_q.weight"]), heads)
    k = split(root_mean_square(apply(w, f"{name}.k", y), w[f"{name}.norm_k.weight"]), heads)
    v = split(apply(w, f"{name}.v", y), heads)
    if turns is not None:
        q, k = turned(q, turns), turned(k, turns)
    out = looked_up(q, k, v)
    if picture is not None:
        k = root_mean_square(apply(w, f"{name}.k_img", picture), w[f"{name}.norm_k_img.weight"])
        out = out + looked_up(q, split(k, heads), split(apply(w, f"{name}.v_img", picture), heads))
    return apply(w, f"{name}.o", out.transpose(1, 2).flatten(2))


def looked_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def split(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).float()
