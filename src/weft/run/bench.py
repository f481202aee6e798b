"""How fast a training step is, where its time goes, and how near to the device's measured limit: the same loop as
`weft train`, on random latents or tokens of a real shape."""

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import mean, median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from weft.contracts import Batch, Distilled, Engine, Phase, as_text
from weft.errors import ConfigError
from weft.events import Event, StepEnded
from weft.math.chance import generator
from weft.run.assemble import assemble
from weft.run.checks import settled
from weft.run.config import RunConfig
from weft.run.estimate import estimate
from weft.run.learner import Learner
from weft.run.listeners import EventLog
from weft.run.parts import trained_of
from weft.run.questions import Row, Shape, latents_of, told
from weft.run.rehearsal import Rehearsal, Stage, rehearsed
from weft.run.shortage import peak_of
from weft.run.train import Course, Outcome, train

WARM_UP = 3
SCHEMA = 1


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


def random_items(config: RunConfig, shape: Shape) -> Callable[[int], Batch]:
    """What makes the n-th batch: latents of clips, or rows that are each one conversation, every token learned."""
    items = config.data.batch_size

    def rows(number: int) -> Batch:
        chance = generator("cpu", "bench", number)
        ids = torch.randint(len(tokenizer), (items, shape.tokens + 1), generator=chance)
        positions = torch.arange(shape.tokens).repeat(items, 1)
        tensors = {"ids": ids[:, :-1].contiguous(), "positions": positions, "labels": ids[:, 1:].contiguous()}
        return Batch(tensors, tuple(f"{number}.{k}" for k in range(items)))

    def clips(number: int) -> Batch:
        return told(config, torch.randn((items, *latents), generator=generator("cpu", "bench", number)), str(number))

    if isinstance(shape, Row):
        tokenizer = as_text(config.family).tokenizer()
        return rows
    latents = latents_of(config, shape)
    return clips


class Nothing:
    """Between the steps of a bench nothing happens, and a step that is skipped is an error."""

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


def bench(config: RunConfig, shape: Shape, steps: int) -> dict[str, Any]:
    """Time steps of one shape after a warm-up. Returns the figures of docs/benchmarks.md, as plain data.

    Raises ConfigError for two experts under an objective of several parts, whose steps are of four kinds.
    """
    config, warm_up = benchable(config, steps)
    engine = config.engine.open()
    ceiling = matmul_peak(engine)
    reset_peak(engine)
    learner = assemble(config, engine)
    stream = RandomItems(random_items(config, shape), warm_up + steps)
    rates = {role: config.rate_of(role) for role in learner.optimizers}
    with tempfile.TemporaryDirectory() as folder:
        heard = Ear(EventLog(Path(folder) / "events.rank0.jsonl"))
        train(learner, [stream], Course(config.schedule, Nothing(), heard, wait=waiter(engine), rates=rates))
    timed = heard.steps[warm_up:]
    flops = flops_of(config, shape, timed)
    kinds = kinds_of(config, timed, flops)
    seconds = [event.seconds["total"] for event in timed]
    typical = mean if kinds else median  # of steps that differ, the rate over all of them
    predicted = estimate(config, [shape], trained_of(config))[shape]
    losses = [next(value for name, value in e.metrics.items() if name.endswith("/loss")) for e in heard.steps]
    draws = mean(len(config.objective.phases(event.step - 1, config.family.experts)) for event in timed)
    tokens = shape.tokens * config.data.batch_size * config.schedule.accumulate * draws
    library = "transformers" if isinstance(shape, Row) else "diffusers"
    return {
        "schema": SCHEMA,
        "hardware": hardware(engine),
        "software": {name: version(name) for name in ("weft", "torch", library, "peft")},
        "case": {**case(config, shape), "precision": engine.precision},
        "ceiling_matmul_flops": ceiling,
        "model_flops": round(mean(flops)),
        "step_seconds": {"median": median(seconds), **spread(seconds), "steps": len(seconds)},
        **({"kinds": kinds} if kinds else {}),
        "share": shares(timed),
        "tokens_per_second": tokens / typical(seconds),
        "mfu": mean(flops) / typical(seconds) / ceiling,
        "memory_bytes": {"peak": peak_of(engine.device), "planned": predicted.total},
        "loss": {"first": losses[0], "last": losses[-1]},
    }


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


def kinds_of(config: RunConfig, events: Sequence[StepEnded], flops: Sequence[int]) -> dict[str, dict[str, float]]:
    """Steps by the parts that they move: how many, how long, with how many FLOP. Nothing where all steps are alike."""
    if not config.objective.parts:
        return {}
    found: dict[str, list[tuple[float, int]]] = {}
    for event, numbers in zip(events, flops, strict=True):
        names = [phase.name for phase in config.objective.phases(event.step - 1, config.family.experts)]
        found.setdefault(" + ".join(names), []).append((event.seconds["total"], numbers))
    return {
        name: {
            "steps": len(both),
            "median": median(seconds for seconds, _ in both),
            **spread([seconds for seconds, _ in both]),
            "model_flops": round(mean(numbers for _, numbers in both)),
        }
        for name, both in found.items()
    }


def waiter(engine: Engine) -> Callable[[], None] | None:
    """On a GPU the host must wait before it reads the clock; a cpu never runs ahead."""
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    return waits.get(engine.device.type)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The 10th and 90th percentile."""
    if len(seconds) < 2:
        return {"p10": seconds[0], "p90": seconds[0]}
    tenths = quantiles(seconds, n=10, method="inclusive")
    return {"p10": tenths[0], "p90": tenths[-1]}


def shares(events: Sequence[StepEnded]) -> dict[str, float]:
    """Share of the steps' time in data, forward, backward, optimizer, logging, and the rest, the loop's own."""
    total = sum(event.seconds["total"] for event in events)
    parts = {
        part: sum(event.seconds.get(part, 0.0) for event in events) / total
        for part in ("data", "forward", "backward", "optimizer", "logging")
    }
    return {**parts, "loop": 1 - sum(parts.values())}


def case(config: RunConfig, shape: Shape) -> dict[str, Any]:
    """What was measured."""
    clip = {} if isinstance(shape, Row) else {"frames": shape.frames, "height": shape.height, "width": shape.width}
    return {
        "family": config.family.kind,
        "source": config.family.source,
        **clip,
        "tokens": shape.tokens,
        "batch": config.data.batch_size,
        "accumulate": config.schedule.accumulate,
        "adapter": config.adapter.summary(),
        "targets": config.adapter.targets,
        "recompute": config.engine.recompute,
    }


def matmul_peak(engine: Engine) -> float:
    """FLOP/s of the best of several large matrix products on random data, in the engine's precision."""
    on_cpu = engine.device.type == "cpu"
    side, rounds = (1024, 8) if on_cpu else (8192, 20)
    with engine.computing():
        dtype = torch.get_autocast_dtype(engine.device.type) if torch.is_autocast_enabled(engine.device.type) else None
    a, b = (
        torch.randn(side, side, device=engine.device, dtype=dtype, generator=generator(engine.device, "peak", i))
        for i in (0, 1)
    )
    best = float("inf")
    for _ in range(rounds):
        wait = waiter(engine)
        if wait:
            wait()
        began = perf_counter()
        torch.matmul(a, b)
        if wait:
            wait()
        best = min(best, perf_counter() - began)
    return 2 * side**3 / best


def model_flops(config: RunConfig, shape: Shape) -> int:
    """FLOP of one micro-batch of an objective of one part, see `flops_by_phase`. Experts are networks of one size."""
    return next(iter(flops_by_phase(config, shape).values()))


def flops_by_phase(config: RunConfig, shape: Shape) -> dict[str, int]:
    """FLOP of one micro-batch of each phase, forward and backward without recomputation, counted on fake tensors. A
    student that is left after another number of steps each time is counted for each number, and the mean is taken.

    Matrix products and convolutions as torch counts them; attention 4 Nq Nk d forward and 8 Nq Nk d backward, of a row
    of text as if each token saw all others. A head of words counts for every token.
    """
    objective = config.objective
    times = len(objective.step_list(config.family).times) if isinstance(objective, Distilled) else 1
    with rehearsed(config, shape, Stage(torch.float32)) as rehearsal:
        return {
            phase.name: round(mean(counted(rehearsal, phase, done) for done in range(times)))
            for phase in rehearsal.phases
        }


def flops_of(config: RunConfig, shape: Shape, events: Sequence[StepEnded]) -> list[int]:
    """FLOP of each step."""
    schedule, experts = config.schedule, config.family.experts
    if not config.objective.parts:
        return [model_flops(config, shape) * schedule.accumulate] * len(events)
    of = flops_by_phase(config, shape)
    return [
        schedule.accumulate * sum(of[phase.name] for phase in config.objective.phases(event.step - 1, experts))
        for event in events
    ]


def counted(rehearsal: Rehearsal, phase: Phase, done: int) -> int:
    """FLOP of one micro-batch of a phase that has had so many steps."""
    counter = FlopCounterMode(display=False, custom_mapping=attention_flops())
    with rehearsal.adapters.use(phase.role), counter:
        rehearsal.loss(phase, done).backward()
    return counter.get_total_flops()


def attention_flops() -> dict[Any, Any]:
    """Formulas of the cpu's attention kernel, which torch's table lacks."""

    def forward(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        batch, heads, queries, width = query
        return 4 * batch * heads * queries * key[2] * width

    def backward(_: Any, query: tuple[int, ...], key: tuple[int, ...], *__: Any, **___: Any) -> int:
        return 2 * forward(query, key)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def hardware(engine: Engine) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": str(engine.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if engine.device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(engine.device), "cuda": torch.version.cuda}
    return facts


def processor() -> str:
    """The cpu's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def reset_peak(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
