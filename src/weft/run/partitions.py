"""What compiled blocks keep for their backward pass under each memory budget, told by torch's own partitioner on fake
tensors: the blocks are traced once, and parted anew for every budget that is asked about."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch._functorch.config
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from weft.engines.kept_attention import keep_attention, sizes_of

Parts = tuple[fx.GraphModule, fx.GraphModule]
Ignoring = Callable[[], AbstractContextManager[None]]
# Sums over some numbers, which inductor computes in the loop that makes these.
REDUCTIONS = {"sum", "mean", "var_mean", "var", "amax", "amin"}


class Accounts:
    """A backend for torch.compile under which blocks run as inductor would run them, as far as memory goes, and that
    knows what each of their graphs keeps.

    ignoring: around operators whose answers inductor would never write to memory.
    """

    def __init__(self) -> None:
        self.parted: list[Parted] = []
        self.ignoring: Ignoring = nullcontext

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        own = [isinstance(t, Tensor) and t.requires_grad and not isinstance(t, nn.Parameter) for t in inputs]
        parted = Parted(own)
        self.parted.append(parted)

        def forward(module: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
            return make_boxed_func(parted.counting(self._fused(module)))

        def plain(module: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
            return make_boxed_func(self._fused(module))

        compiled = aot_autograd(
            fw_compiler=forward, bw_compiler=plain, inference_compiler=plain, partition_fn=parted.part,
            decompositions=select_decomp_table(),
        )  # fmt: skip
        return compiled(graph, list(inputs))  # type: ignore[return-value]

    def begin(self) -> None:
        """Count anew how often each graph runs."""
        for parted in self.parted:
            parted.runs = 0

    def _fused(self, module: fx.GraphModule) -> Callable[..., Any]:
        unwritten = unwritten_in(module.graph)

        def run(*args: Any) -> Any:
            return _Fused(module, unwritten, self.ignoring).run(*args)

        return run


@dataclass
class Parted:
    """A graph of forward and backward pass, parted. own: which inputs are a block's own, made by the block before."""

    own: Sequence[bool]
    runs: int = 0  # forward passes whose backward pass is to come
    joint: fx.GraphModule | None = None
    inputs: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    _saved: dict[float, int] = field(default_factory=dict)
    _operations: dict[float, int] = field(default_factory=dict)
    _forward: dict[float, int] = field(default_factory=dict)  # of these, the forward pass's but for its attention

    def part(self, joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        """What torch.compile asks of a partitioner. Torch parts in place, so a copy stays."""
        keep_attention(joint.graph)
        self.joint, self.inputs, self.options = copied(joint), inputs, options
        parts = min_cut_rematerialization_partition(joint, inputs, **options)
        self._note(torch._functorch.config.activation_memory_budget, parts)
        return parts

    def parts(self, budget: float) -> Parts:
        """Forward and backward pass under a memory budget."""
        assert self.joint is not None, "a graph that was traced with a backward pass"
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return min_cut_rematerialization_partition(copied(self.joint), self.inputs, **self.options)

    def _note(self, budget: float, parts: Parts) -> None:
        self._saved[budget] = self._bytes(parts[0])
        self._operations[budget] = sum(operations_of(part.graph) for part in parts)
        forward = [node for node in parts[0].graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self._forward[budget] = sum(_operations(node) for node in forward if not attends_at_all(node))

    def saved(self, budget: float) -> int:
        """Bytes that one forward pass keeps, beside weights and what all blocks are given alike."""
        if budget not in self._saved and self.joint is not None:
            self._note(budget, self.parts(budget))
        return self._saved.get(budget, 0)

    def more(self, budget: float) -> float:
        """Operations of matrix products and attention beyond those that both passes must do, as a share of these."""
        if self.joint is None:
            return 0.0
        self.saved(budget)
        once = operations_of(self.joint.graph)
        return self._operations[budget] / once - 1 if once else 0.0

    def again(self) -> float:
        """Operations of the forward pass but its attention, as a share of those that both passes must do."""
        if self.joint is None:
            return 0.0
        self.saved(1.0)
        once = operations_of(self.joint.graph)
        return self._forward[1.0] / once if once else 0.0

    def counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.runs += 1
            return run(*args)

        return counted

    def _bytes(self, forward: fx.GraphModule) -> int:
        inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
        given = {_storage(node) for node, own in zip(inputs, self.own, strict=False) if not own}
        given |= {_storage(node) for node in inputs[len(self.own) :]}
        answers = forward.graph.output_node().args[0]
        assert isinstance(answers, tuple | list)
        kept = answers[self.options["num_fwd_outputs"] :]
        storages = {key: node.meta["val"].untyped_storage().nbytes()
                    for node in kept if isinstance(node, fx.Node)
                    and (key := _storage(node)) is not None and key not in given}  # fmt: skip
        return sum(storages.values())


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, on the same tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta.update(module.graph.output_node().meta)
    return fx.GraphModule(module, graph)


def _storage(node: fx.Node) -> int | None:
    """Which piece of memory a node's tensor lies in; None: it is no tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


# ---- What is computed ------------------------------------------------------------------------------------------------


def operations_of(graph: fx.Graph) -> int:
    """Additions and multiplications of a graph's matrix products and of its attention, in the example's sizes."""
    return sum(_operations(node) for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def _operations(node: fx.Node) -> int:
    name = node.target._opname  # type: ignore[union-attr]
    if name in ("mm", "bmm"):
        return 2 * prod(sizes_of(node.args[0])) * sizes_of(node.args[1])[-1]
    if name == "addmm":
        return 2 * prod(sizes_of(node.args[1])) * sizes_of(node.args[2])[-1]
    if not attends_at_all(node):
        return 0
    backward = "backward" in name  # its first argument is the gradient; scores are computed once more
    queries, keys = (sizes_of(node.args[number + backward]) for number in (0, 1))
    return (10 if backward else 4) * prod(queries) * keys[-2]


def attends_at_all(node: fx.Node) -> bool:
    """Whether a node is one of torch's attention kernels, there or back."""
    return isinstance(node.target, torch._ops.OpOverload) and "scaled_dot_product" in node.target._opname


# ---- What is never written -----------------------------------------------------------------------------------------


class _Fused(fx.Interpreter):
    """Runs a graph operator by operator, and lets go of each answer after its last use."""

    def __init__(self, module: fx.GraphModule, unwritten: set[fx.Node], ignoring: Ignoring) -> None:
        super().__init__(module)
        self.unwritten, self.ignoring = unwritten, ignoring

    def run_node(self, n: fx.Node) -> Any:
        with self.ignoring() if n in self.unwritten else nullcontext():
            return super().run_node(n)


def unwritten_in(graph: fx.Graph) -> set[fx.Node]:
    """Pointwise operators that are used by others of their kind and by sums alone: one loop computes them together."""
    return {node for node in graph.nodes if _pointwise(node) and all(map(_fuses, _users(node)))}


def _users(node: fx.Node) -> list[fx.Node]:
    """Those that compute with a node's answer, through views of it."""
    return [last for user in node.users for last in (_users(user) if _is_view(user) and user.users else [user])]


def _pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _fuses(node: fx.Node) -> bool:
    target = node.target
    return _pointwise(node) or (isinstance(target, torch._ops.OpOverload) and target._opname in REDUCTIONS)


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
