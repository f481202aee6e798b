"""How far a time-boxed training is, what its learning rate is, and its averaged weights."""

import math
import time
from pathlib import Path

import torch
from torch import nn


class Budget:
    """A training's end: after `steps` steps or `minutes` minutes, whichever comes first, over all resumptions."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.seconds = steps, 60 * minutes
        self.step, self.spent, self._since = 0, 0.0, time.monotonic()

    def elapsed(self) -> float:
        return self.spent + time.monotonic() - self._since  # seconds

    def progress(self) -> float:
        """The share done, in [0, 1]."""
        return min(1.0, max(self.step / self.steps, self.elapsed() / self.seconds))

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "spent": self.elapsed()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.spent, self._since = int(state["step"]), state["spent"], time.monotonic()


def learning_rate(peak: float, step: int, progress: float, warmup: int = 50) -> float:
    """A linear warm-up in steps, then half a cosine over the progress down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * cosine


class Average:
    """An exponential moving average of the weights, short at first so that early exports are of use."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.updates, self.weights = state["updates"], state["weights"]


def save_whole(state: object, path: Path) -> None:
    """Write a state so that a killed run leaves the old file or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
