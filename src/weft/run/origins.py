"""How an adapter or a run was made, from its header or its small files, and how two of them were made differently."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from weft.config.show import Change, diff
from weft.config.source import read_text
from weft.errors import ConfigError, ModelError, RunError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.describe import describe
from weft.formats.reading import read_adapter
from weft.run.changes import Change as LayerChange
from weft.run.changes import changes_of, difference, norm
from weft.run.config import load_config, parse_config

CONFIG = "weft.config"
# Facts of a file, and not of what was learned.
OF_TIME = ("started", "saved", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date",
           "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "verified")  # fmt: skip
IN_CONFIG = ("ss_", "modelspec.")  # beginnings of keys that say again, in other words, what a config of ours says


@dataclass(frozen=True)
class Origin:
    """Where something comes from. config: resolved where this Weft reads it, else as it was written. facts: of the
    header, by their names without weft. adapter: the file or folder with weights, where there is one."""

    path: Path
    what: str  # adapter, run, config
    config: Mapping[str, Any]
    facts: Mapping[str, str] = field(default_factory=dict)
    adapter: Path | None = None
    problems: tuple[str, ...] = ()  # why this Weft does not read the config


def origin_of(path: Path) -> Origin:
    """Of an adapter in any format, of a run's folder, or of a config. Raises WeftError for what is none of them."""
    if path.suffix in (".yaml", ".yml"):
        return Origin(path, "config", load_config(path).resolved())
    if (path / "config.yaml").is_file():
        return _of_run(path)
    found = describe(path)
    config, problems = _resolved(found.metadata.get(CONFIG, ""))
    ours = {name.removeprefix("weft."): value for name, value in found.metadata.items() if name != CONFIG}
    kept = {name: value for name, value in ours.items() if not (config and name.startswith(IN_CONFIG))}
    return Origin(path, "adapter", config, kept, path, problems)


def _of_run(folder: Path) -> Origin:
    """With the facts of its finished or newest adapter, where there is one."""
    config = load_config(folder / "config.yaml").resolved()
    steps = sorted(folder.glob("global_step_*"), key=lambda p: [int(w) for w in p.name.split("_") if w.isdecimal()])
    for adapter in [*sorted(folder.glob("adapter*")), *steps[::-1]]:
        if adapter.is_dir():
            found = origin_of(adapter)
            return Origin(folder, "run", config, found.facts, adapter)
    said = folder / "environment.json"
    facts = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    return Origin(folder, "run", config, {"git": facts["git"] or ""} if "git" in facts else {})


def _resolved(text: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The config in a header with the defaults of this Weft where that is older; else as it is, and why."""
    try:
        raw = json.loads(text) if text else {}
    except ValueError as damaged:
        return {}, (f"the config in the header is damaged: {damaged}",)
    if not raw:
        return {}, ()
    try:
        return parse_config(read_text(text, "the header")).resolved(), ()
    except ConfigError as refused:
        return raw, tuple(problem.partition(": ")[2] for problem in refused.problems)  # it is one line: no places


# ---- How two differ -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """How far the changes of two adapters lie from one another, all layers together. relative: ||A - B|| / ||A||.
    cosine: None where a change depends on the weight, as with DoRA and OFT."""

    relative: float
    cosine: float | None
    layers: int
    alone: int  # layers that only one of them has


@dataclass(frozen=True)
class Differences:
    """Of two origins. why_not: why their weights were not compared."""

    config: tuple[Change, ...]
    facts: tuple[Change, ...]
    apart: Apart | None
    why_not: str = ""

    @property
    def none(self) -> bool:
        """Whether they were made alike, and, where both have weights, change the same."""
        return not (self.config or self.facts) and (self.apart is None or self.apart.relative == 0)


def differences(one: Origin, other: Origin) -> Differences:
    """How the second differs from the first. Facts are compared where both have some."""
    both = bool(one.facts and other.facts)
    facts = diff(*(_lasting(origin.facts) for origin in (one, other))) if both else []
    configs = diff(one.config, other.config) if one.config and other.config else []
    if one.adapter is None or other.adapter is None:
        return Differences(tuple(configs), tuple(facts), None, "one of them has no weights")
    try:
        return Differences(tuple(configs), tuple(facts), apart(*map(read_adapter, (one.adapter, other.adapter))))
    except (ModelError, RunError) as unreadable:
        return Differences(tuple(configs), tuple(facts), None, str(unreadable))


def _lasting(facts: Mapping[str, str]) -> dict[str, Any]:
    """Without what differs from one writing to the next; versions one by one."""
    kept: dict[str, Any] = {name: value for name, value in facts.items() if name not in OF_TIME}
    if "versions" in kept:
        kept["versions"] = json.loads(kept["versions"])
    return kept


def apart(one: SavedAdapter, other: SavedAdapter) -> Apart:
    """How far two adapters' changes lie apart. Raises ModelError for layers of different sizes or kinds."""
    first, second = dict(changes_of(one)), dict(changes_of(other))
    shared = [path for path in first if path in second]
    lengths = {path: _length(change) for path, change in first.items()}
    others = {path: _length(change) for path, change in second.items()}
    missing = [lengths[path] for path in first if path not in second] + [
        others[path] for path in second if path not in first
    ]
    squares = sum(length**2 for length in missing)
    for path in shared:
        relative = difference(first[path], second[path])
        if relative == float("inf") and lengths[path]:
            raise ModelError(f"layer {path}: the two change it in different ways, or have other sizes.")
        squares += (relative * lengths[path] if lengths[path] else others[path]) ** 2
    whole, theirs = sqrt(sum(n**2 for n in lengths.values())), sqrt(sum(n**2 for n in others.values()))
    products = [_product(first[path], second[path]) for path in shared]
    told = [p for p in products if p is not None]
    cosine = sum(told) / (whole * theirs) if len(told) == len(products) and whole and theirs else None
    relative = sqrt(squares) / whole if whole else float(bool(squares))
    return Apart(relative, None if cosine is None else max(-1.0, min(1.0, cosine)), len(shared), len(missing))


def _length(change: LayerChange) -> float:
    """The norm of what is added; of a rotation, how far it turns."""
    if change.factors is not None:
        return norm(*change.factors)
    held = change.rotation if change.rotation is not None else change.whole
    assert held is not None
    return float(held.norm())


def _product(one: LayerChange, other: LayerChange) -> float | None:
    """The inner product of two changes; None where they depend on the weight."""
    if one.magnitude is not None or one.rotation is not None:
        return None
    if one.factors is not None and other.factors is not None:
        (b1, a1), (b2, a2) = one.factors, other.factors
        return float(((b1.mT @ b2) * (a1 @ a2.mT)).sum())
    return float((one.delta().double() * other.delta().double()).sum())
