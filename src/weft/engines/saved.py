"""Blocks that run once, and of which autograd keeps what it needs elsewhere than on the device."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from weft.engines.activations import Activations
from weft.engines.streaming import Entrance


class Found(Protocol):
    """What autograd holds in place of a tensor."""

    def back(self) -> Tensor: ...


def keep_elsewhere(block: nn.Module, entrance: Entrance | None, activations: Activations | None) -> None:
    """Replace a block's forward. entrance: its weights pass through a ring, and are looked up there again when the
    backward pass asks for them. activations: take what else it keeps to host memory.

    Of a compiled block this stands around its graphs, which know nothing of it.
    """
    forward: Callable[..., Any] = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if entrance is not None:
            entrance()
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        own = None if activations is None else activations.begin(block, (args, kwargs))

        def pack(tensor: Tensor) -> Tensor | Found:
            found: Found | None = None if entrance is None else entrance.kept(tensor)
            if found is None and activations is not None and own is not None:
                found = activations.kept(own, tensor)
            # The tensor itself may refer to its graph, which then were never freed.
            return tensor.detach() if found is None else found

        with saved_tensors_hooks(pack, found_again):
            output = forward(*args, **kwargs)
        if entrance is not None:
            entrance.expect(output)
        if activations is not None:
            activations.end(output)
        return output

    block.forward = run  # type: ignore[method-assign]


def found_again(kept: Tensor | Found) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.back()
