"""The loop: draw micro-batches, sum their gradients, move the optimizers of the phase; all kinds of training run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from weft.contracts import Batch, Engine, Experience, Phase, Stepped
from weft.events import Listener, StepEnded
from weft.math.schedule import lr_factor
from weft.run.config import Schedule
from weft.run.footprint import footprint
from weft.run.learner import Learner
from weft.run.roles import Rate
from weft.run.shortage import naming
from weft.run.stopwatch import Stopwatch


@dataclass(frozen=True)
class Outcome:
    """What one phase did. metrics: means over items and ranks. items: of all ranks. steps: by optimizer."""

    metrics: dict[str, float]
    steps: dict[str, Stepped]
    batches: Sequence[Batch]
    items: int = 0
    stopping: bool = False  # whether any rank was asked to stop when the phase began
    asked: bool = False  # whether commands lay in the inbox then

    @property
    def moved(self) -> bool:
        return all(step.moved for step in self.steps.values())


class Milestones(Protocol):
    """What happens between steps; none of it changes what is learned."""

    def after_step(self, learner: Learner) -> None: ...
    def after_experience(self, learner: Learner) -> None: ...
    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        """A step whose gradient was not finite. Raises RunError when there were too many in a row."""
        ...


class Orders(Protocol):
    """Commands to a running trainer."""

    def waiting(self) -> bool:
        """Whether this rank knows of any; asked in each step."""
        ...

    def obey(self, learner: Learner) -> bool:
        """Do what they say between two steps. Every rank must ask. True when the run is to end."""
        ...


class NoOrders:
    """Nobody commands."""

    def waiting(self) -> bool:
        return False

    def obey(self, learner: Learner) -> bool:
        return False


@dataclass(frozen=True)
class Course:
    """How a run goes: its length and rates, what happens between steps, who hears of it, and what ends it early.

    orders: commands that come while it runs.
    sign: called after each micro-batch, since a step of a large model may take minutes.
    wait: called before the clock is read; set only where exact parts of a step are worth waiting for the device.
    rates: of optimizers whose learning rate moves otherwise than the schedule says.
    """

    schedule: Schedule
    milestones: Milestones
    tell: Listener
    stop: Callable[[], bool] = lambda: False
    orders: Orders = field(default_factory=NoOrders)
    wait: Callable[[], None] | None = None
    rates: Mapping[str, Rate] = field(default_factory=dict)
    sign: Callable[[], None] = lambda: None

    def rate(self, optimizer: str) -> Rate:
        """How an optimizer's learning rate moves."""
        s = self.schedule
        return self.rates.get(optimizer) or Rate(s.curve, s.warmup, s.floor, s.max_norm)


def train(learner: Learner, stream: Sequence[Experience], course: Course) -> bool:
    """Go through the stream's experiences in order, from where the learner stands. False when it was stopped.

    One process stops, and hears commands, before its next step. Of several each may be told to stop at another time,
    and the first alone hears commands, so the word travels with the step's own sums, and all act after that step.
    """
    engine = learner.engine
    for experience in stream:
        if learner.step >= experience.last_step:
            continue
        feed = experience.batches(learner.drawn, engine.data_rank, engine.data_world)
        while learner.step < experience.last_step:
            if engine.world == 1 and ends_here(learner, course, course.stop(), course.orders.waiting()):
                return False
            watch, metrics, keys, items, stopping, asked = Stopwatch(course.wait), {}, [], 0, False, False
            for phase in learner.objective.phases(learner.step, learner.experts):
                outcome = run_phase(phase, learner, feed, course, watch)
                metrics |= outcome.metrics | settle(phase, learner, outcome, course)
                keys.extend(key for batch in outcome.batches for key in batch.keys)
                items += outcome.items
                stopping |= outcome.stopping
                asked |= outcome.asked
            learner.step += 1
            seconds = watch.seconds()
            course.tell(
                StepEnded(
                    step=learner.step, experience=experience.name, metrics=metrics, seconds=seconds, items=items,
                    memory=footprint(engine.device), keys=tuple(keys),
                )
            )  # fmt: skip
            course.milestones.after_step(learner)
            if engine.world > 1 and ends_here(learner, course, stopping, asked):
                return False
        learner.drawn = 0
        course.milestones.after_experience(learner)
    return True


def ends_here(learner: Learner, course: Course, stopping: bool, asked: bool) -> bool:
    """Whether the run ends between these two steps, after what was asked for is done."""
    return stopping or (asked and course.orders.obey(learner))


def run_phase(phase: Phase, learner: Learner, feed: Iterator[Batch], course: Course, watch: Stopwatch) -> Outcome:
    """One backward pass under one role, and the optimizers that it moves."""
    objective, engine, schedule = learner.objective, learner.engine, course.schedule
    set_learning_rates(learner, phase, course)
    batches = [engine.put(next(feed)) for _ in range(schedule.accumulate)]
    learner.drawn += len(batches) * engine.data_world
    watch.lap("data")
    words = [course.stop(), course.orders.waiting()] if engine.world > 1 else [False, False]
    own = torch.tensor([sum(map(objective.count, batches)), *words], device=engine.device)
    items, *heard = engine.total(own).unbind()
    sums: dict[str, Tensor] = {}
    # Backward stays inside the role: there a recomputed block runs its forward a second time.
    with learner.model.adapters.use(phase.role):
        for i, batch in enumerate(batches):
            shape = shape_of(batch)
            with engine.computing(), naming("forward", engine.device, shape):
                rng = learner.rng(phase.name, i, schedule.accumulate)
                loss = objective.loss(phase.name, learner.model, batch, learner.state, rng)
            watch.lap("forward")
            with naming("backward", engine.device, shape):
                engine.backward(loss.total / items, last=i == len(batches) - 1, optimizers=phase.optimizers)
            watch.lap("backward")
            course.sign()
            for name, value in {"loss": loss.total, **loss.metrics}.items():
                sums[name] = sums.get(name, torch.zeros((), device=engine.device)) + value.detach()
    with naming("optimizer", engine.device, shape_of(batches[0])):
        steps = {name: engine.step(learner.optimizers[name], course.rate(name).max_norm) for name in phase.optimizers}
    watch.lap("optimizer")
    totals = engine.total(torch.stack(list(sums.values()))) / items
    means = {f"{phase.name}/{name}": value for name, value in zip(sums, totals.tolist(), strict=True)}
    norms = {f"{name}/grad_norm": step.norm for name, step in steps.items()}
    stopping, asked = in_any_part(engine, torch.stack(heard))  # only now: until here the host may run ahead
    metrics = means | norms | learning_rates(learner, phase)
    return Outcome(metrics, steps, batches, int(items), stopping, asked)


def at_any_rank(engine: Engine, words: Sequence[bool]) -> list[bool]:
    """Whether each word is true on any rank. Every rank must ask."""
    return in_any_part(engine, engine.total(torch.tensor([int(word) for word in words], device=engine.device)))


def in_any_part(engine: Engine, words: Tensor) -> list[bool]:
    """Whether any rank said a word, from sums (n,) over the data ranks: the ranks of a sequence group have sums of
    their own, and must all hear the same."""
    if engine.sequence is not None:
        words = engine.sequence.gather(words[None], 0, engine.sequence.size).sum(0)
    return [word > 0 for word in words.tolist()]


def shape_of(batch: Batch) -> tuple[int, ...] | None:
    """Shape of a batch's latents, blank or not, or of its rows of tokens: what a shortage of memory is told with."""
    main = next((batch.tensors[name] for name in ("latents", "blank", "ids") if name in batch.tensors), None)
    return None if main is None else tuple(main.shape)


def settle(phase: Phase, learner: Learner, outcome: Outcome, course: Course) -> dict[str, float]:
    """After the optimizers: what adapters hold to after a step and the moving average, or the account of a skip."""
    if not outcome.moved:
        learner.skipped_in_a_row += 1
        course.milestones.skipped(learner, phase, outcome)
        return {f"{phase.name}/skipped": 1.0}
    learner.skipped_in_a_row = 0
    logged = learner.model.adapters.after_step(phase.role)
    if phase.role in learner.ema:
        learner.ema[phase.role].update(learner.step + 1, learner.model.adapters.parameters(phase.role))
    return {f"{phase.role}/{name}": value for name, value in logged.items()}


def set_learning_rates(learner: Learner, phase: Phase, course: Course) -> None:
    """Each group's rate from its own base, as a pure function of the step: the phase's own, so that an expert that
    trains in the second half has its warm-up too, and a student that moves now and then its whole curve."""
    done, of = learner.pace.done(phase.name, learner.step), learner.pace.of(phase.name)
    for name in phase.optimizers:
        rate = course.rate(name)
        factor = lr_factor(done, of, rate.warmup, rate.curve, rate.floor)
        groups = learner.optimizers[name].param_groups
        for group in groups:
            top = group["base_lr"]
            if name in learner.rates:  # LoRA+'s ratio between groups stays
                top = learner.rates[name] * (top / groups[0]["base_lr"])
            group["lr"] = top * factor


def learning_rates(learner: Learner, phase: Phase) -> dict[str, float]:
    """`NAME/lr` of each optimizer's first group, and `NAME/lr_2` of a second: with LoRA+ A's and B's."""
    return {
        f"{name}/lr{'' if i == 1 else f'_{i}'}": group["lr"]
        for name in phase.optimizers
        for i, group in enumerate(learner.optimizers[name].param_groups, start=1)
    }
