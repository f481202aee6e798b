"""Several runs beside one another: their last numbers and what their configs differ in, as rows and as one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.dashboard.configs import differing
from weft.dashboard.continual import experiments_of, representatives
from weft.dashboard.continual_report import of_experiments
from weft.dashboard.report import compared, lasted
from weft.dashboard.report_charts import overlays
from weft.dashboard.report_parts import Html, Privacy, duration, moment, number, page, paragraph, safe, section, table
from weft.dashboard.report_samples import samples_side_by_side
from weft.dashboard.store import Store

ABSENT = "–"


@dataclass(frozen=True)
class Side:
    """One of the runs. run: as Store.run tells it, under the name by which it is compared; resolved: its config."""

    store: Store
    run: Mapping[str, Any]
    resolved: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.run["name"]


def last_numbers(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Rows of (what, of each run): how far it came and how well it does."""
    rows = {
        "state": [side.run["state"] for side in sides],
        "steps": [_steps(side.run) for side in sides],
        "time": [duration(lasted(side.run)) for side in sides],
        "seconds per step": [number(side.run["seconds_per_step"], 3) for side in sides],
    }
    for phase in dict.fromkeys(phase for side in sides for phase in side.run["losses"]):
        rows[f"last {phase} loss, smoothed"] = [number(side.run["losses"].get(phase)) for side in sides]
    validated = [[one for one in side.run["evaluations"] if one["loss"] is not None] for side in sides]
    if any(validated):
        best = [min(known, key=lambda one: one["loss"], default=None) for known in validated]
        rows["best validation loss"] = [
            f"{number(one['loss'])} at step {one['step']:,}" if one else ABSENT for one in best
        ]
        rows["last validation loss"] = [number(known[-1]["loss"]) if known else ABSENT for known in validated]
        rows["without the adapter"] = [number(known[-1]["baseline"]) if known else ABSENT for known in validated]
        rows["difference to it"] = [_difference(known[-1]) if known else ABSENT for known in validated]
    rows["adapter"] = [side.run["adapter"] for side in sides]
    return list(rows.items())


def differences(sides: Sequence[Side]) -> tuple[list[tuple[str, list[str]]], int]:
    """Rows of (key, value in each run's config) where they differ, and how many keys are the same in all."""
    unlike, same = differing([side.resolved for side in sides])
    return [(row["key"], [_word(value) for value in row["values"]]) for row in unlike], same


def write_comparison(
    sides: Sequence[Side], samples: bool = True, most: int = 50_000_000, metric: str | None = None
) -> str:
    """The runs as one page that needs nothing but itself. most: bytes of the page, which samples fill last. Continual
    runs that differ in their seed alone are one experiment, and its first stands for it where single runs are told of.
    metric: that experiments are compared by; None: their main one."""
    privacy = Privacy(str(Path.home()))
    sides = [Side(side.store, {**side.run, "name": privacy(side.name)}, side.resolved) for side in sides]
    experiments, of_all = experiments_of(sides), len(sides)
    sides = representatives(sides, experiments)
    names = [side.name for side in sides]
    called = [one.name for one in experiments] if sum(len(one.runs) for one in experiments) == of_all else names
    title = " and ".join(filter(None, [", ".join(called[:-1]), called[-1]]))
    rows, same = differences(sides)
    inside = "This file holds prompts, samples and values of the configs, and asks nothing of the network."
    head = (
        f"<header>\n{paragraph(f'Comparison of runs · as of {moment(max(_updated(sides)))}', 'over')}\n"
        f"<h1>{safe(title)}</h1>\n{_sentences(sides)}\n{paragraph(inside, 'quiet')}\n</header>"
    )
    unlike = table("Keys that differ", ("Key", *names), [(key, *map(privacy, values)) for key, values in rows])
    runs = [(side.store, side.run) for side in sides]
    parts = [
        head,
        section("Experiments", *(of_experiments(experiments, metric) if experiments else ())),
        section(
            "Last numbers", table("Of each run", ("What", *names), [(what, *of) for what, of in last_numbers(sides)])
        ),
        section("Curves", overlays(runs)),
        "",  # the samples, once it is known how much room is left
        section("Config", unlike if rows else "", paragraph(f"{same} keys are the same in all.", "quiet")),
    ]
    if samples:
        parts[4] = section("Samples", *samples_side_by_side(runs, max(0, most - len(page(title, *parts).encode()))))
    return page(title, *parts)


def _sentences(sides: Sequence[Side]) -> Html:
    lines = [
        f"<strong>{safe(side.name)}</strong>: {safe(side.run['state'])}. {safe(compared(side.run))}" for side in sides
    ]
    return Html("".join(f"<p>{line}</p>" for line in lines))


def _steps(run: Mapping[str, Any]) -> str:
    return f"{run['step']:,}" + (f" of {run['total_steps']:,}" if run["total_steps"] else "")


def _difference(one: Mapping[str, Any]) -> str:
    if one["baseline"] is None:
        return ABSENT
    error = one["standard_error"]
    return f"{one['loss'] - one['baseline']:+.4f}" + ("" if error is None else f" ± {number(error)}")


def _updated(sides: Sequence[Side]) -> list[float]:
    return [side.run["updated_at"] or 0.0 for side in sides]


def _word(value: Any) -> str:
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
