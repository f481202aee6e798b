"""Cases and their variants: planned first, timed in turns, carried on from two depths to the whole network."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.math.flops import H200
from weft.run.assemble import free_memory
from weft.run.bench import Running, Timed, limits_of, opened, reported
from weft.run.bench_cases import Case, Prepared, prepared
from weft.run.bench_figures import flops_plain, limits, recompute_of
from weft.run.bench_machine import Ceilings
from weft.run.bench_peers import Plain, plain_of
from weft.run.bench_watch import Compiled, compiled_so_far
from weft.run.bench_work import closed_work
from weft.run.config import RunConfig
from weft.run.estimate import estimate
from weft.run.ladder import device_memory, ladder, room_in
from weft.run.parts import trained_of
from weft.run.questions import Shape


@dataclass(frozen=True)
class Asked:
    """How cases are timed. steps: that count. variants: changes of the config by which a case is timed in turns with
    itself; against: whether the plain step of the libraries takes turns too."""

    steps: int = 20
    variants: tuple[tuple[str, ...], ...] = ((),)
    against: bool = False


def variants_of(text: str) -> tuple[tuple[str, ...], ...]:
    """Variants from a text such as 'engine.recompute=true; adapter.backend=native family.dtype=fp8'. An empty one is
    the config as it is. Raises ConfigError."""
    found = tuple(tuple(part.split()) for part in text.split(";"))
    wrong = [word for each in found for word in each if "=" not in word]
    if wrong:
        raise ConfigError(f"--variants: '{wrong[0]}' is no change. Write key=value, and ; between variants.")
    return found


def measured(cases: Sequence[Case], asked: Asked) -> Iterator[dict[str, Any]]:
    """The figures of each case and variant, as they come. Raises WeftError."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            yield from measured_case(case, asked, Path(folder))
        free_memory()


def of_config(ready: Sequence[tuple[RunConfig, Shape]], asked: Asked) -> Iterator[dict[str, Any]]:
    """The figures of configs of one's own, which take turns where there are several."""
    with tempfile.TemporaryDirectory() as folder:
        found = in_turns(ready, 0, asked.steps, Path(folder), [0] if asked.against else [])
        for figures, changes in zip(found, asked.variants, strict=True):
            yield {**figures, "case": {**figures["case"], "changes": list(changes)}}


def measured_case(case: Case, asked: Asked, folder: Path) -> list[dict[str, Any]]:
    """One case in all of its variants: the whole network, or two depths of it and what follows for the whole."""
    if case.blocks is None:
        return at_depths(case, asked, folder, (None,))
    whole = [prepared(varied(case, changes), folder / "whole" / str(n)) for n, changes in enumerate(asked.variants)]
    depths = (case.blocks, 2 * case.blocks)
    if depths[1] > whole[0].units:
        raise ConfigError(f"--blocks: twice {case.blocks} is more than the {whole[0].units} units of {case.model}.")
    found = at_depths(case, asked, folder, depths)
    short, longer = found[: len(whole)], found[len(whole) :]
    return [carried_on(a, b, of) for a, b, of in zip(short, longer, whole, strict=True)]


def varied(case: Case, changes: tuple[str, ...]) -> Case:
    """The case with further changes."""
    return Case(**{**vars(case), "changes": (*case.changes, *changes)})


def at_depths(case: Case, asked: Asked, folder: Path, depths: Sequence[int | None]) -> list[dict[str, Any]]:
    """All variants of a case at each depth, in that order."""
    ready = [
        prepared(varied(case, changes), folder / f"{depth}-{number}", depth)
        for depth in depths
        for number, changes in enumerate(asked.variants)
    ]
    plain = range(0, len(ready), len(asked.variants)) if asked.against else ()  # the first variant's at each depth
    found = in_turns([(each.config, each.shape) for each in ready], case.document, asked.steps, folder, plain)
    return [labelled(figures, each) for figures, each in zip(found, ready, strict=True)]


def labelled(figures: dict[str, Any], of: Prepared) -> dict[str, Any]:
    """Figures that say which case they are of."""
    case = of.case
    told = {"name": case.name, "model": case.model, "changes": list(case.changes), "blocks": case.blocks,
            "depth": of.depth, "units": of.units, "source": case.model}  # fmt: skip
    return {**figures, "case": {**figures["case"], **told}}


# ---- In turns -----------------------------------------------------------------------------------------------------


def in_turns(
    ready: Sequence[tuple[RunConfig, Shape]], document: int, steps: int, folder: Path, plain: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Time configs step by step in turns where all fit the device together, else one after another. plain: numbers of
    those whose plain step takes turns too."""
    sizes = [planned(config, shape) for config, shape in ready]
    if len(ready) > 1 and not fits(ready[0][0], sum(sizes)):
        alone = [in_turns([each], document, steps, folder / f"alone{number}", [0] if number in plain else [])
                 for number, each in enumerate(ready)]  # fmt: skip
        return [figures for (figures,) in alone]
    bounds = limits_of(*ready[0], document)
    sides: list[Running] = []
    compiled: list[Compiled] = []
    beside: dict[int, Plain] = {}
    for number, (config, shape) in enumerate(ready):
        before = compiled_so_far()
        side = opened(config, shape, steps, folder / f"log{number}", document)
        if number in plain:
            beside[number] = plain_of(side)
            beside[number].meet(side)
        side.go(side.warm_up)
        compiled.append(compiled_so_far().since(before))
        sides.append(side)
    warm, every = compiled_so_far(), [*sides, *beside.values()]
    alone = len(every) == 1
    through = alone and sides[0].engine.device.type != "cpu"  # there each step has a clock of its own
    seconds = [[sides[0].go(steps) / steps]] if through else turns(every, steps)
    later = compiled_so_far().since(warm)
    found = [
        reported(side, bounds, Timed(own, steps, of, later, alone, not through))
        for side, own, of in zip(sides, seconds, compiled, strict=False)
    ]
    for (number, other), theirs in zip(beside.items(), seconds[len(sides) :], strict=True):
        found[number]["against"] = other.compared(seconds[number], theirs, found[number])
    return found


def turns(every: Sequence[Running | Plain], steps: int) -> list[list[float]]:
    """Seconds of the steps that count, each in turns, each first now and then."""
    seconds: list[list[float]] = [[] for _ in every]
    for number in range(steps):
        for place in range(len(every)):
            which = (number + place) % len(every)
            seconds[which].append(every[which].clocked())
    return seconds


def planned(config: RunConfig, shape: Shape) -> int:
    """Bytes that a config will take. Raises ConfigError when there are not so many, with what would fit."""
    total = estimate(config, [shape], trained_of(config))[shape].total
    if not fits(config, total):
        limit = device_memory(config) or 0
        rungs = ladder(config, [shape], room_in(limit))
        lines = "\n".join(f"  {rung.line()}" for rung in rungs) or "  nothing that Weft knows"
        raise ConfigError(
            f"weft bench: {config.family.source} at {shape} will take {total / 2**30:.1f} GiB, and there are "
            f"{limit / 2**30:.1f}. What would fit, each on top of the last:\n{lines}\n"
            "or --blocks 2, which times two depths of the network and carries on from there."
        )
    return total


def fits(config: RunConfig, size: int) -> bool:
    limit = device_memory(config)
    return limit is None or size <= limit


# ---- From two depths to the whole ---------------------------------------------------------------------------------


def carried_on(short: Mapping[str, Any], longer: Mapping[str, Any], of: Prepared) -> dict[str, Any]:
    """Figures of the whole network from those of two depths: a further unit of depth takes each time the same. Raises
    ConfigError when the longer one was not slower."""
    depths = short["case"]["depth"], longer["case"]["depth"]

    def whole(a: float, b: float) -> float:
        return a + (b - a) * (of.units - depths[0]) / (depths[1] - depths[0])

    def each(a: Any, b: Any) -> Any:
        return {name: whole(a[name], b[name]) for name in b if name in a}

    seconds = whole(short["step_seconds"]["median"], longer["step_seconds"]["median"])
    if longer["step_seconds"]["median"] <= short["step_seconds"]["median"]:
        raise ConfigError(
            f"weft bench: {of.case.name}: {depths[1]} units of depth were not slower than {depths[0]}, so that nothing "
            "follows for the whole. Raise --steps, or time on a quieter machine."
        )
    accumulate, recompute = of.config.schedule.accumulate, recompute_of(of.config)
    one = closed_work(of.config, of.shape, of.case.document)
    work = None if one is None else one.times(accumulate)
    flops = whole(short["flops"]["model"], longer["flops"]["model"]) if work is None else work.model
    rates = Ceilings.of(longer["ceilings"]).rates
    speed = longer["step_seconds"]["median"] / seconds
    found = {
        **longer,
        "extrapolated": True,
        "depths": {str(at["case"]["depth"]): at["step_seconds"]["median"] for at in (short, longer)},
        "step_seconds": {"median": seconds, "steps": longer["step_seconds"]["steps"]},
        "phase_seconds": each(short["phase_seconds"], longer["phase_seconds"]),
        "tokens_per_second": longer["tokens_per_second"] * speed,
        "items_per_second": longer["items_per_second"] * speed,
        "flops": {"model": round(flops), **flops_plain(work, recompute)},
        **limits(seconds, flops, work, recompute, rates),
        "on_h200": limits(seconds, flops, work, recompute, H200),
        "memory_bytes": memory_of_whole(short["memory_bytes"], longer["memory_bytes"], whole),
        "case": {**longer["case"], "depth": of.units},
    }
    del found["share"]
    if "against" in longer:
        found["against"] = against_of_whole(short["against"], longer["against"], seconds, whole)
    return found


def memory_of_whole(
    short: Mapping[str, Any], longer: Mapping[str, Any], whole: Callable[[float, float], float]
) -> dict[str, Any]:
    """Peak and plan of the whole."""
    planned = round(whole(short["planned"], longer["planned"]))
    if longer["by"] == "process" or longer["peak"] is None:
        return {"peak": None, "by": longer["by"], "planned": planned}
    peak = round(whole(short["peak"], longer["peak"]))
    return {"peak": peak, "by": longer["by"], "planned": planned, "ratio": peak / planned}


def against_of_whole(
    short: Mapping[str, Any], longer: Mapping[str, Any], seconds: float, whole: Callable[[float, float], float]
) -> dict[str, Any]:
    """The plain step of the whole network beside ours."""
    theirs = whole(short["step_seconds"]["median"], longer["step_seconds"]["median"])
    peaks = [at["memory_bytes"]["peak"] for at in (short, longer)]
    peak = None if None in peaks else round(whole(*peaks))
    kept = {name: value for name, value in longer.items() if name not in ("ratio_p25", "ratio_p75")}
    return {**kept, "step_seconds": {"median": theirs}, "ratio": theirs / seconds, "memory_bytes": {"peak": peak}}
