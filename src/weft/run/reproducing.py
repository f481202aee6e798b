"""The run.yaml that an adapter was trained with, and whether data and base are still what they were."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from weft.config.show import diff
from weft.config.show import show as as_yaml
from weft.config.source import read_text
from weft.errors import ConfigError, ModelError, WeftError
from weft.run.config import RunConfig, parse_config
from weft.run.origins import Origin
from weft.run.surveyed import surveyed

SAME = (
    "Equal to the bit on the same hardware and versions, with the same number of processes, data, base and seed; "
    "elsewhere equal but for rounding."
)


def reproduced(origin: Origin, whole: bool = False) -> str:
    """A run.yaml that trains the same. whole: every key, also those that are as by default."""
    if origin.problems:
        written = as_yaml(origin.config)
        notes = ["This Weft does not read the config as it is:", *(f"  {problem}" for problem in origin.problems)]
    else:
        config = parse_config(read_text(json.dumps(origin.config)))
        written = as_yaml(config if whole else told_alone(config))
        notes = [] if whole else ["Keys that are as by default are left out; --full writes them too."]
    return "".join(f"# {line}\n" for line in [*header(origin), *notes]) + written


def told_alone(config: RunConfig) -> dict[str, Any]:
    """The config without what would be the same by default; all of it where leaving that out would change something."""
    resolved = config.resolved()
    short = dict(_apart(config, resolved))
    again = parse_config(read_text(json.dumps(short)))
    return short if not diff(resolved, again.resolved()) else resolved


def _apart(section: BaseModel, plain: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name -> plain value of the keys of a section that differ from their defaults, and of its kind."""
    for name, field in sorted(type(section).model_fields.items(), key=lambda item: item[0] != "kind"):  # the kind first
        if name not in plain:
            continue
        value = getattr(section, name)
        required = field.is_required()
        if name != "kind" and not required and value == field.get_default(call_default_factory=True):  # type: ignore[call-arg]
            continue
        yield name, _short(value, plain[name])


def _short(value: Any, plain: Any) -> Any:
    if isinstance(value, BaseModel) and isinstance(plain, Mapping):
        return dict(_apart(value, plain))
    if isinstance(value, list | tuple) and isinstance(plain, list | tuple):
        return [_short(item, its) for item, its in zip(value, plain, strict=True)]
    if isinstance(value, Mapping):
        return {key: _short(item, plain[key]) for key, item in value.items()}
    return plain


def header(origin: Origin) -> list[str]:
    """What has to be known beside the config, a line each."""
    facts = origin.facts
    versions = json.loads(facts.get("versions", "{}"))
    told = {
        "step": " of ".join(filter(None, (facts.get("step", ""), facts.get("steps", "")))),
        "expert": facts.get("expert", "").replace("default", ""),
        "saved": _date(facts.get("saved", "")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "git": facts.get("git", ""),
        "Weft's own commit": facts.get("source", ""),
        "hardware": ", ".join(filter(None, (facts.get("hardware", ""), facts.get("precision", ""), _many(facts)))),
        "data": _items(facts),
        "base": facts.get("base", ""),
        "seed": facts.get("seed", ""),
        "changed while training": facts.get("rates", ""),
    }
    lines = [f"The run that made {origin.path}", *(f"{name}: {value}" for name, value in told.items() if value)]
    return [*lines, "Paths count from the folder in which that run was started.", SAME, *_unlike(facts)]


def _many(facts: Mapping[str, str]) -> str:
    count = facts.get("processes", "")
    return {"": "", "1": "1 process"}.get(count, f"{count} processes, {facts.get('items_per_step', '?')} items a step")


def _items(facts: Mapping[str, str]) -> str:
    return f"{facts['data']} ({facts.get('data.items', '?')} items)" if facts.get("data") else ""


def _date(seconds: str) -> str:
    return datetime.fromtimestamp(int(seconds)).astimezone().isoformat(" ", "minutes") if seconds.isdecimal() else ""


def _unlike(facts: Mapping[str, str]) -> Iterator[str]:
    """Why a run of this config would not make this adapter."""
    if facts.get("git", "").endswith("+") or facts.get("source", "").endswith("+"):
        yield "A + after a commit: files had been changed since."
    if facts.get("step") and facts.get("steps") and facts["step"] != facts["steps"]:
        yield f"This adapter is of step {facts['step']}: the run saves it there only where save.every says so."
    if facts.get("rates"):
        yield "Learning rates were changed while it trained, which a config cannot repeat."


# ---- Whether all is still there -----------------------------------------------------------------------------------


def warnings_of(origin: Origin) -> Iterator[str]:
    """A sentence for each thing that is no longer what it was: base, data, and a run folder in the way."""
    if origin.problems or not origin.config:
        return
    config = parse_config(read_text(json.dumps(origin.config)))
    if config.folder.exists():
        yield (
            f"{config.folder} is there: training would go on with that run, not repeat it. "
            "Write another name: weft train run.yaml name=again"
        )
    yield from _of_base(config, origin.facts.get("base", ""))
    yield from _of_data(config, origin.facts.get("data", ""))


def _of_base(config: RunConfig, hash_then: str) -> Iterator[str]:
    try:
        now = config.family.identity()["network"]
    except (WeftError, OSError) as missing:
        yield f"the base cannot be compared: {missing}"
        return
    if hash_then and now != hash_then:
        yield f"family.source: {config.family.source} is another model now ({now}, then {hash_then})"


def _of_data(config: RunConfig, hash_then: str) -> Iterator[str]:
    try:
        now = surveyed(config).digest()
    except (WeftError, OSError) as missing:
        yield f"the data cannot be compared: {missing}"
        return
    if hash_then and now != hash_then:
        yield f"data: clips, captions or their buckets are others now ({now[:12]}…, then {hash_then[:12]}…)"


def refuse_untrained(origin: Origin) -> None:
    """Raises ModelError for a config, a sum of adapters, and an adapter whose header does not tell its making."""
    if origin.what == "config":
        raise ModelError(
            f"{origin.path} is a config, which is what weft reproduce finds. Train it: weft train {origin.path}"
        )
    if "merged" in origin.facts:
        parents = [parent["adapter"] for parent in json.loads(origin.facts["merged"]).get("parents", [])]
        raise ModelError(
            f"{origin.path} was put together from {', '.join(parents) or 'others'}, not trained. "
            "Ask weft reproduce for each of them."
        )
    if not origin.config and not any(name.startswith("ss_") for name in origin.facts):
        raise ModelError(
            f"{origin.path}: its header says nothing of how it was trained. What it is tells: weft show {origin.path}"
        )


def refuse_overwriting(out: Path, overwrite: bool) -> None:
    """Raises ConfigError for a file that is there, and for a folder."""
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder. Name a file, such as {out / 'run.yaml'}.")
    if out.exists() and not overwrite:
        raise ConfigError(f"--out: {out} is there already. Choose another name, or say --overwrite.")
