"""How far fp8 compute is from full precision: products, input gradients, and the adapters' gradients of a deep stack.

    python benchmarks/float8_error.py --json benchmarks/results/float8-error-cpu.json

A stack of blocks with Wan's widths (self-attention, attention to text, feed-forward, norms and modulation, adapters of
rank 32 on every linear layer), random weights, against the same in fp32. What is compared: a scale for each row or one
for a whole tensor, both ways or forward alone, gradients in e4m3 or e5m2, and bf16 itself. Errors of numbers, which no
other work on the machine changes.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.math.float8 import E4M3, Float8Kernel, as_a_whole, by_rows
from weft.math.frozen import frozen_product
from weft.run.bench_machine import processor
from weft.run.float8_error import cosine

E5M2, E5M2_TOP = torch.float8_e5m2, 57344.0
RANK, SCALE = 32, 1.0


MADE: dict[tuple[Any, int], Any] = {}  # what a weight becomes, for the way that is measured at the time


def kept(encode: Callable[[Tensor], Any], weight: Tensor) -> Any:
    key = (encode, weight.data_ptr())
    if key not in MADE:
        MADE[key] = encode(weight)
    return MADE[key]


def rounded(x: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    codes, scale = encode(x)
    return codes.float() * scale


def in_e5m2(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True).clamp_min(1e-30) / E5M2_TOP
    return (x / scale).to(E5M2).float() * scale


@dataclass(frozen=True)
class Shipped:
    """What Weft runs: math/float8.py's kernel."""

    def multiplied(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        return Float8Kernel().multiplied(x, *self._coded(tensors))

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        return Float8Kernel().gradient(grad, *self._coded(tensors))

    def _coded(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, None]:
        assert tensors[0] is not None
        codes, scale = kept(by_rows, tensors[0])
        return codes.view(torch.uint8), scale, None


@dataclass(frozen=True)
class Emulated:
    """Another way of rounding, of the same weight: for each factor what becomes of it."""

    x: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor], Tensor]
    weight_back: Callable[[Tensor], Tensor]

    def multiplied(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        assert tensors[0] is not None
        return self.x(x) @ kept(self.weight, tensors[0]).T

    def gradient(self, grad: Tensor, *tensors: Tensor | None) -> Tensor:
        assert tensors[0] is not None
        return self.grad(grad) @ kept(self.weight_back, tensors[0])


def same(x: Tensor) -> Tensor:
    return x


def half(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rows(x: Tensor) -> Tensor:
    return rounded(x, by_rows)


def whole(x: Tensor) -> Tensor:
    return rounded(x, as_a_whole)


WAYS = {
    "fp32": Emulated(same, same, same, same),
    "bf16": Emulated(half, half, half, half),
    "fp8 as shipped": Shipped(),
    "fp8, one scale a tensor": Emulated(whole, whole, whole, whole),
    "fp8 forward alone": Emulated(rows, rows, half, half),
    "fp8, gradients e5m2": Emulated(rows, rows, in_e5m2, rows),
    "fp8 weights alone": Emulated(half, rows, half, rows),
}


class Layer(nn.Module):
    """A frozen linear layer that can be multiplied in several ways, and an adapter in fp32."""

    def __init__(self, width: int, out: int, chance: torch.Generator) -> None:
        super().__init__()
        self.frozen = torch.randn(out, width, generator=chance) * width**-0.5
        self.a = nn.Parameter(torch.randn(RANK, width, generator=chance) * width**-0.5)
        self.b = nn.Parameter(torch.randn(out, RANK, generator=chance) * 0.1 * RANK**-0.5)
        self.way: Any = WAYS["fp32"]
        self.given: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        y = frozen_product(self.way, x, self.frozen, None) + SCALE * (x @ self.a.T) @ self.b.T
        if not self.given and self.way is WAYS["fp32"]:
            self.given = (x.detach(),)
            y.register_hook(lambda grad: self._keep(grad.detach()))
        return y

    def _keep(self, grad: Tensor) -> None:
        self.given = (self.given[0], grad)


class Block(nn.Module):
    """Wan's block, its rotary turn left out."""

    def __init__(self, width: int, ffn: int, chance: torch.Generator) -> None:
        super().__init__()
        self.heads, self.shifts = width // 128, torch.randn(6, width, generator=chance) * 0.2
        self.own = nn.ModuleDict({name: Layer(width, width, chance) for name in "qkvo"})
        self.text = nn.ModuleDict({name: Layer(width, width, chance) for name in "qkvo"})
        self.up, self.down = Layer(width, ffn, chance), Layer(ffn, width, chance)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.shifts
        h = functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + self.attention(self.own, h, h) * (0.5 + gate)
        x = x + self.attention(self.text, functional.layer_norm(x, x.shape[-1:]), text)
        h = functional.layer_norm(x, x.shape[-1:]) * (1 + scale_2) + shift_2
        return x + self.down(functional.gelu(self.up(h), approximate="tanh")) * (0.5 + gate_2)

    def attention(self, layers: nn.ModuleDict, x: Tensor, seen: Tensor) -> Tensor:
        q, k = (functional.rms_norm(layers[name](to), to.shape[-1:]) for name, to in (("q", x), ("k", seen)))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for t in (q, k, layers["v"](seen)))
        return layers["o"](functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1))


class Stack(nn.ModuleList):
    """Blocks whose first and last are always in full precision, as in a run."""

    def gradients(self, way: Any, x: Tensor, text: Tensor, grad: Tensor) -> dict[str, Tensor]:
        for number, block in enumerate(self):
            for layer in block.modules():
                if isinstance(layer, Layer):
                    inner = 0 < number < len(self) - 1
                    layer.way = way if inner else WAYS["fp32" if way is WAYS["fp32"] else "bf16"]
        h = x
        for block in self:
            h = block(h, text)
        parameters = dict(self.named_parameters())
        found = torch.autograd.grad(h, list(parameters.values()), grad)
        return dict(zip(parameters, found, strict=True))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def errors_of(stack: Stack, way: Any) -> dict[str, float]:
    """Of the inner layers' products and input gradients, on what they were given in fp32."""
    forward, backward = [], []
    for layer in (m for block in list(stack)[1:-1] for m in block.modules() if isinstance(m, Layer)):
        x, grad = layer.given
        forward.append(relative(way.multiplied(x, layer.frozen, None), x @ layer.frozen.T))
        backward.append(relative(way.gradient(grad, layer.frozen, None), grad @ layer.frozen))
    return {
        "product_median": median(forward), "product_worst": max(forward),
        "gradient_median": median(backward), "gradient_worst": max(backward),
    }  # fmt: skip


def measured(layers: int, width: int, ffn: int, tokens: int, seed: int) -> dict[str, Any]:
    chance = torch.Generator().manual_seed(seed)
    stack = Stack(Block(width, ffn, chance) for _ in range(layers))
    x, text, grad = (torch.randn(n, width, generator=chance) for n in (tokens, 64, tokens))
    wanted = stack.gradients(WAYS["fp32"], x, text, grad)
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        if name == "fp32":
            continue
        MADE.clear()
        got = stack.gradients(way, x, text, grad)
        each = {path: cosine([got[path]], [wanted[path]]) for path in wanted}
        worst = min(each, key=lambda path: each[path])
        figures = errors_of(stack, way) | {
            "adapter_cosine": cosine(list(got.values()), list(wanted.values())), "worst_cosine": each[worst],
        }  # fmt: skip
        found[name] = {key: round(value, 5) for key, value in figures.items()} | {"worst_parameter": worst}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = measured(asked.layers, asked.width, asked.ffn, asked.tokens, asked.seed)
    for name, figures in found.items():
        print(f"{name:<24} " + "  ".join(f"{key} {value}" for key, value in figures.items()))
    if asked.json:
        record = {
            "date": date.today().isoformat(), "processor": processor(), "torch": torch.__version__,
            "codes": str(E4M3), "layers": asked.layers, "width": asked.width, "ffn": asked.ffn,
            "tokens": asked.tokens, "rank": RANK, "seed": asked.seed, "against": "fp32", "ways": found,
        }  # fmt: skip
        asked.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
