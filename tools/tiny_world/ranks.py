"""Training on several processes of one thread each, which two cores do faster than one process of two threads."""

import os

import torch
from torch import distributed, nn


class Ranks:
    """The processes that torchrun started, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        torch.set_num_threads(1 if "RANK" in os.environ else 2)
        if self.world > 1:
            distributed.init_process_group("gloo")

    def agreed(self, progress: float) -> float:
        """The farthest progress of all ranks, so that clocks a little apart do not end one training early."""
        farthest = torch.tensor(progress, dtype=torch.float64)
        if self.world > 1:
            distributed.all_reduce(farthest, distributed.ReduceOp.MAX)
        return float(farthest)

    def mean_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over ranks; one that is missing counts as zeros."""
        if self.world == 1:
            return
        parameters = list(model.parameters())
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        distributed.all_reduce(flat)
        flat /= self.world
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
