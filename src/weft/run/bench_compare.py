"""Two files of figures side by side: the ratios of the cases that are in both."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.run.bench_figures import SCHEMA

SAME = ("device", "gpu", "processor", "threads")  # of the hardware that absolute times depend on
FREE = ("source",)  # of a case, that change no number


@dataclass(frozen=True)
class Line:
    """One case. time and memory: of the second file over the first; None where one of them does not know."""

    name: str
    first: float
    second: float
    memory: float | None

    @property
    def time(self) -> float:
        return self.second / self.first


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The cases of a file that `weft bench --json` wrote. Raises ConfigError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as missing:
        raise ConfigError(f"weft bench compare: {path} cannot be read ({missing.strerror}).") from missing
    except ValueError as damaged:
        raise ConfigError(f"weft bench compare: {path} is no JSON ({damaged}).") from damaged
    cases = found if isinstance(found, list) else [found]
    for case in cases:
        told = case.get("schema") if isinstance(case, Mapping) else None
        if told != SCHEMA:
            raise ConfigError(
                f"weft bench compare: {path} has schema {told}, and this Weft reads {SCHEMA}. Write it anew with "
                "weft bench --json."
            )
    return cases


def compared(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], force: bool) -> list[Line]:
    """A line for each case, in the first file's order. Raises ConfigError for cases or hardware that differ; force:
    compares what is in both all the same."""
    one, other = named(first), named(second)
    if not force:
        check(one, other)
    return [line(name, one[name], other[name]) for name in one if name in other]


def named(cases: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name; of a config of one's own by what it was. The last of a name counts."""
    return {name_of(each["case"]): each for each in cases}


def name_of(case: Mapping[str, Any]) -> str:
    if "name" in case:
        return case["name"]
    shape = f"{case['frames']}x{case['height']}x{case['width']}" if "frames" in case else f"{case['tokens']} tokens"
    return f"{Path(case['source']).name} {shape} batch {case['batch']}"


def check(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ConfigError with every difference that makes a ratio meaningless."""
    found = [f"only one file has '{name}'" for name in sorted({*one} ^ {*other})]
    for name in one.keys() & other.keys():
        for part, keys, free in (("case", None, FREE), ("hardware", SAME, ())):
            a, b = one[name][part], other[name][part]
            differ = [k for k in keys or {*a, *b} if k not in free and a.get(k) != b.get(k)]
            found += [f"'{name}': {part}.{k} is {a.get(k)} in the first and {b.get(k)} in the second" for k in differ]
    if found:
        more = f", and {len(found) - 3} differences more" if len(found) > 3 else ""
        raise ConfigError(
            f"weft bench compare: the files are not of the same: {'; '.join(found[:3])}{more}. Repeat one of them as "
            "the other was made, or write --force to see the ratios all the same."
        )


def line(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Line:
    peaks = [each["memory_bytes"]["peak"] for each in (a, b) if each["memory_bytes"]["by"] != "process"]
    memory = peaks[1] / peaks[0] if len(peaks) == 2 and all(peaks) else None
    return Line(name, a["step_seconds"]["median"], b["step_seconds"]["median"], memory)
