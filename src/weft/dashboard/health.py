"""The adapter's size and effective rank over the steps, and the matrix of a continual run's scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.dashboard.small_files import text_of
from weft.dashboard.tail import number
from weft.run.predictions import UNTRAINED

LARGEST = 64 << 20  # bytes of health.jsonl that are read
Cut = tuple[float, int]  # time and step of a resume: what was measured earlier beyond that step is not the run's


def health_of(path: Path, cuts: Sequence[Cut]) -> dict[str, Any]:
    """Role -> kind, rank, paths, steps, and for each step a list of its layers' values. Of a step that was repeated
    after a resume the later line counts."""
    roles: dict[str, dict[int, dict[str, Any]]] = {}
    for line in text_of(path, LARGEST).split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_sound(record) and not any(record["time"] < at and record["step"] > step for at, step in cuts):
            roles.setdefault(record["role"], {})[record["step"]] = record
    return {"roles": {role: _table(lines) for role, lines in roles.items()}}


def _is_sound(record: Any) -> bool:
    if not isinstance(record, dict) or type(record.get("step")) is not int or not isinstance(record.get("role"), str):
        return False
    columns = [record.get(name) for name in ("paths", "change", "effective_rank")]
    return (
        number(record.get("time")) is not None
        and all(isinstance(column, list) for column in columns)
        and len({len(column) for column in columns if column is not None}) == 1
    )


def _table(lines: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One role's lines as rows of steps over the layers of the last of them."""
    steps = sorted(lines)
    last = lines[steps[-1]]
    paths = [str(path) for path in last["paths"]]
    table: dict[str, Any] = {"kind": last.get("kind"), "rank": last.get("rank"), "paths": paths, "steps": steps}
    for name in ("change", "effective_rank"):
        table[name] = [_row(lines[step], name, paths) for step in steps]
    return table


def _row(line: Mapping[str, Any], name: str, paths: Sequence[str]) -> list[float | None]:
    if line["paths"] == list(paths):
        return [number(value) for value in line[name]]
    by_path = dict(zip(map(str, line["paths"]), line[name], strict=True))
    return [number(by_path.get(path)) for path in paths]


def matrix(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each metric the rows "after an experience" over the columns "measured on", in the order in which they were
    learned; the first metric that was told is the main one. learned: of a row, how many columns were learned by then.
    The row from before any training stands apart, in `untrained`."""
    sound = [row for row in rows if isinstance(row.get("scores"), dict)]
    columns = dict.fromkeys(str(name) for row in sound for name in row["scores"])
    learned = [name for name in dict.fromkeys(str(row.get("after")) for row in sound) if name != UNTRAINED]
    if not columns.keys().isdisjoint(learned):  # else one experience held them all
        columns = dict.fromkeys(learned) | columns
    tables: dict[str, Any] = {}
    for row in sound:
        table = tables.setdefault(str(row.get("metric")), {"rows": [], "untrained": None})
        line = _scores(row, list(columns))
        if line["after"] == UNTRAINED:
            table["untrained"] = line
        else:
            table["rows"].append(line)
    main = next(iter(tables), None)
    return {
        "metric": main, "experiences": list(columns),
        **(tables[main] if main is not None else {"rows": [], "untrained": None}), "metrics": tables,
    }  # fmt: skip


def _scores(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    after = str(row.get("after"))
    learned = columns.index(after) + 1 if after in columns else 0 if after == UNTRAINED else len(columns)
    values = [number(row["scores"].get(name)) for name in columns]
    return {"after": after, "step": row.get("step"), "learned": learned, "values": values}
