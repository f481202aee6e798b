"""Muon: momentum whose matrices are made orthogonal, here also for convolutions. https://kellerjordan.github.io/posts/muon/

On these small networks it needs a half to a third of AdamW's steps.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, A, B), A <= B, near 1 by five Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, each update of the usual size of AdamW's. Arxiv:2502.16982, eq. 4."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                matrix = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                matrix = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
                alike[tuple(matrix.shape)].append((weight, matrix))
            for shape, pairs in alike.items():
                updates = orthogonal(torch.stack([matrix for _, matrix in pairs])) * 0.2 * max(shape) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    update = update if weight.flatten(1).shape == shape else update.mT
                    weight.sub_(group["lr"] * update.reshape(weight.shape))


class MuonAndAdam:
    """Muon for hidden weights, AdamW for all else: embeddings, norms, biases, first and last layers."""

    def __init__(self, hidden: Iterable[nn.Parameter], other: Iterable[nn.Parameter], decay: float) -> None:
        self.parts = [
            Muon(hidden, lr=0.0),
            torch.optim.AdamW(other, lr=0.0, betas=(0.9, 0.97), weight_decay=decay),
        ]

    def step(self, hidden_lr: float, other_lr: float) -> None:
        for part, lr in zip(self.parts, (hidden_lr, other_lr), strict=True):
            part.param_groups[0]["lr"] = lr
            part.step()

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
