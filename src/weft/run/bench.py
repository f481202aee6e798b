"""How fast a training step is, where its time goes, and how near to the device's limits: the same loop as `weft train`,
on random latents or tokens of a real shape."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import mean
from time import perf_counter, process_time
from typing import Any

import torch

from weft.contracts import UNLEARNED, Batch, Engine, Phase
from weft.errors import ConfigError
from weft.events import Event, StepEnded
from weft.families.causal_lm import CausalLM
from weft.math.chance import generator
from weft.run.assemble import assemble
from weft.run.attention import attending
from weft.run.bench_figures import Measured, case_of, compared_memory, figures
from weft.run.bench_machine import Ceilings, ceilings, clock_of, hardware, software, waiter
from weft.run.bench_watch import Compiled, Seen, compiled_so_far, watched
from weft.run.bench_work import blocks_of, closed_work
from weft.run.blocks import compile_as_chosen
from weft.run.checks import settled
from weft.run.config import RunConfig
from weft.run.learner import Learner
from weft.run.listeners import EventLog
from weft.run.questions import Row, Shape, latents_of, told
from weft.run.recording import check_graphs, graphs_at
from weft.run.train import Course, Outcome, train

WARM_UP = 3


@dataclass
class RandomItems:
    """A stream of random items of one shape, made before the clock runs."""

    make: Callable[[int], Batch]
    last_step: int
    name: str = "random"
    made: list[Batch] = field(default_factory=list)

    def batches(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        if not self.made:
            self.made.extend(map(self.make, range(4)))
        for number in count(start + rank, world):
            yield self.made[number % len(self.made)]

    @property
    def epoch_draws(self) -> int:
        return len(self.made)

    def position(self, drawn: int) -> dict[str, Any]:
        return {}

    def resume_at(self, position: Mapping[str, Any]) -> None:
        """Its draws follow from their numbers."""


def random_items(config: RunConfig, shape: Shape, document: int = 0) -> Callable[[int], Batch]:
    """What makes the n-th batch: latents of clips, or rows of conversations of `document` tokens (0: one a row), every
    token but the last of each learned where there are several."""
    items = config.data.batch_size

    def rows(number: int) -> Batch:
        chance = generator("cpu", "bench", number)
        ids = torch.randint(words, (items, shape.tokens + 1), generator=chance)
        positions = (torch.arange(shape.tokens) % (document or shape.tokens)).repeat(items, 1)
        labels = ids[:, 1:].clone()
        if document:
            labels[:, document - 1 :: document] = UNLEARNED
        learned = (labels.flatten() != UNLEARNED).nonzero().flatten()
        tensors = {"ids": ids[:, :-1].contiguous(), "positions": positions, "labels": labels, "learned": learned}
        of_row = tuple(map(len, torch.arange(shape.tokens).split(document or shape.tokens)))
        return Batch(tensors, tuple(f"{number}.{k}" for k in range(items)), (of_row,) * items)

    def clips(number: int) -> Batch:
        drawn = torch.randn((items, *latents), generator=generator("cpu", "bench", number))
        with torch.random.fork_rng(devices=[]):  # a family draws texts and first frames from torch's own generator
            torch.manual_seed(number)
            return told(config, drawn, str(number))

    if isinstance(shape, Row):
        assert isinstance(config.family, CausalLM), "rows of text are for language models"
        words = config.family.config.vocab_size
        return rows
    latents = latents_of(config, shape)
    return clips


class Nothing:
    """Between the steps of a bench nothing happens, and a step that is skipped is an error."""

    def is_due(self, learner: Learner) -> bool:
        return False

    def after_step(self, learner: Learner) -> None: ...
    def after_experience(self, learner: Learner) -> None: ...
    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        raise ArithmeticError(f"the gradient of step {learner.step + 1} is not finite")


@dataclass
class Ear:
    """Writes the log that a run writes, and keeps each step with the seconds that writing it took."""

    log: EventLog
    steps: list[StepEnded] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        began = perf_counter()
        self.log(event)
        if isinstance(event, StepEnded):
            logging = perf_counter() - began
            total = event.seconds["total"] + logging
            self.steps.append(replace(event, seconds={**event.seconds, "logging": logging, "total": total}))


# ---- A learner that is timed --------------------------------------------------------------------------------------


@dataclass
class Running:
    """A learner, the loop that it is trained by, and what it said of its steps."""

    config: RunConfig
    shape: Shape
    document: int
    engine: Engine
    learner: Learner
    stream: RandomItems
    heard: Ear
    course: Course
    warm_up: int

    def go(self, steps: int) -> float:
        """Train so many steps. Returns the seconds until the device was done with them."""
        self.stream.last_step = self.learner.step + steps
        wait = waiter(self.engine.device) or (lambda: None)
        wait()
        began = perf_counter()
        with attending(self.config.family, self.engine.device):
            train(self.learner, [self.stream], self.course)
            wait()
        return perf_counter() - began

    def clocked(self) -> float:
        """Seconds of one step, by the clock that sides are compared by."""
        clock = clock_of(self.engine.device)
        began = clock()
        self.go(1)
        return clock() - began

    @property
    def replays(self) -> int | None:
        """Steps, or phases of them, that were replayed; None where none is recorded."""
        return None if self.course.graphs is None else self.course.graphs.replays

    def unrecorded(self) -> "Running":
        """The same learner, whose operators are launched one by one, where they can be looked at."""
        return replace(self, course=replace(self.course, graphs=None))

    @property
    def losses(self) -> list[float]:
        return [next(v for name, v in event.metrics.items() if name.endswith("/loss")) for event in self.heard.steps]


def opened(config: RunConfig, shape: Shape, steps: int, folder: Path, document: int = 0) -> Running:
    """Weights in their places, adapters whose B is not zero, batches drawn. folder: for the log."""
    asked, (config, warm_up) = config, benchable(config, steps)
    engine = config.engine.open()
    check_graphs(config, engine.device, engine.world, engine.precision)
    folder.mkdir(parents=True, exist_ok=True)
    heard = Ear(EventLog(folder / "events.rank0.jsonl"))
    compile_as_chosen(asked, {shape: 1}, engine, heard)  # as the run would, which is longer
    learner = assemble(config, engine)
    stir(learner)
    stream = RandomItems(random_items(config, shape, document), 0)
    rates = {role: config.rate_of(role) for role in learner.optimizers}
    # A GPU's own clock is in the events of its laps; other devices that work ahead are waited for.
    wait = waiter(engine.device) if engine.device.type == "mps" else None
    graphs = graphs_at(config, shape, engine, heard)
    course = Course(config.schedule, Nothing(), heard, wait=wait, rates=rates, graphs=graphs)
    return Running(config, shape, document, engine, learner, stream, heard, course, warm_up)


def stir(learner: Learner) -> None:
    """Give what begins at zero small random values: with B = 0 the gradient of A is zero too, and products of zeros
    take less power and run faster."""
    adapters = learner.model.adapters
    for role in adapters.names:
        tensors = adapters.state_dict(role)
        chance = generator("cpu", "adapter", role)
        drawn = {
            name: tensor if tensor.any() else 0.02 * torch.randn(tensor.shape, generator=chance).to(tensor)
            for name, tensor in tensors.items()
        }
        adapters.load_state_dict(role, drawn)


def bench(config: RunConfig, shape: Shape, steps: int, document: int = 0) -> dict[str, Any]:
    """Time steps of one shape after a warm-up. Returns the figures of docs/benchmarks.md, as plain data.

    Raises ConfigError for two experts under an objective of several parts, whose steps are of four kinds.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        limits = limits_of(config, shape, document)
        before = compiled_so_far()
        running = opened(config, shape, steps, folder, document)
        running.go(running.warm_up)
        warm = compiled_so_far()
        seconds = running.go(steps)
        later = compiled_so_far().since(warm)
        return reported(running, limits, Timed([seconds / steps], steps, warm.since(before), later))


@dataclass(frozen=True)
class Timed:
    """Steps that were timed. seconds: of each by the clock of turns, or, of a side that went through without a stop,
    their mean. warming and later: what was compiled before, and meanwhile. alone: nothing else lay on the device."""

    seconds: Sequence[float]
    steps: int
    warming: Compiled
    later: Compiled
    alone: bool = True
    turns: bool = False


def limits_of(config: RunConfig, shape: Shape, document: int = 0) -> Ceilings:
    """What the device reaches at best at a shape, measured before anything else lies on it."""
    engine = config.engine.open()
    made = blocks_of(config, shape, document or shape.tokens)
    stages = [stage.attention for stage in made[0][0].stages if stage.attention] if made else []
    largest = max(stages, key=lambda each: each.forward, default=None)
    with attending(config.family, engine.device):  # the best that a run's own kernels reach
        if largest is None:
            return ceilings(engine, shape.tokens, 1024)
        return ceilings(engine, largest.keys, largest.width, largest.share < 1)


def reported(running: Running, limits: Ceilings, timed: Timed) -> dict[str, Any]:
    """The figures of a learner that was timed last."""
    events = running.heard.steps[-timed.steps :]
    compiled = bool(timed.warming.graphs)
    replays = running.replays  # of all steps so far: those that follow are looked at
    seen: Seen = watched(running.learner, running.unrecorded().go, compiled, timed.alone)
    measured = Measured(
        events=events,
        losses=running.losses,
        seconds=timed.seconds if timed.turns else [event.seconds["total"] for event in events],
        mean=mean(timed.seconds),
        ceilings=limits,
        work=closed_work(running.config, running.shape, running.document),
        memory=compared_memory(running.config, running.shape, running.engine.device, seen),
    )
    text = isinstance(running.shape, Row)
    return {
        **figures(running.config, running.shape, measured),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(running.engine),
        "software": software("transformers" if text else "diffusers"),
        "case": {**case_of(running.config, running.shape, running.document), "precision": running.engine.precision},
        "clock": clock_named(running.engine, timed.turns),
        "compile": {**timed.warming.plain(), "recompiles": timed.later.graphs},
        "graph_replays": replays,
        "attention": seen.attention,
        "reads_per_step": seen.reads,
        "syncs_per_step": seen.syncs,
        "operations_per_step": seen.operations,
        "saved_bytes": None if seen.saved is None else seen.saved.plain(),
    }


def clock_named(engine: Engine, turns: bool) -> str:
    """By which clock steps were timed: a GPU's own, the host's, or the processor's time."""
    if not turns:
        return "device" if engine.device.type == "cuda" else "host"
    return "processor" if clock_of(engine.device) is process_time else "host"


def benchable(config: RunConfig, steps: int) -> tuple[RunConfig, int]:
    """The config without what needs data, long enough for a bench, and the steps of warm-up: until each phase came."""
    experts = config.family.experts
    if config.objective.parts and len(experts) > 1:
        raise ConfigError(
            f"weft bench: objective '{config.objective.kind}' on two experts has steps of several kinds. Write "
            "family.expert=high or family.expert=low to time one."
        )
    warm_up = warm_up_of(config)
    # No data are read, so that epochs have no length.
    changes = {"epochs": None, "steps": max(config.schedule.steps, warm_up + steps)}
    schedule = config.schedule.model_copy(update=changes)
    return settled(config.model_copy(update={"schedule": schedule}), None, 1), warm_up


def warm_up_of(config: RunConfig) -> int:
    """Steps before those that count; of several parts until each has moved."""
    if not config.objective.parts:
        return WARM_UP
    experts, missing = config.family.experts, set(config.objective.roles(config.family.experts))
    for step in count():
        missing -= {phase.role for phase in config.objective.phases(step, experts)}
        if not missing:
            return max(WARM_UP, step + 1)
    raise AssertionError("unreachable")
