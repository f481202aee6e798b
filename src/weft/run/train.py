"""The loop: draw micro-batches, sum their gradients, move the optimizers of the phase; all kinds of training run it.

It waits for nobody: what a step's numbers are, the host reads when the device has the next step to do (`late.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from weft.contracts import Batch, Drawn, Engine, Experience, Loss, Phase, Rng
from weft.engines.graphs import Graphs
from weft.events import Listener, Notice
from weft.math.schedule import lr_factor
from weft.math.sending import sent
from weft.run.config import Schedule
from weft.run.footprint import footprint
from weft.run.late import Journal, Launched, LaunchedStep, Milestones, Outcome, Sent
from weft.run.learner import Learner
from weft.run.roles import Rate
from weft.run.shortage import naming
from weft.run.stopwatch import Stopwatch, Unmeasured

__all__ = ["Course", "Milestones", "NoOrders", "Orders", "Outcome", "at_any_rank", "train"]
Name = tuple[str, str]  # of a number: what it is of (metrics, moved), and which
Values = dict[Name, Tensor]
Feed = Iterator[tuple[Batch, int]]  # batches on the device, and the items in each


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
    graphs: records the work of a phase and replays it; None: each operator is launched anew.
    depth: steps that are launched before the first of them is told; None: as suits the device.
    before: called with the micro-batches of each phase before they are asked; it may ask them itself.
    noted: called with the shape and the loss of each micro-batch that is asked here, before its backward pass.
    """

    schedule: Schedule
    milestones: Milestones
    tell: Listener
    stop: Callable[[], bool] = lambda: False
    orders: Orders = field(default_factory=NoOrders)
    wait: Callable[[], None] | None = None
    rates: Mapping[str, Rate] = field(default_factory=dict)
    sign: Callable[[], None] = lambda: None
    graphs: Graphs | None = None
    depth: int | None = None
    before: Callable[[Phase, Learner, Sequence[Batch]], None] = lambda phase, learner, batches: None
    noted: Callable[[tuple[int, ...] | None, Tensor], None] = lambda shape, loss: None

    def lag(self, device: torch.device) -> int:
        """How many steps are under way while the host goes on: one on a GPU, which works by itself, else none."""
        if self.depth is not None:
            return self.depth
        return 1 if device.type == "cuda" and self.wait is None else 0

    def rate(self, optimizer: str) -> Rate:
        """How an optimizer's learning rate moves."""
        s = self.schedule
        return self.rates.get(optimizer) or Rate(s.curve, s.warmup, s.floor, s.max_norm)


def train(learner: Learner, stream: Sequence[Experience], course: Course) -> bool:
    """Go through the stream's experiences in order, from where the learner stands. False when it was stopped.

    One process stops, and hears commands, before its next step. Of several each may be told to stop at another time,
    and the first alone hears commands, so the word travels with the step's own sums. All act after the step that it
    came with; where steps are told late, after the next one.
    """
    engine = learner.engine
    journal = Journal(learner, course.milestones, course.tell, course.lag(engine.device))
    begins = 0
    for experience in stream:
        if learner.step == begins > 0 and course.schedule.reset_optimizer:
            forget_moments(learner)
            course.tell(Notice(text=f"{experience.name}: the optimizers begin anew"))
        begins = experience.last_step
        if learner.step >= experience.last_step:
            continue
        read = experience.batches(learner.drawn, engine.data_rank, engine.data_world)
        # Of text items are counted by the labels, while these are still on the host.
        feed = engine.feeding(read, learner.objective.count)
        while learner.step < experience.last_step:
            if engine.world == 1:
                stopping, asked = course.stop(), course.orders.waiting()
                if stopping or asked:
                    journal.settle()
                if ends_here(learner, course, stopping, asked):
                    return False
            with journal.told_first():
                step = run_step(learner, experience.name, feed, course)
            journal.add(step)
            if learner.step >= experience.last_step or course.milestones.is_due(learner):
                journal.settle()
            stopping, asked = journal.words()
            if learner.step >= experience.last_step:
                learner.drawn = 0  # the next stretch is drawn from its own start, also by a run that resumes here
            course.milestones.after_step(learner)
            if engine.world > 1 and ends_here(learner, course, stopping, asked):
                return False
        course.milestones.after_experience(learner)
    return True


def forget_moments(learner: Learner) -> None:
    """Make the optimizers what they were before their first step; rates and groups stay."""
    learner.hold()
    for optimizer in learner.optimizers.values():
        optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})


def ends_here(learner: Learner, course: Course, stopping: bool, asked: bool) -> bool:
    """Whether the run ends between these two steps, after what was asked for is done."""
    return stopping or (asked and course.orders.obey(learner))


def run_step(learner: Learner, experience: str, feed: Feed, course: Course) -> LaunchedStep:
    """Launch all phases of a step, and send its numbers off."""
    device, watch = learner.engine.device, Stopwatch(course.wait, learner.engine.device)
    phases = [
        run_phase(phase, learner, feed, course, watch)
        for phase in learner.objective.phases(learner.step, learner.experts)
    ]
    learner.step += 1
    watch.stop()
    numbers = {(i, name): value for i, phase in enumerate(phases) for name, value in phase.numbers().items()}
    return LaunchedStep(learner.step, experience, phases, watch, footprint(device), Sent(numbers, device))


def run_phase(phase: Phase, learner: Learner, feed: Feed, course: Course, watch: Stopwatch) -> Launched:
    """One backward pass under one role, and the optimizers that it moves. Nothing here waits for the device."""
    engine = learner.engine
    rates = set_learning_rates(learner, phase, course)
    drawn = [next(feed) for _ in range(course.schedule.accumulate)]
    batches, count = [batch for batch, _ in drawn], sum(own for _, own in drawn)
    learner.drawn += len(batches) * engine.data_world
    watch.lap("data")
    course.before(phase, learner, batches)
    items, words = shared(engine, count, course)
    scaled = False
    if course.graphs is not None and isinstance(learner.objective, Drawn):
        values = replayed(phase, learner, course, batches, items)
        watch.lap("graph")
        course.sign()
    else:
        values, scaled = computed(phase, learner, course, asked_of(phase, learner, batches), items, watch)
    after = settled(phase, learner, values)
    metrics = {name: value for (of, name), value in values.items() if of == "metrics"} | rates
    moved = {name: value for (of, name), value in values.items() if of == "moved"}
    return Launched(
        phase, batches, learner.step + 1, learner.drawn, metrics, moved, after,
        items if engine.world > 1 else count, *words, scaled=scaled,
    )  # fmt: skip


Ask = tuple[Callable[[], Loss], tuple[int, ...] | None]  # a micro-batch's loss, and the shape that it is told by


def computed(
    phase: Phase, learner: Learner, course: Course, asks: Sequence[Ask], items: Tensor, watch: Stopwatch
) -> tuple[Values, bool]:
    """Forward, backward and optimizers of a phase: its numbers, and whether a loss scale was at work."""
    engine, sums = learner.engine, dict[str, Tensor]()
    # Backward stays inside the role: there a recomputed block runs its forward a second time.
    with learner.model.adapters.use(phase.role):
        for i, (ask, shape) in enumerate(asks):
            with engine.computing(), naming("forward", engine.device, shape):
                loss = ask()
            course.noted(shape, loss.total)
            watch.lap("forward")
            with naming("backward", engine.device, shape):
                engine.backward(loss.total / items, last=i == len(asks) - 1, optimizers=phase.optimizers)
            watch.lap("backward")
            course.sign()
            for name, value in {"loss": loss.total, **loss.metrics}.items():
                number = value.detach().float()
                sums[name] = sums[name] + number if name in sums else number
    learner.hold()
    with naming("optimizer", engine.device, asks[0][1]):
        steps = {name: engine.step(learner.optimizers[name], course.rate(name).max_norm) for name in phase.optimizers}
    watch.lap("optimizer")
    totals = engine.total(torch.stack(list(sums.values()))) / items
    values: Values = {
        ("metrics", f"{phase.name}/{name}"): total for name, total in zip(sums, totals.unbind(), strict=True)
    }
    values |= {("metrics", f"{name}/grad_norm"): step.norm for name, step in steps.items()}
    values |= {("moved", name): step.moved for name, step in steps.items()}
    return values, any(step.scaled for step in steps.values())


def asked_of(phase: Phase, learner: Learner, batches: Sequence[Batch]) -> list[Ask]:
    """What makes the loss of each micro-batch, its chance drawn on the way."""

    def ask(number: int, batch: Batch) -> Loss:
        rng = learner.rng(phase.name, number, len(batches))
        return learner.objective.loss(phase.name, learner.model, batch, learner.state, rng)

    return [(partial(ask, i, batch), shape_of(batch)) for i, batch in enumerate(batches)]


def replayed(phase: Phase, learner: Learner, course: Course, batches: Sequence[Batch], items: Tensor) -> Values:
    """The same from a recording. Chance is drawn before, by the generators that would draw it on the way."""
    objective, graphs = learner.objective, course.graphs
    assert isinstance(objective, Drawn) and graphs is not None
    given: dict[tuple[int, str, str], Tensor] = {(0, "items", ""): items}
    for i, batch in enumerate(batches):
        rng: Rng = learner.rng(phase.name, i, len(batches))
        given |= {(i, "batch", name): tensor for name, tensor in batch.tensors.items()}
        drawn = objective.draws(phase.name, learner.model, batch, rng)
        given |= {(i, "drawn", name): tensor for name, tensor in drawn.items()}

    def work(at: Mapping[tuple[int, str, str], Tensor]) -> Values:
        def ask(number: int, batch: Batch) -> Loss:
            of: Mapping[str, dict[str, Tensor]] = {"batch": {}, "drawn": {}, "items": {}}
            for (place, kind, name), tensor in at.items():
                if place == number:
                    of[kind][name] = tensor
            return objective.loss_of(phase.name, learner.model, Batch(of["batch"], batch.keys), of["drawn"])

        asks = [(partial(ask, i, batch), shape_of(batch)) for i, batch in enumerate(batches)]
        return computed(phase, learner, course, asks, at[0, "items", ""], Unmeasured())[0]

    learner.hold()  # what is replayed moves weights too
    shapes = " and ".join(sorted({str(shape_of(batch)) for batch in batches}))
    return graphs.run(f"{phase.name} at {shapes}", given, [learner.optimizers[name] for name in phase.optimizers], work)


def shared(engine: Engine, count: int, course: Course) -> tuple[Tensor, tuple[Tensor | float, Tensor | float]]:
    """Items () of all ranks, and whether any of them was asked to stop or knows of commands."""
    if engine.world == 1:  # it hears such words between the steps
        return torch.full((), count, device=engine.device), (0.0, 0.0)
    own = sent(torch.tensor([count, course.stop(), course.orders.waiting()]), engine.device)
    items, *heard = engine.total(own).unbind()
    stopping, asked = in_any_part(engine, torch.stack(heard)).unbind()
    return items, (stopping, asked)


def at_any_rank(engine: Engine, words: Sequence[bool]) -> list[bool]:
    """Whether each word is true on any rank. Every rank must ask, and waits for the answer."""
    own = torch.tensor([int(word) for word in words], device=engine.device)
    return [word > 0 for word in in_any_part(engine, engine.total(own)).tolist()]


def in_any_part(engine: Engine, words: Tensor) -> Tensor:
    """How many ranks said each word (n,), from sums over the data ranks: the ranks of a sequence group have sums of
    their own, and must all hear the same."""
    if engine.sequence is None:
        return words
    return engine.sequence.gather(words[None], 0, engine.sequence.size).sum(0)


def shape_of(batch: Batch) -> tuple[int, ...] | None:
    """Shape of a batch's latents, blank or not, or of its rows of tokens: what a shortage of memory is told with."""
    main = next((batch.tensors[name] for name in ("latents", "blank", "ids") if name in batch.tensors), None)
    return None if main is None else tuple(main.shape)


def settled(phase: Phase, learner: Learner, values: Values) -> Mapping[str, Tensor | float]:
    """After the optimizers: what adapters hold to after a step, and the moving average. A step that was skipped changes
    neither; whether it was, the device alone knows by now."""
    adapters = learner.model.adapters
    every = [moved for (of, _), moved in values.items() if of == "moved"]
    moved = every[0] if len(every) == 1 else torch.stack(every).all()
    logged = adapters.after_step(phase.role, moved)
    if phase.role in learner.ema:
        learner.ema[phase.role].update(learner.step + 1, learner.parameters(phase.role), moved)
    return {f"{phase.role}/{name}": value for name, value in logged.items()}


def set_learning_rates(learner: Learner, phase: Phase, course: Course) -> dict[str, float]:
    """Each group's rate from its own base, as a pure function of the step: the phase's own, so that an expert that
    trains in the second half has its warm-up too, and a student that moves now and then its whole curve.

    Returns `NAME/lr` of each optimizer's first group, and `NAME/lr_2` of a second: with LoRA+ A's and B's.
    """
    done, of = learner.pace.done(phase.name, learner.step), learner.pace.of(phase.name)
    told: dict[str, float] = {}
    for name in phase.optimizers:
        rate = course.rate(name)
        factor = lr_factor(done, of, rate.warmup, rate.curve, rate.floor)
        groups = learner.optimizers[name].param_groups
        for i, group in enumerate(groups, start=1):
            top = group["base_lr"]
            if name in learner.rates:  # LoRA+'s ratio between groups stays
                top = learner.rates[name] * (top / groups[0]["base_lr"])
            group["lr"] = top * factor if course.graphs is None else course.graphs.rate(top * factor)
            told[f"{name}/lr{'' if i == 1 else f'_{i}'}"] = group["lr"]
    return told
