"""Small texts that `weft show` and its neighbours print: sizes, sections, and what is said of a value."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.config.show import show as as_yaml

Facts = dict[str, Any]

LONGEST = 100  # columns of a value; --json cuts nothing
NUMBERS = re.compile(r"\d{1,12}(?:\.\d+)?|\[\d[\d., ]*\d\]")  # one or several; a hash is none
MARGIN = 17  # columns before a value
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8 e5m2"}


def json_in(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty when there is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def json_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is not there, or another."""
    return json_in(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}


def size_words(count: int) -> str:
    """Bytes in a unit."""
    units = (("GiB", 30), ("MiB", 20), ("KiB", 10))
    return next((f"{count / 2**power:.1f} {unit}" for unit, power in units if count >= 2**power), f"{count} bytes")


def some(names: Sequence[str], count: int = 3) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def printed(facts: Facts) -> str:
    """Facts for people, a line or more each."""
    return "\n".join(f"{name:<{MARGIN - 1}} {value_words(value)}" for name, value in facts.items())


def value_words(value: Any) -> str:
    """A value for people: sections as YAML, one entry a line, below one another, without what is empty."""
    if isinstance(value, Mapping):
        return ("\n" + " " * MARGIN).join(_cut(line) for line in as_yaml(_told(value)).splitlines())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\n" + " " * MARGIN)


def _told(value: Any) -> Any:
    """A section without null, {} and [], its numbers as numbers and in six digits; --json has all as it stands."""
    if isinstance(value, Mapping):
        told = {key: _told(item) for key, item in value.items()}
        return {key: item for key, item in told.items() if item is not None and item not in ({}, [])}
    if isinstance(value, list):
        return [_told(item) for item in value]
    if isinstance(value, str) and NUMBERS.fullmatch(value) and str(json.loads(value)) == value:
        return _told(json.loads(value))
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
