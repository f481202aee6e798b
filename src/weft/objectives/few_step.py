"""What methods that distill into a few steps share: the student's own way through its list of times, under gradients
only where it is left.

Letters as in contracts.py. A student's answer is its estimate of the data, x - t v.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.contracts import Batch, Denoise, Expert, Model, Rng
from weft.few_steps import StepList
from weft.math.chance import generator
from weft.math.dmd import guided
from weft.math.flow import denoised, noised

BESIDE = "/"  # stands in names of a batch's tensors that belong to a text beside the captions: negative/text


def part_of(part: str, expert: Expert | str) -> str:
    """The name of a role on an expert's network: student, or student_high."""
    name = expert if isinstance(expert, str) else expert.name
    return part if name == "default" else f"{part}_{name}"


@dataclass(frozen=True)
class Scene:
    """What all questions about one batch share. like: (B, C, F, H, W), real latents, or zeros whose shape alone counts.

    given: (B, F) bool, frames that are known and stay as they are in like. negative: conditions of the other prompt.
    """

    like: Tensor
    cond: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]
    given: Tensor | None
    expert: str

    def noise(self, rng: Rng) -> Tensor:
        return torch.randn(self.like.shape, generator=rng.own, device=self.like.device)

    def clean(self, x: Tensor) -> Tensor:
        """x with the given frames as they are known."""
        return x if self.given is None else torch.where(self.given[:, None, :, None, None], self.like, x)

    def noised(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.clean(noised(data, noise, t))

    def at(self, time: float) -> Tensor:
        """(B,) fp32."""
        return torch.full((len(self.like),), time, device=self.like.device)


def scene_of(batch: Batch, expert: str, given: Tensor | None) -> Scene:
    """The questions that a batch asks for."""
    tensors = batch.tensors
    like = tensors["latents"] if "latents" in tensors else tensors["blank"]
    cond = {name: t for name, t in tensors.items() if name not in ("latents", "blank") and BESIDE not in name}
    beside = {name.removeprefix("negative/"): t for name, t in tensors.items() if name.startswith("negative/")}
    negative = {name: t.expand(len(like), *t.shape[1:]) for name, t in beside.items()}
    # Of another length than the captions; what is not of text stays as it is.
    return Scene(like, cond, {**cond, **negative}, given, expert)


def given_first(batch: Batch, share: float, phase: str, rng: Rng) -> Tensor | None:
    """(B, F) bool: the first latent frame of so large a share of the clips; None when it is nobody's."""
    if not share or "latents" not in batch.tensors:
        return None
    latents = batch["latents"]
    # On the host, for a question without a given frame is another, cheaper call.
    chosen = torch.rand(len(latents), generator=generator("cpu", rng.seed, "first frame", phase, rng.draw)) < share
    if not bool(chosen.any()):
        return None
    return (chosen[:, None] & (torch.arange(latents.shape[2]) == 0)).to(latents.device)


def estimate(
    model: Model, scene: Scene, x: Tensor, t: Tensor, role: str | None, *, guidance: float = 1.0,
    expert: str | None = None, told: Mapping[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """What a role takes x (B, C, F, H, W) at t (B,) for: its estimate of the data, fp32, given frames as they are.

    guidance: u + g (c - u); 1 asks once. told: further conditions.
    """

    def velocity(cond: Mapping[str, Tensor]) -> Tensor:
        asked = Denoise(x, t, {**cond, **(told or {})}, scene.given, expert or scene.expert)
        return model.velocity(asked).float()

    with model.adapters.use(role):
        v = velocity(scene.cond)
        if guidance != 1:
            v = guided(v, velocity(scene.negative), guidance)
    return scene.clean(denoised(x, t, v))


@dataclass(frozen=True)
class Rollout:
    """How a student comes to its later steps. first: the step that it begins at, from noise when that is step 0, else
    from noised data. students: the role that is asked at each step, with its expert. data: every step begins from
    noised data instead.
    """

    steps: StepList
    first: int
    exits: tuple[int, ...]
    students: tuple[tuple[str, str], ...]
    data: bool = False

    def exit(self, rng: Rng, phase: str) -> int:
        """At which step it is left: each of the exits once in a row of steps, in an order that is drawn anew, and on
        all ranks the same."""
        cycle, place = divmod(rng.done, len(self.exits))
        order = torch.randperm(len(self.exits), generator=generator("cpu", rng.seed, "exits", phase, cycle))
        return self.exits[int(order[place])]

    def run(self, model: Model, scene: Scene, exit: int, rng: Rng, *, learn: bool) -> Tensor:
        """The student's estimate of the data (B, C, F, H, W) where it is left; with a graph of that step when it is to
        learn. The steps before it have none."""
        start = exit if self.data else self.first
        x = scene.noised(scene.like, scene.noise(rng), scene.at(self.steps.times[start]))
        for number in range(start, exit + 1):
            role, expert = self.students[number]
            with nullcontext() if learn and number == exit else torch.no_grad():
                made = estimate(model, scene, x, scene.at(self.steps.times[number]), role, expert=expert)
            if number < exit:
                x = scene.noised(made, scene.noise(rng), scene.at(self.steps.times[number + 1]))
        return made


def rollout_of(
    steps: StepList, expert: Expert, trained: Sequence[Expert], everyone: Sequence[Expert], data: bool
) -> Rollout:
    """The way of an expert's student. It begins at noise where every expert before it has a student, else at its own
    first step: no network is asked at times that are another's."""
    asked = [next(e for e in everyone if t >= e.times[0]) for t in steps.times]
    own = tuple(i for i, e in enumerate(asked) if e.name == expert.name)
    known = {e.name for e in trained}
    led = bool(own) and all(e.name in known for e in asked[: own[0]])
    students = tuple((part_of("student", e), e.name) for e in asked)
    return Rollout(steps, 0 if led else (own[0] if own else 0), own, students, data)
