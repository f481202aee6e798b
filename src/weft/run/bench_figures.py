"""From timed steps to the figures of docs/benchmarks.md: spread, shares, speed, how far it is to the limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles
from typing import Any

import torch

from weft.events import StepEnded
from weft.math.flops import H200, Rates, Work, practical_seconds, strict_seconds
from weft.run.bench_machine import Ceilings
from weft.run.bench_watch import Seen
from weft.run.bench_work import flops_of
from weft.run.config import RunConfig
from weft.run.estimate import estimate
from weft.run.parts import trained_of
from weft.run.questions import Row, Shape

SCHEMA = 2
PARTS = ("data", "forward", "backward", "optimizer", "logging")


@dataclass(frozen=True)
class Measured:
    """Steps that count, and what is known beside them. work: of one micro-batch. seconds: of each step. mean: of one
    from end to end, what lies between steps included."""

    events: Sequence[StepEnded]
    losses: Sequence[float]
    seconds: Sequence[float]
    mean: float
    ceilings: Ceilings
    work: Work | None
    memory: dict[str, Any]


def figures(config: RunConfig, shape: Shape, measured: Measured) -> dict[str, Any]:
    """What follows from the steps."""
    timed = measured.events
    flops = flops_of(config, shape, timed, measured.work)
    kinds = kinds_of(config, timed, flops)
    seconds = measured.seconds
    typical = (mean if kinds else median)(seconds)  # of steps that differ, the rate over all of them
    draws = mean(len(config.objective.phases(event.step - 1, config.family.experts)) for event in timed)
    items = config.data.batch_size * config.schedule.accumulate * draws
    work = None if measured.work is None else measured.work.times(config.schedule.accumulate)
    recompute = recompute_of(config)
    return {
        "schema": SCHEMA,
        "ceilings": measured.ceilings.plain(),
        "flops": {"model": round(mean(flops)), **flops_plain(work, recompute)},
        "step_seconds": {"median": median(seconds), **spread(seconds), "mean": measured.mean, "steps": len(seconds)},
        **({"kinds": kinds} if kinds else {}),
        "share": shares(timed),
        "phase_seconds": phases(timed),
        "tokens_per_second": shape.tokens * items / typical,
        "items_per_second": items / typical,
        **limits(typical, mean(flops), work, recompute, measured.ceilings.rates),
        "on_h200": limits(typical, mean(flops), work, recompute, H200),
        "memory_bytes": measured.memory,
        "loss": {"first": measured.losses[0], "last": measured.losses[-1]},
        "extrapolated": False,
    }


def limits(seconds: float, flops: float, work: Work | None, recompute: str, rates: Rates) -> dict[str, float | None]:
    """How near a step comes to what rates allow. The last four need the work in closed form."""
    known: dict[str, float | None] = dict.fromkeys(
        ("hfu", "strict_seconds", "practical_seconds", "over_floor", "over_practical")
    )
    if work is not None:
        strict, practical = strict_seconds(work, rates), practical_seconds(work, rates, recompute)
        known = {
            "hfu": work.hardware(recompute) / seconds / rates.products,
            "strict_seconds": strict,
            "practical_seconds": practical,
            "over_floor": seconds / strict,
            "over_practical": seconds / practical,
        }
    return {"mfu": flops / seconds / rates.products, **known}


def flops_plain(work: Work | None, recompute: str) -> dict[str, Any]:
    """The parts of a step's FLOP; of a network without closed forms none."""
    if work is None:
        return {"counted": True}
    return {
        "counted": False,
        "hardware": work.hardware(recompute),
        "linear": work.linear_forward + work.linear_backward,
        "attention": work.attention_forward + work.attention_backward,
        "lora": work.lora,
        "moved_bytes": round(work.moved),
        "recompute": recompute,
    }


def recompute_of(config: RunConfig) -> str:
    """none, selective or full, as the FLOP are counted."""
    asked = config.engine.recompute
    return asked if isinstance(asked, str) else "full" if asked else "none"


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


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The 10th and 90th percentile."""
    if len(seconds) < 2:
        return {"p10": seconds[0], "p90": seconds[0]}
    tenths = quantiles(seconds, n=10, method="inclusive")
    return {"p10": tenths[0], "p90": tenths[-1]}


def shares(events: Sequence[StepEnded]) -> dict[str, float]:
    """Share of the steps' time in data, forward, backward, optimizer, logging, and the rest, the loop's own."""
    total = sum(event.seconds["total"] for event in events)
    parts = {part: sum(event.seconds.get(part, 0.0) for event in events) / total for part in PARTS}
    return {**parts, "loop": 1 - sum(parts.values())}


def phases(events: Sequence[StepEnded]) -> dict[str, float]:
    """Median seconds of each part of a step; of one that did not come, as where a whole step is replayed, none."""
    told = {part: [event.seconds[part] for event in events if part in event.seconds] for part in PARTS}
    return {part: median(values) for part, values in told.items() if values}


def case_of(config: RunConfig, shape: Shape, document: int) -> dict[str, Any]:
    """What was measured."""
    if isinstance(shape, Row):
        clip: dict[str, Any] = {"document": document or shape.tokens}
    else:
        clip = {"frames": shape.frames, "height": shape.height, "width": shape.width}
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


def compared_memory(config: RunConfig, shape: Shape, device: torch.device, seen: Seen) -> dict[str, Any]:
    """The peak of a step against the planner's estimate. by: how the peak was counted; on a cpu that is compiled for
    only that of the whole process is known, with its libraries."""
    planned = estimate(config, [shape], trained_of(config))[shape].total
    told = {"peak": seen.peak, "by": seen.by, "planned": planned}
    if seen.peak is not None and seen.by != "process":
        told["ratio"] = seen.peak / planned
    if device.type == "cuda":
        told["reserved"] = torch.cuda.max_memory_reserved(device)
    return told
