"""Which charts a page about runs has: of one run all its curves, of several the same curve of each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.dashboard.plots import Chart, Line, figure
from weft.dashboard.report_parts import Html, number, paragraph, safe
from weft.dashboard.store import Store

Run = Mapping[str, Any]
Series = Mapping[str, Sequence[Any]]
POINTS = 1500
BASELINE = "without the adapter"
SHOWN_ELSEWHERE = ("/loss", "/lr", "/grad_norm", "/unweighted_loss", "/skipped")
TIMES = ("seconds/total", "seconds/data")
OVERLAID = ("/loss", "/lr", "/grad_norm", "seconds/total")
QUIET = 8  # the colour of what is there for comparison
CELL, STRIDE, HEADS = 14, 15, 120  # pixels of the heat map: a cell, from one to the next, the names of kinds


def curves(store: Store, run: Run) -> Html:
    """All charts of one run."""
    names = [name for name in run["series"] if not name.startswith("seconds/") or name in TIMES]
    found = store.series(run["id"], names, points=POINTS, smooth=smoothing(run["step"]))["series"]
    resumes = [resume["step"] for resume in run["resumes"]]
    charts = [*_losses(run, found, resumes), *_validation(run), *_optimizers(found, resumes), *_speed(found, resumes)]
    return _drawn([*charts, *_others(found)])


def _drawn(charts: Sequence[Chart]) -> Html:
    drawn = "\n".join(figure(chart, i) for i, chart in enumerate(charts, 1))
    return Html(f'<div class="charts">{drawn}</div>') if drawn else Html("")


def overlays(runs: Sequence[tuple[Store, Run]]) -> Html:
    """The same curve of several runs in one chart each: losses, validation, rates, norms, seconds."""
    names = dict.fromkeys(name for _, run in runs for name in run["series"])
    wanted = [name for end in OVERLAID for name in names if name.endswith(end) and "unweighted" not in name]
    found = [
        store.series(run["id"], [n for n in wanted if n in run["series"]], points=POINTS, smooth=smoothing(run["step"]))
        for store, run in runs
    ]
    charts = [_overlay(name, [run for _, run in runs], [answer["series"] for answer in found]) for name in wanted]
    checked = [
        _checked(run["name"], run["evaluations"], "loss", i, "marked")
        for i, (_, run) in enumerate(runs, 1)
        if run["evaluations"]
    ]
    losses = len([name for name in wanted if name.endswith("/loss")])
    return _drawn(
        [*charts[:losses], *([Chart(title="Validation loss", lines=checked)] * bool(checked)), *charts[losses:]]
    )


def smoothing(steps: int) -> float:
    """The share of the earlier mean that stays: about the newest thirtieth of a run, and at least ten steps."""
    return min(0.999, max(0.9, 1 - 30 / steps)) if steps else 0.9


# ---- One run ------------------------------------------------------------------------------------------------------


def _losses(run: Run, found: Mapping[str, Series], resumes: Sequence[int]) -> Iterator[Chart]:
    """A chart for each phase, with validation where the phase has some of its own."""
    for phase in run["phases"]:
        series = found.get(f"{phase}/loss")
        if series is None or not len(series["steps"]):
            continue
        lines = [
            Line(name="each step", steps=series["steps"], values=series["values"], look="faint"),
            Line(name="smoothed", steps=series["steps"], values=series["smoothed"]),
        ]
        checked = [_of_phase(one, phase, alone=len(run["phases"]) == 1) for one in run["evaluations"]]
        checked = [one for one in checked if one["loss"] is not None]
        if checked:
            lines.append(_checked("validation", checked, "loss", 2, "marked"))
            lines.append(_checked(f"validation {BASELINE}", checked, "baseline", QUIET, "dashed"))
        title = "Loss" if len(run["phases"]) == 1 else f"Loss of {phase}"
        note = (
            "Validation is measured at fixed times and noise, so its level is not that of training." if checked else ""
        )
        yield Chart(title=title, lines=lines, unit=_unit(run), note=note, rules=resumes, wide=True)


def _of_phase(evaluation: Run, phase: str, alone: bool) -> dict[str, Any]:
    if alone:
        return {"step": evaluation["step"], "loss": evaluation["loss"], "baseline": evaluation["baseline"]}
    return {"step": evaluation["step"], "loss": (evaluation["by_expert"] or {}).get(phase), "baseline": None}


def _validation(run: Run) -> Iterator[Chart]:
    """How far below the base, and at which noise."""
    known = [one for one in run["evaluations"] if one["loss"] is not None]
    compared = [one for one in known if one["baseline"] is not None]
    if len(compared) > 1:
        gains = [one["loss"] - one["baseline"] for one in compared]
        errors = [one["standard_error"] or 0.0 for one in compared]
        band = [(gain - error, gain + error) for gain, error in zip(gains, errors, strict=True)]
        steps = [one["step"] for one in compared]
        line = Line(name="difference", steps=steps, values=gains, band=band, colour=2, look="marked")
        yield Chart(
            title="Validation loss, difference to the base model", lines=[line], unit=_unit(run), scale="linear",
            note="Below 0 the adapter is better; the band is one standard error over items.",
        )  # fmt: skip
    if known and known[-1]["by_time"]:
        last = known[-1]
        lines = [*_by_time(last["by_time"], f"step {last['step']}", "marked")]
        lines += _by_time(last["baseline_by_time"] or {}, BASELINE, "dashed")
        note = "0 is clean, 1 is pure noise."
        yield Chart(title="Validation loss by noise level", lines=lines, unit=_unit(run), across="time", note=note)


def _by_time(losses: Mapping[str, float], name: str, look: str) -> list[Line]:
    """Keys are times, with two experts "high 0.9375"."""
    experts: dict[str, list[tuple[float, float]]] = {}
    for key, loss in losses.items():
        expert, _, time = key.rpartition(" ")
        experts.setdefault(expert, []).append((float(time), loss))
    lines = []
    for i, (expert, points) in enumerate(experts.items()):
        times, values = zip(*sorted(points), strict=True)
        called = f"{expert}, {name}" if expert else name
        lines.append(
            Line(name=called, steps=times, values=values, colour=QUIET if look == "dashed" else 2 + i, look=look)
        )
    return lines


def _optimizers(found: Mapping[str, Series], resumes: Sequence[int]) -> Iterator[Chart]:
    rates = [name for name in found if name.rpartition("/")[2].startswith("lr")]
    lines = [
        Line(name=name, steps=found[name]["steps"], values=found[name]["values"], colour=i)
        for i, name in enumerate(rates, 1)
    ]
    if lines:
        yield Chart(title="Learning rate", lines=lines, scale="linear", from_zero=True, rules=resumes)
    norms = [name for name in found if name.endswith("/grad_norm")]
    for name in norms:
        title = "Gradient norm before clipping" + (f", {name.partition('/')[0]}" if len(norms) > 1 else "")
        yield Chart(title=title, lines=_raw_and_smooth(found[name], 3), rules=resumes)


def _speed(found: Mapping[str, Series], resumes: Sequence[int]) -> Iterator[Chart]:
    lines = []
    if (total := found.get("seconds/total")) is not None:
        lines += _raw_and_smooth(total, 5)
    if (data := found.get("seconds/data")) is not None:
        lines.append(Line(name="of that waiting for data", steps=data["steps"], values=data["smoothed"], colour=4))
    if lines:
        yield Chart(title="Time of a step", lines=lines, unit="seconds", from_zero=True, rules=resumes)


def _others(found: Mapping[str, Series]) -> Iterator[Chart]:
    """What this objective measures beside its loss."""
    for name, series in found.items():
        if not name.startswith("seconds/") and not name.endswith(SHOWN_ELSEWHERE) and "/lr_" not in name:
            yield Chart(title=name, lines=_raw_and_smooth(series, 6))


def _raw_and_smooth(series: Series, colour: int) -> list[Line]:
    return [
        Line(name="each step", steps=series["steps"], values=series["values"], look="faint", colour=colour),
        Line(name="smoothed", steps=series["steps"], values=series["smoothed"], colour=colour),
    ]


def _checked(name: str, evaluations: Sequence[Run], key: str, colour: int, look: str) -> Line:
    steps, values = [one["step"] for one in evaluations], [one[key] for one in evaluations]
    return Line(name=name, steps=steps, values=values, colour=colour, look=look)


def _unit(run: Run) -> str:
    return "nats per token" if run["medium"] == "text" else ""


# ---- Several runs -------------------------------------------------------------------------------------------------


def _overlay(name: str, runs: Sequence[Run], found: Sequence[Mapping[str, Series]]) -> Chart:
    lines = [
        Line(
            name=run["name"],
            steps=of[name]["steps"],
            values=of[name]["values" if "/lr" in name else "smoothed"],
            colour=i,
        )
        for i, (run, of) in enumerate(zip(runs, found, strict=True), 1)
        if name in of
    ]
    note = "" if "/lr" in name else "Smoothed."
    return Chart(title=name, lines=lines, note=note, wide=name.endswith("/loss"))


# ---- Adapter health -----------------------------------------------------------------------------------------------


def heat_map(paths: Sequence[str], values: Sequence[float | None], title: str) -> Html:
    """Layers as a grid: blocks across, kinds of layer down, the stronger the larger."""
    placed: dict[tuple[str, int], float] = {}
    for path, value in zip(paths, values, strict=True):
        block = next((part for part in path.split(".") if part.isdecimal()), None)
        if block is not None and value is not None:
            placed[path.replace(f".{block}.", ".*.", 1), int(block)] = value
    if not placed:
        return Html("")
    kinds, blocks = sorted({kind for kind, _ in placed}), sorted({block for _, block in placed})
    shared = len({kind.partition(".*.")[0] for kind in kinds}) == 1
    width, height = HEADS + STRIDE * len(blocks), STRIDE * len(kinds)
    drawn = [f'<rect class="ground" x="{HEADS}" y="0" width="{width - HEADS}" height="{height}"/>']
    largest = max(placed.values()) or 1.0
    for (kind, block), value in placed.items():
        x, y = HEADS + STRIDE * blocks.index(block), STRIDE * kinds.index(kind)
        strength = f"{0.08 + 0.92 * value / largest:.3f}"
        told = f"<title>{safe(f'block {block}, {kind}: {number(value)}')}</title>"
        drawn.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill-opacity="{strength}">{told}</rect>')
    for i, kind in enumerate(kinds):
        called = kind.partition(".*.")[2] if shared else kind
        drawn.append(f'<text x="{HEADS - 6}" y="{STRIDE * i + 11}" text-anchor="end">{safe(called[-20:])}</text>')
    for i, block in list(enumerate(blocks))[:: max(1, len(blocks) // 10)]:
        drawn.append(f'<text x="{HEADS + STRIDE * i + 7}" y="{height + 13}" text-anchor="middle">{block}</text>')
    head = (
        f'<svg class="heat" role="img" aria-label="{safe(title)}" width="{width}" viewBox="0 0 {width} {height + 18}">'
    )
    scale = f"{title}: from 0, palest, to {number(largest)}, full colour."
    return Html(f"{head}{''.join(drawn)}</svg>{paragraph(scale, 'quiet')}")
