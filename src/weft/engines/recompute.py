"""Blocks that keep only their inputs, and run again in the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import nn
from torch.utils.checkpoint import checkpoint

from weft.engines.offload import Inputs


class Entrance(Protocol):
    """Called before each run of a block; `again` surrounds its second run."""

    def __call__(self) -> None: ...
    def again(self) -> AbstractContextManager[None]: ...


def recompute(block: nn.Module, entrance: Entrance | None, inputs: Inputs | None) -> None:
    """Replace a block's forward. inputs: keeps what it is given elsewhere than on the device."""
    forward: Callable[..., Any] = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if entrance is not None:
            entrance()
        return forward(*args, **kwargs)

    # torch.compile takes no such contexts of ours, so they are not named where there are none.
    around = {} if entrance is None else {"context_fn": lambda: (nullcontext(), entrance.again())}

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        # Not reentrant: a frozen base gives inputs without gradients, and reentrant recomputation would then return
        # no gradient to the adapters, silently.
        with nullcontext() if inputs is None else inputs.around():
            output = checkpoint(run, *args, use_reentrant=False, **around, **kwargs)
        if inputs is not None:
            inputs.note(output)
        return output

    block.forward = recomputed  # type: ignore[method-assign]
