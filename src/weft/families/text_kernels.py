"""Faster twins of a language model's norms, gated layers and rotary embeddings, put on single modules from outside.

Whether a twin fits is found by asking: a copy of the model's module with small random weights and the twin must give
the same numbers. So no list of models is kept, and Gemma's norm, which multiplies by 1 + w, is told from Llama's.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from weft.errors import ConfigError
from weft.families.liger import liger
from weft.math.packed_attention import turned_halves
from weft.math.rms_norm import RmsNorm, normed

Binary = Callable[[Tensor, Tensor], Tensor]
Rotary = Callable[..., tuple[Tensor, Tensor]]
ROTARY = "apply_rotary_pos_emb"  # what transformers calls it in every model's file
WIDTH = 16


def apply_kernels(network: nn.Module, rms_norm: str, mlp: str, rotary: str) -> None:
    """Give a network's modules the forwards that were asked for. Raises ConfigError where none of them fits."""
    if rms_norm != "eager":
        _require("rms_norm", rms_norm, [_norm(module, rms_norm) for module in norms_of(network)])
    if mlp != "eager":
        _require("mlp", mlp, [_gate(module, mlp) for module in gated_of(network)])
    if rotary not in ("eager", "auto"):
        _require("rotary", rotary, [_rotate(module, rotary) for module in turning_of(network)])


def _require(kernel: str, choice: str, done: list[bool]) -> None:
    if choice != "auto" and not any(done):
        raise ConfigError(
            f"family.kernels.{kernel}: '{choice}' fits no layer of this model, which computes it in another way. Write "
            "auto or eager."
        )


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32)


def _twin(module: nn.Module, parameters: Mapping[str, Tensor], children: Mapping[str, nn.Module]) -> nn.Module:
    """A module of the same class and settings with other weights, on its class's own forward."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)
    twin._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    twin._modules = dict(children)
    return twin


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- RMSNorm ------------------------------------------------------------------------------------------------------


def norms_of(network: nn.Module) -> Iterator[nn.Module]:
    """Modules with one vector of weights that take one tensor: norms, by their class's name."""
    for module in network.modules():
        if "Norm" in type(module).__name__ and list(module._parameters) == ["weight"] and not module._modules:
            required = [p for p in inspect.signature(type(module).forward).parameters.values() if p.default is p.empty]
            if len(required) == 2 and module.weight is not None:
                yield module


def norm_form(module: nn.Module) -> RmsNorm | None:
    """What kind of RMSNorm a module is; None for another norm."""
    eps = [value for value in vars(module).values() if isinstance(value, float)]
    if len(eps) != 1:
        return None
    weight, x = _noise(WIDTH, seed=0), _noise(3, WIDTH, seed=1)
    twin = _twin(module, {"weight": weight}, {})
    for offset in (0.0, 1.0):
        norm = RmsNorm(eps[0], offset)
        if all(_same(twin(x * size), norm(x * size, weight)) for size in (1.0, 1e-3)):  # eps counts in small ones
            return norm
    return None


def _norm(module: nn.Module, choice: str) -> bool:
    form = norm_form(module)
    if form is None:
        return False
    if choice == "liger":
        kernel = liger("rms_norm").norm
        mode = "gemma" if form.offset else "llama"

        def run(self: nn.Module, x: Tensor) -> Tensor:
            assert isinstance(self.weight, Tensor)
            return kernel(x, self.weight, form.eps, form.offset, mode, False)
    else:

        def run(self: nn.Module, x: Tensor) -> Tensor:
            assert isinstance(self.weight, Tensor)
            return normed(x, self.weight, form)

    module.forward = MethodType(run, module)  # type: ignore[method-assign]
    return True


# ---- SwiGLU and GeGLU ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """An activation, and the gradient of x from that of its answer, which is overwritten: slope_(gradient, x)."""

    of: Callable[[Tensor], Tensor]
    slope_: Binary


def _silu_slope_(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=gradient)


def _gelu_slope_(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=gradient)


ACTIVATIONS = {
    "silu": Activation(functional.silu, _silu_slope_),
    "gelu": Activation(lambda x: functional.gelu(x, approximate="tanh"), _gelu_slope_),
}


class _Gated(torch.autograd.Function):
    """act(a) b; Shazeer 2020, arXiv:2002.05202, eq. 5 and 6. Keeps a and b, and not act(a), which is made once more."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.activation = ACTIVATIONS[name]
        return ctx.activation.of(a) * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        (gradient,) = gradients
        return ctx.activation.slope_(gradient * b, a), ctx.activation.of(a).mul_(gradient), None


def gated(a: Tensor, b: Tensor, name: str) -> Tensor:
    """act(a) b with the activation of that name."""
    return _Gated.apply(a, b, name)


def gated_of(network: nn.Module) -> Iterator[nn.Module]:
    """Feed-forward layers with a gate, as transformers names their parts."""
    for module in network.modules():
        if set(module._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            yield module


def activation_of(module: nn.Module) -> str | None:
    """silu or gelu, of a layer that is down(act(gate(x)) up(x)) with one of them; None for another."""
    x = _noise(3, WIDTH, seed=2)
    parts = {name: _linear(seed) for seed, name in enumerate(("gate_proj", "up_proj", "down_proj"))}
    act = module._modules["act_fn"]
    assert act is not None
    answer = _twin(module, {}, {**parts, "act_fn": act})(x)
    gate, up, down = parts.values()
    return next((name for name in ACTIVATIONS if _same(answer, down(gated(gate(x), up(x), name)))), None)


def _linear(seed: int) -> nn.Linear:
    linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    linear.weight = nn.Parameter(_noise(WIDTH, WIDTH, seed=seed), requires_grad=False)
    return linear


def _gate(module: nn.Module, choice: str) -> bool:
    name = activation_of(module)
    if name is None:
        return False
    kernel: Binary = liger("mlp").gated[name] if choice == "liger" else lambda a, b: gated(a, b, name)

    def run(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(kernel(self.gate_proj(x), self.up_proj(x)))

    module.forward = MethodType(run, module)  # type: ignore[method-assign]
    return True


# ---- Rotary embeddings --------------------------------------------------------------------------------------------


class _Turned(torch.autograd.Function):
    """x turned by pairs of dimensions half a head apart; Su et al. 2021, arXiv:2104.09864, eq. 34. The gradient turns
    back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned_halves(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned_halves(gradients[0], cos, sin, back=True), None, None


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q and k (B, heads, L, d) turned by their places; cos and sin (B, L, d) whose halves are equal."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)


def turning_of(network: nn.Module) -> Iterator[nn.Module]:
    """Attention layers whose own forward turns q and k by the function of that name in the model's file."""
    for module in network.modules():
        forward = type(module).forward
        if isinstance(forward, FunctionType) and ROTARY in forward.__code__.co_names:
            yield module


def _rotate(module: nn.Module, choice: str) -> bool:
    """Let one module's forward find another function under the name, which the model's file keeps for all others."""
    forward = type(module).forward
    assert isinstance(forward, FunctionType)
    own = vars(sys.modules[type(module).__module__])[ROTARY]
    q, k = _noise(1, 2, 5, 8, seed=0), _noise(1, 1, 5, 8, seed=1)
    angle = _noise(1, 5, 4, seed=2).repeat(1, 1, 2)
    theirs, ours = own(q, k, angle.cos(), angle.sin()), turned(q, k, angle.cos(), angle.sin())
    if not all(_same(a, b) for a, b in zip(theirs, ours, strict=True)):
        return False
    function: Rotary = liger("rotary").turned if choice == "liger" else turned
    names = {**forward.__globals__, ROTARY: function}
    rebound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(rebound, module)  # type: ignore[method-assign]
    return True
