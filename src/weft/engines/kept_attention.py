"""Which attention of a graph is kept for the backward pass, whatever a memory budget says: all that costs much."""

from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.checkpoint import CheckpointPolicy

from weft.engines.recompute import OF_FLASH, attends


def keep_attention(graph: fx.Graph) -> None:
    """Mark what torch's partitioner must not compute again while it may keep anything. By itself it takes the CPU's
    attention and cuDNN's for cheap, and puts no price on them."""
    for node in graph.nodes:
        if _attends(node) and is_dear(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _attends(node: fx.Node) -> bool:
    if isinstance(node.target, HigherOrderOperator):
        return node.target.name() == "flex_attention"
    return isinstance(node.target, OpOverload) and attends(node.target)


def is_dear(node: fx.Node) -> bool:
    """Whether attention to M keys costs more than a product by a (d, d) matrix: 4 N M d against 2 N d d operations.
    Tokens that attend to each other always do so for what is kept; what attends to a few of text does not."""
    queries, keys = (sizes_of(node.args[number]) for number in (0, 1))
    tokens, heads = (-3, -2) if isinstance(node.target, OpOverload) and _is_flash(node.target) else (-2, -3)
    width = queries[heads] * queries[-1]
    return keys[tokens] >= queries[tokens] or 2 * keys[tokens] > width


def _is_flash(operator: OpOverload) -> bool:
    """Whether heads lie behind tokens, as in the kernels that flash-attn brings, and in torch's own of that layout."""
    name = operator.name()
    return name.startswith(OF_FLASH) or name in BEHIND


BEHIND = frozenset({"aten::_flash_attention_forward", "aten::_efficient_attention_forward"})


def sizes_of(value: Any) -> list[int]:
    """Sizes as they are in the example that is traced; a number of tokens may be any, and no guard is set on it."""
    assert isinstance(value, fx.Node)
    tensor = value.meta["val"]
    assert isinstance(tensor, Tensor)
    return [size if isinstance(size, int) else size.node.hint for size in tensor.shape]
