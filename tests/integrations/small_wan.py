"""A small Wan as musubi-tuner holds it: its names of modules and classes, and the arithmetic of the official model."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu
from torch.utils.checkpoint import checkpoint

import tests.families.official_wan as official
from tests.families.official_wan import Sizes, looked_up, norm, rotations, split, turned

SIZES = Sizes(layers=2)
TEXT = 16  # tokens that a text is padded to; the official model has 512


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return official.root_mean_square(x.float(), self.weight).type_as(x)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim), WanRMSNorm(dim)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q = turned(split(self.norm_q(self.q(x)), self.heads), turns)
        k = turned(split(self.norm_k(self.k(x)), self.heads), turns)
        v = split(self.v(x), self.heads)
        return self.o(looked_up(q.to(v), k.to(v), v).transpose(1, 2).flatten(2))


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k = split(self.norm_q(self.q(x)), self.heads), split(self.norm_k(self.k(context)), self.heads)
        v = split(self.v(context), self.heads)
        return self.o(looked_up(q.to(v), k.to(v), v).transpose(1, 2).flatten(2))


class WanAttentionBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d = sizes.dim
        self.self_attn, self.cross_attn = WanSelfAttention(d, sizes.heads), WanT2VCrossAttention(d, sizes.heads)
        self.norm3 = nn.LayerNorm(d, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(d, sizes.ffn), nn.GELU(approximate="tanh"), nn.Linear(sizes.ffn, d))
        self.modulation = nn.Parameter(torch.zeros(1, 6, d))
        self.recomputes = False

    def forward(self, x: Tensor, e: Tensor, context: Tensor, turns: Tensor) -> Tensor:
        if self.training and self.recomputes:
            return checkpoint(self.answer, x, e, context, turns, use_reentrant=False)
        return self.answer(x, e, context, turns)

    def answer(self, x: Tensor, e: Tensor, context: Tensor, turns: Tensor) -> Tensor:
        m = (self.modulation + e).unbind(2)
        x = x + m[2] * self.self_attn((norm(x) * (1 + m[1]) + m[0]).to(context), turns)
        x = x + self.cross_attn(self.norm3(x).to(context), context)
        return x + m[5] * self.ffn((norm(x) * (1 + m[4]) + m[3]).to(context))


class Head(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head = nn.Linear(sizes.dim, 4 * sizes.given)
        self.modulation = nn.Parameter(torch.zeros(1, 2, sizes.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[:, :, None]).unbind(2)
        return self.head((norm(x) * (1 + scale) + shift).to(self.head.bias.dtype))


class WanModel(nn.Module):
    def __init__(self, sizes: Sizes = SIZES, seed: int = 0) -> None:
        super().__init__()
        d, self.sizes = sizes.dim, sizes
        self.patch_embedding = nn.Conv3d(sizes.taken, d, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(sizes.text, d), nn.GELU(approximate="tanh"), nn.Linear(d, d))
        self.time_embedding = nn.Sequential(nn.Linear(sizes.freq, d), nn.SiLU(), nn.Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.blocks = nn.ModuleList(WanAttentionBlock(sizes) for _ in range(sizes.layers))
        self.head = Head(sizes)
        self.load_state_dict(official.random_weights(sizes, seed))
        self.requires_grad_(False).eval()

    def enable_gradient_checkpointing(self, cpu_offload: bool = False) -> None:
        assert not cpu_offload
        for block in self.blocks:
            block.recomputes = True

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, C, F, H, W), t (B,) in thousandths, context (B, L, text): the velocity, fp32."""
        grid = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
        tokens = self.patch_embedding(x).flatten(2).mT
        wave = official.sinusoid(t[:, None].expand(len(t), tokens.shape[1]), self.sizes.freq)
        e = self.time_embedding[2](silu(self.time_embedding[0](wave.to(self.time_embedding[0].bias.dtype))))
        e0 = self.time_projection(e).unflatten(2, (6, self.sizes.dim))
        context = pad(context, (0, 0, 0, max(0, TEXT - context.shape[1])))
        context = self.text_embedding[2](gelu(self.text_embedding[0](context), approximate="tanh"))
        turns = rotations(grid, self.sizes.dim // self.sizes.heads)
        for block in self.blocks:
            tokens = block(tokens, e0, context, turns)
        out = self.head(tokens, e).float()
        patches = out.unflatten(2, (2, 2, self.sizes.given)).unflatten(1, grid)
        return torch.einsum("bfhwpqc->bcfhpwq", patches).flatten(3, 4).flatten(4, 5)


class MMDoubleStreamBlock(nn.Module):
    """Of HunyuanVideo: its names alone."""

    def __init__(self, d: int, ffn: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        for kind in ("img", "txt"):
            self.add_module(f"{kind}_mod", _named(linear=linear(d, 6 * d)))
            self.add_module(f"{kind}_attn_qkv", linear(d, 3 * d))
            self.add_module(f"{kind}_attn_proj", linear(d, d))
            self.add_module(f"{kind}_mlp", _named(fc1=linear(d, ffn), fc2=linear(ffn, d)))


class MMSingleStreamBlock(nn.Module):
    """Of HunyuanVideo: its names alone."""

    def __init__(self, d: int, ffn: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(d, 3 * d + ffn), nn.Linear(d + ffn, d)
        self.modulation = _named(linear=nn.Linear(d, 3 * d))


class HYVideoDiffusionTransformer(nn.Module):
    """Names of its layers, without arithmetic."""

    def __init__(self, double: int, single: int, d: int = 8, ffn: int = 16) -> None:
        super().__init__()
        self.img_in = _named(proj=nn.Conv3d(4, d, (1, 2, 2), (1, 2, 2)))
        self.txt_in = _named(input_embedder=nn.Linear(d, d))
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(d, ffn) for _ in range(double))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(d, ffn) for _ in range(single))
        self.final_layer = _named(linear=nn.Linear(d, d))


def _named(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def question(seed: int, items: int = 1) -> dict[str, Tensor]:
    """Arguments of a WanModel."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return {"x": draw(items, 16, 2, 4, 4), "t": draw(items).sigmoid() * 1000, "context": draw(items, 5, SIZES.text)}
