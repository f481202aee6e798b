"""Plain LoRAs of one role on linear layers, multiplied by `math/products.py` in place of a backend's own arithmetic."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from weft.math.products import products
from weft.projection import FORWARD, LowRank, projection

ALIGNED = 8  # numbers; where a matrix begins in half precision, as tensor cores like it
PLAIN = (nn.Parameter, FakeTensor)  # a parameter that is fake, as in rehearsals, has its type from what it holds


@dataclass
class InUse:
    """Which adapter answers; one object shared by all layers, so that a switch costs nothing."""

    name: str | None = None


class Factors(Protocol):
    """A and B of one plain LoRA on one layer."""

    narrow: "Narrow | None"

    @property
    def strength(self) -> "Strength": ...
    def pair(self) -> tuple[Tensor, Tensor]:
        """As they are at the moment: engines, and La-MAML's fast weights, put others in their places."""
        ...


class Narrow:
    """Copies of a pair in half precision."""

    def __init__(self, a: Tensor, b: Tensor, copies: tuple[Tensor, Tensor]) -> None:
        self.of, self.versions, self.copies = (a, b), (a._version, b._version), copies

    def are_of(self, a: Tensor, b: Tensor) -> bool:
        """Whether they are still those of this pair."""
        return self.of[0] is a and self.of[1] is b and self.versions == (a._version, b._version)


class Strength:
    """The scale of one LoRA: a number, and while torch compiles a tensor, so that another scale is no other graph."""

    def __init__(self, number: float) -> None:
        self.tensor = torch.tensor(number, dtype=torch.float32, device="cpu")
        self.number = number

    def set(self, number: float) -> None:
        self.number = number
        self.tensor.fill_(number)

    def to(self, device: torch.device) -> None:
        if self.tensor.device != device and device.type != "meta":
            self.tensor = torch.tensor(self.number, dtype=torch.float32, device=device)


def told(factors: Factors) -> LowRank:
    """What a plain LoRA adds at the moment."""
    (a, b), strength = factors.pair(), factors.strength
    if torch.compiler.is_compiling():
        return LowRank(a, b, strength.tensor)
    narrow = factors.narrow
    copies = narrow.copies if narrow is not None and narrow.are_of(a, b) else None
    return LowRank(a, b, strength.number, copies)


class NarrowCopies:
    """Copies of all the pairs of one role in half precision, made anew whenever a network is asked under autocast.

    So there is one cast of them all for a question in place of two for each product. It does not rest on the tensors'
    version counters alone: torch's fused optimizers, FSDP2's gathering and CUDA graphs that are replayed change weights
    without counting.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.layout: tuple[Any, ...] = ()
        self.written: list[Tensor] = []
        self.read: list[Tensor] = []

    @torch.no_grad()
    def renew(self, factors: Sequence[Factors]) -> None:
        """Bring the copies up to date; what is sharded, or a fast weight, has none."""
        device = factors[0].pair()[0].device
        if factors[0].strength.tensor.device != device:
            for each in factors:
                each.strength.to(device)
        if not torch.is_autocast_enabled(device.type):
            return
        dtype, pairs, owners = torch.get_autocast_dtype(device.type), [], []
        for each in factors:
            each.narrow = None
            a, b = each.pair()
            if type(a) in PLAIN and type(b) in PLAIN:
                pairs.append((a, b))
                owners.append(each)
        if not pairs:
            return
        tensors = [a for a, _ in pairs] + [b for _, b in pairs]  # A of q, k and v come to lie next to each other
        layout = (dtype, tensors[0].device, *[t.shape for t in tensors])
        if layout != self.layout:
            self._make_room(tensors, dtype)
            self.layout = layout
        torch._foreach_copy_(self.written, tensors)
        for number, (owner, (a, b)) in enumerate(zip(owners, pairs, strict=True)):
            owner.narrow = Narrow(a, b, (self.read[number], self.read[len(pairs) + number]))

    def _make_room(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        begins, numbers = [], 0
        for tensor in tensors:
            begins.append(numbers)
            numbers += -(-tensor.numel() // ALIGNED) * ALIGNED
        memory = torch.empty(numbers, dtype=dtype, device=tensors[0].device)
        self.memory = memory
        self.written = _views(memory, begins, tensors)
        # With a version counter of their own: a graph that waits has kept them, and finds the same numbers there.
        self.read = _views(memory.data, begins, tensors)


def _views(memory: Tensor, begins: Iterable[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [
        memory[begin : begin + tensor.numel()].view(tensor.shape)
        for begin, tensor in zip(begins, tensors, strict=True)
    ]  # fmt: skip


def fuse(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """Let a module answer by another forward; its hooks stay."""
    module.__dict__["forward"] = forward
    module.__dict__[FORWARD] = forward


def fused(module: nn.Module, x: Tensor) -> tuple[Tensor | None, bool]:
    """A layer's answer (..., out) under the LoRA in use; None where the frozen layer is to be asked. Whether that, and
    nothing else, is the answer then."""
    known = projection(module)
    if known.kernel is None or known.change is None:
        return None, known.kernel is not None
    (answer,) = products(x, (known,))
    return answer, True


def met(x: Tensor, weight: Tensor) -> Tensor:
    """x as an adapter's weight multiplies it. Autocast makes its own cast; without it, a bf16 base meets fp32 here."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def added(x: Tensor, output: Tensor, change: LowRank) -> Tensor:
    """A layer's output (..., out) to x and the change, for layers that do not tell what they multiply with."""
    u = functional.linear(met(x, change.a), change.a) * change.scale
    return (output + functional.linear(u, change.b)).to(output.dtype)
