"""What happened in a run, one sentence an event: for the list of entries on its page and in its report."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from weft.dashboard.tail import number

Entry = dict[str, Any]  # time, step or null, kind, text, level: info | warn | bad
LONGEST = 2000  # letters of a text


def entry_of(record: Mapping[str, Any]) -> Entry | None:
    """The entry of an event, None for one that is drawn otherwise or that this version does not know."""
    maker = SENTENCES.get(record["event"])
    said = maker(record) if maker else None
    if said is None:
        return None
    kind, text, level = said
    step = record.get("step")
    return {"time": record["time"], "step": step if type(step) is int else None, "kind": kind,
            "text": text[:LONGEST], "level": level}  # fmt: skip


Said = tuple[str, str, str] | None


def _notice(record: Mapping[str, Any]) -> Said:
    return "notice", str(record.get("text")), "info"


def _started(record: Mapping[str, Any]) -> Said:
    step = record.get("step")
    return ("resumed", f"Resumed from the checkpoint of step {step}.", "info") if step else None


def _incident(record: Mapping[str, Any]) -> Said:
    where = "; its items and numbers are kept in incidents/" if record.get("folder") else ""
    row = record.get("in_a_row")
    many = f", the {row}th in a row" if isinstance(row, int) and row > 3 else ""
    said = f"Nothing was learned from step {record.get('step')}, {record.get('phase')}: {record.get('reason')}"
    return "incident", f"{said}{many}{where}.", "warn" if where or many else "info"


def _evaluated(record: Mapping[str, Any]) -> Said:
    loss, baseline, failed = number(record.get("loss")), number(record.get("baseline")), record.get("failed")
    if loss is None:
        return "evaluated", f"Validation at step {record.get('step')} could not measure a single item.", "bad"
    beside = f", without the adapter {baseline:.4f}" if baseline is not None else ""
    lost = f"; {failed} items could not be measured" if failed else ""
    return (
        "evaluated",
        f"Validation at step {record.get('step')}: {loss:.4f}{beside}{lost}.",
        "warn" if lost else "info",
    )


def _sampled(record: Mapping[str, Any]) -> Said:
    if PurePath(str(record.get("file"))).stem != "00":  # one entry for all that are made together
        return None
    who = f"Samples of step {record.get('step')}" if record.get("adapter") else "Samples without the adapter"
    return "sampled", f"{who} are there.", "info"


def _saved(record: Mapping[str, Any]) -> Said:
    return "saved", f"The checkpoint of step {record.get('step')} is whole.", "info"


def _exported(record: Mapping[str, Any]) -> Said:
    return "exported", f"The finished adapter is written: {PurePath(str(record.get('folder'))).name}/.", "info"


def _control(record: Mapping[str, Any]) -> Said:
    given = record.get("arguments")
    asked = given.items() if isinstance(given, dict) else ()
    values = [f"times {value}" if name == "factor" else str(value) for name, value in asked if value is not None]
    order = " ".join([str(record.get("command")).capitalize(), *values])
    whence = {"ctl": "from a shell", "dashboard": "from the dashboard"}.get(str(record.get("by")), "by a file")
    why = f": {str(record.get('reason')).removesuffix('.')}" if record.get("reason") else ""
    if record.get("done"):
        return "control", f"{order}, asked {whence}{why}.", "info"
    return "control", f"{order}, asked {whence}, was refused{why}.", "warn"


def _scored(record: Mapping[str, Any]) -> Said:
    scores = record.get("scores")
    values = [v for v in map(number, scores.values()) if v is not None] if isinstance(scores, dict) else []
    mean = f"{sum(values) / len(values):.4f} on the average of {len(values)}" if values else "not measured"
    return "scored", f"After {record.get('after')}: {record.get('metric')} {mean}.", "info"


def _ended(record: Mapping[str, Any]) -> Said:
    outcome, step = record.get("outcome"), record.get("step")
    if outcome == "failed":
        return "ended", f"Failed at step {step}: {record.get('reason')}", "bad"
    return "ended", f"{'Finished' if outcome == 'finished' else 'Stopped and saved'} at step {step}.", "info"


SENTENCES = {
    "notice": _notice, "run_started": _started, "incident": _incident, "evaluated": _evaluated, "sampled": _sampled,
    "saved": _saved, "exported": _exported, "control": _control, "scored": _scored, "run_ended": _ended,
}  # fmt: skip
