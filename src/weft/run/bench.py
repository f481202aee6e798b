"""How fast a training step is, where its time goes, and how near to the device's measured limit: the same loop as
`weft train`, on random latents or tokens of a real shape."""

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from weft.contracts import Batch, Engine, Phase, as_text, as_video
from weft.events import Event, StepEnded
from weft.math.chance import generator
from weft.run.assemble import assemble, count_parameters
from weft.run.checks import settled
from weft.run.config import RunConfig
from weft.run.estimate import estimate
from weft.run.learner import Learner
from weft.run.listeners import EventLog
from weft.run.questions import Row, Shape
from weft.run.rehearsal import Stage, rehearsed
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
        random = torch.randn((items, *latents), generator=generator("cpu", "bench", number))
        tensors = {"latents": random, **family.conditions(items, *latents[1:])}
        return Batch(tensors, tuple(f"{number}.{k}" for k in range(items)))

    if isinstance(shape, Row):
        tokenizer = as_text(config.family).tokenizer()
        return rows
    family = as_video(config.family)
    latents = family.geometry().latent_shape(shape.frames, shape.height, shape.width)
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
    """Time steps of one shape after a warm-up. Returns the figures of docs/benchmarks.md, as plain data."""
    schedule = config.schedule.model_copy(update={"epochs": None})  # no data are read, so that it has no length
    config = settled(config.model_copy(update={"schedule": schedule}), None, 1)
    engine = config.engine.open()
    ceiling = matmul_peak(engine)
    reset_peak(engine)
    learner = assemble(config, engine)
    items = config.data.batch_size
    stream = RandomItems(random_items(config, shape), WARM_UP + steps)
    with tempfile.TemporaryDirectory() as folder:
        heard = Ear(EventLog(Path(folder) / "events.rank0.jsonl"))
        train(learner, [stream], Course(config.schedule, Nothing(), heard, wait=waiter(engine)))
    counted = heard.steps[WARM_UP:]
    seconds = [event.seconds["total"] for event in counted]
    flops = model_flops(config, shape) * config.schedule.accumulate
    predicted = estimate(config, [shape], count_parameters(learner).trainable)[shape]
    losses = [next(value for name, value in e.metrics.items() if name.endswith("/loss")) for e in heard.steps]
    tokens = shape.tokens * items * config.schedule.accumulate
    library = "transformers" if isinstance(shape, Row) else "diffusers"
    return {
        "schema": SCHEMA,
        "hardware": hardware(engine),
        "software": {name: version(name) for name in ("weft", "torch", library, "peft")},
        "case": {**case(config, shape), "precision": engine.precision},
        "ceiling_matmul_flops": ceiling,
        "model_flops": flops,
        "step_seconds": {"median": median(seconds), **spread(seconds), "steps": len(seconds)},
        "share": shares(counted),
        "tokens_per_second": tokens / median(seconds),
        "mfu": flops / median(seconds) / ceiling,
        "memory_bytes": {"peak": peak_of(engine.device), "planned": predicted.total},
        "loss": {"first": losses[0], "last": losses[-1]},
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
    """FLOP of one micro-batch, forward and backward without recomputation, counted on fake tensors.

    Matrix products and convolutions as torch counts them; attention 4 Nq Nk d forward and 8 Nq Nk d backward, of a row
    of text as if each token saw all others. A head of words counts for every token.
    """
    counter = FlopCounterMode(display=False, custom_mapping=attention_flops())
    with rehearsed(config, shape, Stage(torch.float32)) as rehearsal, counter:
        rehearsal.loss().backward()
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
