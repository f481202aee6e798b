"""When mathematics is written out for autograd or a compiler to follow, and when gradients are our own."""

import torch
from torch import Tensor

COMPILED = "weft_compiled"  # attribute of a block that is compiled
RECOMPUTED = "weft_recomputed"  # attribute of a block that runs again in its backward pass, all of it


def is_followed() -> bool:
    """Whether autograd or a compiler follows plain operations here. Inside an autograd.Function nobody does, nor in
    evaluation."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def must_be_followed(*tensors: Tensor | None) -> bool:
    """Whether own gradients will not do: a compiler fuses better by itself, and of these tensors they know nothing,
    should one of them want a gradient."""
    return torch.compiler.is_compiling() or any(t is not None and t.requires_grad for t in tensors)
