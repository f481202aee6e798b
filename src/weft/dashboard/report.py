"""One run as one page that needs nothing but itself: what was trained, what came of it, and how to do it again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from weft.dashboard.continual_report import of_run
from weft.dashboard.plots import Chart, Line, figure
from weft.dashboard.report_charts import curves, heat_map
from weft.dashboard.report_origin import adapters_of, origin, use
from weft.dashboard.report_parts import (
    Html,
    Privacy,
    code,
    counted,
    duration,
    facts,
    folded,
    moment,
    number,
    page,
    paragraph,
    safe,
    section,
    size,
    table,
)
from weft.dashboard.report_samples import run_samples
from weft.dashboard.store import Store

Run = Mapping[str, Any]
GLYPHS = {"finished": ("✓", "good"), "stopped": ("■", ""), "crashed": ("✕", "bad"), "stalled": ("!", "warn")}
TOLD = ("notice", "incident", "control", "resumed", "exported", "ended")  # others stand in sections of their own
TOP = 10  # layers with the largest change


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What goes into a page. most: bytes of the whole page, which samples fill last."""

    samples: bool = True
    config: bool = True
    log: bool = False  # the log's last lines may name files
    host: bool = False
    most: int = 50_000_000


def write_report(store: Store, id: str, contents: Contents | None = None) -> str:
    """The page of a run, at any time of its life. Raises UnknownRun for an id that is none."""
    wanted = contents or Contents()
    run = store.run(id)
    privacy = Privacy(str(Path.home()), None if wanted.host else run["host"] or None)
    run = {**run, **{key: privacy.tree(run[key]) for key in ("reason", "entries", "log", "model", "note")}}
    config = privacy.tree(store.config(id))
    adapters = adapters_of(store.folder(id))
    parts = [
        _head(run, wanted),
        section("What was trained", _trained(run, config["resolved"], adapters, wanted)),
        section("Curves", curves(store, run), _evaluations(run)),
        "",  # the samples, once it is known how much room is left
        section("How much the adapter changes", *_health(store.health(id))),
        section("What was learned and kept", *of_run(store.scores(id), store.folder(id))),
        section("What happened", _entries(run), _log(run) if wanted.log else ""),
        section("Config", *_config(config)) if wanted.config else "",
        section("Where it comes from", *origin(config["environment"], adapters, run, config)),
        section("Use it", *use(run, config["resolved"], adapters)),
    ]
    title = f"{run['name']}: training report"
    if wanted.samples:
        room = wanted.most - len(page(title, *parts).encode())
        parts[3] = section("Samples", *run_samples(store, id, max(0, room)))
    return page(title, *parts)


# ---- The head -----------------------------------------------------------------------------------------------------


def _head(run: Run, wanted: Contents) -> Html:
    glyph, kind = GLYPHS.get(run["state"], ("●", ""))
    holds = ["the prompts and samples"] * wanted.samples + ["the config as it was written"] * wanted.config
    holds += ["the last lines of the log"] * bool(wanted.log and run["log"]) + ["the machine's name"] * wanted.host
    holds = holds or ["numbers and events"]
    inside = " and ".join(filter(None, [", ".join(holds[:-1]), holds[-1]]))
    as_of = moment(run["updated_at"])
    mark = f'<span class="state {kind}"><span aria-hidden="true">{glyph}</span> {safe(run["state"])}</span>'
    return Html(
        f"<header>\n{paragraph(f'Training report · as of {as_of}', 'over')}\n"
        f"<h1>{safe(run['name'])}</h1>\n{paragraph(Html(mark + safe(outcome(run))), 'outcome')}\n"
        f"{paragraph(f'This file holds {inside}. It asks nothing of the network.', 'quiet')}\n</header>"
    )


def outcome(run: Run) -> str:
    """What follows the run's state in its first sentence, and how validation compares to the base."""
    total = run["total_steps"]
    whole = not total or (run["state"] == "finished" and run["step"] == total)
    steps = counted(run["step"], "step") if whole else f"{run['step']:,} of {total:,} steps"
    if run["state"] in ("finished", "stopped"):
        head = f" after {steps} in {duration(lasted(run))}."
    elif run["state"] in ("crashed", "stalled"):
        head = f" at {steps}." + (f" {run['reason']}" if run["reason"] else "")
    else:
        head = f" at {steps}" + (f", about {duration(run['eta'])} left." if run["eta"] is not None else ".")
    return f"{head} {compared(run)}".rstrip()


def compared(run: Run) -> str:
    """The last validation beside the base model, with the standard error of the difference over items."""
    known = [one for one in run["evaluations"] if one["loss"] is not None]
    if not known:
        return ""
    last = known[-1]
    told = f"Validation loss {number(last['loss'])} at step {last['step']:,}"
    if last["baseline"] is None:
        return f"{told}."
    change, error = last["loss"] - last["baseline"], last["standard_error"]
    if change == 0:
        return f"{told}, the same as without the adapter."
    way = "lower" if change < 0 else "higher"
    told += f": {way} than without the adapter by {number(abs(change))}"
    if error is None:
        return f"{told}."
    chance = ", which may be chance" if abs(change) < 2 * error else ""
    return f"{told} ± {number(error)} (one standard error{chance})."


def lasted(run: Run) -> float | None:
    return run["updated_at"] - run["started_at"] if run["started_at"] and run["updated_at"] else None


# ---- What was trained ---------------------------------------------------------------------------------------------


def _trained(run: Run, config: Mapping[str, Any], adapters: Sequence[Any], wanted: Contents) -> str:
    losses = ", ".join(
        f"{number(loss)}" if len(run["losses"]) == 1 else f"{phase} {number(loss)}"
        for phase, loss in run["losses"].items()
    )
    one = {"text": "conversation", "documents": "document"}.get(run["medium"], "clip")
    counts = [adapter.items for adapter in adapters if adapter.items is not None]
    machines = sorted({str(gpu["name"]) for gpu in run["gpus"] if gpu["name"]})
    told = facts(
        [
            ("Model", run["model"]),
            ("Family", run["family"]),
            ("Objective", run["objective"]),
            ("Adapter", run["adapter"]),
            ("Trainable parameters", f"{run['trainable']:,}" if run["trainable"] else None),
            ("Training data", counted(counts[0], one) if counts else None),
            ("Batch of one process", config.get("data.batch_size")),
            ("Processes", run["world"]),
            ("Device", ", ".join(machines)),
            ("Steps", f"{run['step']:,}" + (f" of {run['total_steps']:,}" if run["total_steps"] else "")),
            ("Time", duration(lasted(run))),
            ("Seconds per step", number(run["seconds_per_step"], 3) if run["seconds_per_step"] else None),
            ("Last loss, smoothed", losses),
            ("Started", moment(run["started_at"])),
            ("Machine", run["host"] if wanted.host else None),
        ]
    )
    return told + (_gpus(run["gpus"]) if len(run["gpus"]) > 1 else "")


def _gpus(gpus: Sequence[Run]) -> Html:
    rows = [
        (f"GPU {gpu['number']}", gpu["name"], gpu["state"], gpu["step"], number(gpu["seconds_per_step"], 3), _peak(gpu))
        for gpu in gpus
    ]
    return folded(
        "Each GPU", table("GPUs of this run", ("GPU", "Name", "State", "Step", "s/step", "Peak memory"), rows)
    )


def _peak(gpu: Run) -> str:
    peak = (gpu["memory"] or {}).get("peak")
    return "–" if peak is None else size(peak)


def _evaluations(run: Run) -> str:
    rows = [
        (
            f"{one['step']:,}",
            number(one["loss"]),
            number(one["baseline"]),
            _plus_minus(one),
            one["items"],
            one["failed"],
        )
        for one in run["evaluations"]
    ]
    head = ("Step", "Loss", "Without the adapter", "Difference ± standard error", "Items", "Failed")
    return folded("Every validation", table("Validation by step", head, rows)) if rows else ""


def _plus_minus(one: Run) -> str:
    if one["loss"] is None or one["baseline"] is None:
        return "–"
    error = one["standard_error"]
    return number(one["loss"] - one["baseline"]) + ("" if error is None else f" ± {number(error)}")


# ---- The adapter --------------------------------------------------------------------------------------------------


def _health(health: Run) -> Iterator[str]:
    """Of each role: how large the change is beside the base's weights, where, and over the steps."""
    for i, (role, found) in enumerate(health["roles"].items()):
        if not found["steps"]:
            continue
        last, ranks = found["change"][-1], found["effective_rank"][-1]
        known = [(value, path, rank) for value, path, rank in zip(last, found["paths"], ranks, strict=True) if value]
        name = "" if role == "default" else f" of {role}"
        if not known:
            yield paragraph(f"The change{name} could not be measured beside the base's weights.")
            continue
        known.sort(key=lambda row: -row[0])
        middle, (largest, where, _) = median(value for value, _, _ in known), known[0]
        yield paragraph(
            f"At step {found['steps'][-1]:,} the change{name} is {number(middle)} of the base's weight in the median "
            f"of {counted(len(known), 'layer')} (‖ΔW‖/‖W‖), at most {number(largest)} in {where}."
        )
        yield heat_map(found["paths"], last, f"Relative change{name} by block and kind of layer")
        rows = [(path, number(value), "–" if rank is None else number(rank, 1)) for value, path, rank in known[:TOP]]
        yield table(f"The layers that change most{name}", ("Layer", "‖ΔW‖/‖W‖", "Effective rank"), rows)
        if len(found["steps"]) > 1:
            yield _growth(found, name, 1000 + i)


def _growth(found: Run, name: str, place: int) -> str:
    each = [[value for value in row if value is not None] for row in found["change"]]
    lines = [
        Line(name=word, steps=found["steps"], values=[pick(row) if row else None for row in each], colour=colour)
        for word, pick, colour in (("largest", max, 1), ("median", median, 3))
    ]
    return figure(Chart(title=f"Relative change{name} over the steps", lines=lines, from_zero=True), place)


# ---- What happened, and the config --------------------------------------------------------------------------------


def _entries(run: Run) -> str:
    rows = [
        (moment(one["time"]), "–" if one["step"] is None else f"{one['step']:,}", _kind(one), one["text"])
        for one in run["entries"]
        if one["kind"] in TOLD or one["level"] != "info"
    ]
    told = f"{counted(run['damaged'], 'line')} of the run's log could not be read." if run["damaged"] else ""
    shown = table("Notices, incidents and commands", ("Time", "Step", "What", "Words"), rows) if rows else ""
    return shown + (paragraph(told, "quiet") if told else "")


def _kind(entry: Run) -> Html:
    level = {"warn": "warn", "bad": "bad"}.get(entry["level"], "")
    return Html(f'<span class="{level}">{safe(entry["kind"])}</span>') if level else safe(entry["kind"])


def _log(run: Run) -> str:
    lines = [line["text"] if isinstance(line, Mapping) else line for line in run["log"]]
    return folded("The last lines of the log", code("\n".join(lines), "Log")) if lines else ""


def _config(config: Run) -> Iterator[str]:
    if config["input"]:
        yield code(config["input"], "Config as it was written")
    rows = [(key, _value(value)) for key, value in config["resolved"].items()]
    if rows:
        yield folded("Every value, with defaults", table("The resolved config", ("Key", "Value"), rows))


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
