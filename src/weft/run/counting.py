"""What a stretch of computation asks of any machine: kernels started, bytes moved, bytes kept for the backward pass.

Exact counts, the same on every machine: a dispatch mode sees each aten operation below autograd, on real and on fake
tensors. An operation is one that moves numbers; views and bare allocations are counted apart. Bytes of an operation are
those of its inputs and of its outputs, each once; what is broadcast counts as it lies in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "convolution", "convolution_backward")
ATTENTION = ("attention", "sdpa")  # parts of the names of fused kernels
SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


@dataclass
class Traffic:
    """operations: kernels started. pointwise: bytes moved by all but matrix products and attention, whose own inputs
    and outputs are `products`. syncs: operations that make the host wait for a device. names: how often each was
    started."""

    operations: int = 0
    views: int = 0
    allocations: int = 0
    pointwise: int = 0
    products: int = 0
    syncs: int = 0
    names: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Pass:
    """Of one forward and backward pass. saved: bytes kept in between, each piece of memory once."""

    saved: int
    forward: Traffic
    backward: Traffic


class Counting(TorchDispatchMode):
    """Inside, every operation is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        note(self.traffic, func, args, kwargs or {}, answer)
        return answer


def note(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any], answer: object) -> None:
    """Count one operation."""
    name = func._schema.name.removeprefix("aten::")
    if name.startswith("prim::"):  # questions to fake tensors
        return
    if name in ALLOCATIONS:
        traffic.allocations += 1
        return
    if _is_view(func):
        traffic.views += 1
        return
    traffic.operations += 1
    traffic.names[name] += 1
    traffic.syncs += name in SYNCHRONIZING
    moved = sum(map(lying_bytes, _read(func, args, kwargs))) + sum(map(lying_bytes, _tensors(answer)))
    if name in PRODUCTS or any(part in name for part in ATTENTION):
        traffic.products += moved
    else:
        traffic.pointwise += moved


def counted(run: Callable[[], Any]) -> Traffic:
    """What one call asks of the machine."""
    with Counting() as counting:
        run()
    return counting.traffic


def counted_pass(forward: Callable[[], Tensor], apart: Iterable[Tensor] = ()) -> Pass:
    """Of a forward and a backward pass. apart: tensors that are there in any case and are not counted as kept: weights,
    adapters, conditions. The backward pass begins with random numbers."""
    there = {storage_of(tensor) for tensor in apart}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the end, so that no address is counted twice

    def keep(tensor: Tensor) -> Tensor:
        where = storage_of(tensor)
        if where not in there and where not in saved:
            saved[where] = tensor.untyped_storage().nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Counting() as forth:
        answer = forward()
    kept_bytes = sum(saved.values())
    grad = torch.randn_like(answer)
    with Counting() as back:
        answer.backward(grad)
    return Pass(kept_bytes, forth.traffic, back.traffic)


def in_units(few: Pass, many: Pass, unit: int) -> dict[str, Any]:
    """What two passes of few and of many tokens differ by, as plain data. unit: bytes by which one tensor (N, d) of the
    two differs, so that what does not grow with the tokens falls out."""

    def traffic(one: Traffic, other: Traffic) -> dict[str, Any]:
        return {
            "operations": other.operations, "views": other.views, "allocations": other.allocations,
            "pointwise_nd": round((other.pointwise - one.pointwise) / unit, 2),
            "products_nd": round((other.products - one.products) / unit, 2),
        }  # fmt: skip

    return {
        "saved_nd": round((many.saved - few.saved) / unit, 3),
        "forward": traffic(few.forward, many.forward),
        "backward": traffic(few.backward, many.backward),
    }


def storage_of(tensor: Tensor) -> int:
    """A number that tensors in the same piece of memory share."""
    return tensor.untyped_storage()._cdata


def lying_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor as it lies in memory: an expanded dimension counts once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return numbers * tensor.element_size()


def _is_view(func: Any) -> bool:
    """Whether an operation answers with its input's own memory and writes nothing."""
    arguments, returns = func._schema.arguments, func._schema.returns
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
    aliases = any(r.alias_info is not None for r in returns)
    return (aliases and not writes) or func._schema.name in ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh")


def _read(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors whose numbers an operation reads."""
    overwrites = func._schema.name in ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_")
    for number, argument in enumerate(func._schema.arguments):
        if argument.is_out or (overwrites and number == 0):
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        yield from _tensors(value)


def _tensors(value: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
