"""Blocks that run again in the backward pass: all of each, or all but its attention."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from weft.engines.offload import Inputs
from weft.math.traced import RECOMPUTED

Recompute = bool | Literal["selective"]
# Operators of torch that attend by one kernel, on every device; flash-attn's own have a namespace for themselves.
ATTENTION = frozenset(
    f"aten::{name}"
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention.quantized", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps", "_flash_attention_forward", "_efficient_attention_forward",
        "_cudnn_attention_forward",
    )
)  # fmt: skip
OF_FLASH = ("flash_attn::", "flash_attn_2::", "flash_attn_3::")


class Entrance(Protocol):
    """Called before each run of a block; `again` surrounds its second run."""

    def __call__(self) -> None: ...
    def again(self) -> AbstractContextManager[None]: ...


def recompute(block: nn.Module, entrance: Entrance | None, inputs: Inputs | None, kind: Recompute = True) -> None:
    """Replace a block's forward. inputs: keeps what it is given elsewhere than on the device. kind "selective": what
    attention answered is kept beside the input, and not computed again: of all that a block does it costs the most
    time for the memory that it takes."""
    forward: Callable[..., Any] = block.forward
    setattr(block, RECOMPUTED, kind is True)

    @contextmanager
    def again(kept: "Kept | None") -> Iterator[None]:
        with nullcontext() if entrance is None else entrance.again():
            if entrance is not None:
                entrance()
            with nullcontext() if kept is None else Repeating(kept):
                yield

    def around() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        kept = Kept() if kind == "selective" else None
        return nullcontext() if kept is None else Keeping(kept), again(kept)

    # torch.compile takes no such contexts of ours, so they are not named where there are none.
    contexts = {} if entrance is None and kind != "selective" else {"context_fn": around}

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if entrance is not None:
            entrance()
        if inputs is not None:
            inputs.take(args)
        # Not reentrant: a frozen base gives inputs without gradients, and reentrant recomputation would then return
        # no gradient to the adapters, silently.
        with nullcontext() if inputs is None else inputs.around():
            output = checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)
        if inputs is not None:
            inputs.note(output)
        return output

    block.forward = recomputed  # type: ignore[method-assign]


# ---- Selective -----------------------------------------------------------------------------------------------------
# torch.utils.checkpoint has modes for this, which insist that the second run calls exactly the operators of the first.
# It does not: under autocast a weight that was cast for an earlier question of the step is not cast again.

Kept = deque[Any]  # what attention answered in a block, in its order


class Attending(TorchDispatchMode):
    """Sees the operators of one run of a block."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """An attention that is compiled by itself is compiled here too; it is not kept."""
        return True


class Keeping(Attending):
    """The first run: keeps what attention answers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if attends(func):
            self.kept.append(tree_map_only(Tensor, Tensor.detach, answer))
        return answer


class Repeating(Attending):
    """The second run: answers with what was kept, each once. A third run of a graph that is retained computes it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.kept and attends(func):
            return self.kept.popleft()
        return func(*args, **(kwargs or {}))


def attends(operator: Any) -> bool:
    """Whether an operator is attention's forward pass by one kernel."""
    name: str = operator.name()
    return name in ATTENTION or (name.startswith(OF_FLASH) and "backward" not in name and "bwd" not in name)
