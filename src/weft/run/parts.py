"""The trained parts of a run, before a weight is read: on which layers each stands, how large it is, when it moves."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from weft.adapters.targets import TargetReport
from weft.contracts import Distilled, as_video
from weft.run.assemble import target_report, trained_numbers
from weft.run.config import RunConfig


@dataclass(frozen=True)
class Part:
    """One role. recipe: its adapter in words. lr: at the top of its curve. steps: how many of the run's move it.
    every: at every so-many-th of its expert's own steps."""

    role: str
    recipe: str
    targets: TargetReport
    parameters: int
    lr: float
    steps: int
    every: int

    def line(self) -> str:
        """student: LoRA scale 1 (rank 64), lr 2e-06, every 5th step, 200 steps"""
        when = "every step" if self.every == 1 else f"every {ordinal(self.every)} step"
        return f"{self.role}: {self.recipe}, lr {self.lr:g}, {when}, {self.steps:,} steps"


def parts_of(config: RunConfig, skeleton: nn.Module) -> tuple[Part, ...]:
    """The parts of all experts in their order. skeleton: the network of any of them, without weights."""
    moves = moves_of(config)
    parts = []
    for expert in config.family.experts:
        roles = config.objective.roles((expert,))
        own = {step: i for i, step in enumerate(sorted({step for role in roles for step in moves.get(role, [])}))}
        for role in roles:
            recipe, targets, steps = config.adapter_of(role), target_report(config, skeleton, role), moves.get(role, [])
            every = min((own[later] - own[earlier] for earlier, later in pairwise(steps)), default=len(own))
            lr = config.optimizer_of(role).lr
            numbers = trained_numbers(config, skeleton, role)
            parts.append(Part(role, recipe.summary(), targets, numbers, lr, len(steps), every))
    return tuple(parts)


def moves_of(config: RunConfig) -> dict[str, list[int]]:
    """The steps of the run at which each role moves; a role that never does is missing."""
    found: dict[str, list[int]] = defaultdict(list)
    for step in range(config.schedule.steps):
        for phase in config.objective.phases(step, config.family.experts):
            found[phase.role].append(step)
    return dict(found)


def trained_of(config: RunConfig) -> dict[str, int]:
    """Parameters of each role that a run trains."""
    skeleton = config.family.skeleton()
    return {role: trained_numbers(config, skeleton, role) for role in config.objective.roles(config.family.experts)}


def base_bytes(config: RunConfig, precision: str) -> int:
    """Of the frozen weights of all experts, each once."""
    return len(config.family.experts) * sum(config.family.weight_bytes(precision).values())


def distilled(config: RunConfig) -> list[str]:
    """The student's way in words, and what its teacher is asked with; nothing for other objectives."""
    objective, family = config.objective, config.family
    if not isinstance(objective, Distilled):
        return []
    steps, model = objective.step_list(family), as_video(family).flow_shift
    own = "the model's own" if steps.shift == model else f"the model's own is {model:g}"
    times = ", ".join(f"{time:.4g}" for time in steps.times)
    way = f"Steps of the student: {times} (shift {steps.shift:g}, {own})"
    return [f"{way}; {objective.teaching}"]


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"
