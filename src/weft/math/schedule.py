"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

import math


def lr_factor(step: int, total: int, warmup: int, curve: str, floor: float) -> float:
    """Share of the learning rate in the optimizer step number `step` (the first is 0) of `total`.

    Linear warm-up over `warmup` steps ends at 1; then constant, linear, or half a cosine, reaching floor at the end.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if curve == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if curve == "linear":
        return 1.0 - (1.0 - floor) * progress
    assert curve == "cosine", f"unknown curve {curve}"
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
