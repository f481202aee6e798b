"""What a run was told to do: its config as written and as resolved, what of it is told in the list, and differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.dashboard.small_files import json_of, text_of, yaml_of

TEXT_LIMIT = 1 << 20  # bytes of a config's own text
UNLIKE_BY_NATURE = ("name", "output")  # every run has its own


def config_of(folder: Path) -> dict[str, Any]:
    """input: as the user wrote it. resolved: dotted key -> value. environment: versions, machine, command line."""
    return {
        "input": text_of(folder / "config.input.yaml", TEXT_LIMIT),
        "resolved": flat(yaml_of(folder / "config.yaml")),
        "environment": json_of(folder / "environment.json"),
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. A list of plain values is one value; one of mappings has a key for each of its items, so
    that a difference names the source or the prompt in which it lies."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            found |= flat({str(i): item for i, item in enumerate(value)}, f"{name}.")
        else:
            found[name] = value
    return found


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """family, model, objective, adapter and medium, in few words for the list."""
    family, adapter = _section(config, "family"), _section(config, "adapter")
    objective = str(_section(config, "objective").get("kind") or "")
    text = objective == "next-token" or family.get("kind") == "causal-lm"
    documents = family.get("kind") == "encoder"
    rank = adapter.get("rank")
    kind = str(adapter.get("kind") or "")
    return {
        "family": str(family.get("kind") or ""),
        "model": str(family.get("source") or ""),
        "objective": objective,
        "adapter": f"{kind}, rank {rank}" if rank is not None else kind,
        "medium": "text" if text else "documents" if documents else "video",
    }


def total_steps(config: Mapping[str, Any]) -> int | None:
    steps = _section(config, "schedule").get("steps")
    return steps if type(steps) is int else None


def prompts(config: Mapping[str, Any]) -> list[str]:
    """What samples are made of."""
    found = _section(config, "samples").get("prompts")
    listed = found if isinstance(found, list) else []
    return [str(item.get("text")) if isinstance(item, Mapping) else str(item) for item in listed]


def validates(config: Mapping[str, Any]) -> bool:
    data, every = _section(config, "data"), _section(config, "validation").get("every")
    return bool(every and (data.get("validation_items") or data.get("validation_sources")))


def base_rates(config: Mapping[str, Any], optimizers: Sequence[str]) -> dict[str, Any]:
    """Optimizer -> the learning rate at the top of its schedule, as the config has it."""
    common, roles = _section(config, "optimizer").get("lr"), _section(config, "roles")
    return {name: _section(_section(roles, name), "optimizer").get("lr", common) for name in optimizers}


def differing(configs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The keys in which resolved configs differ, with each one's value, and how many are the same in all."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [{"key": key, "values": [config.get(key) for config in configs]} for key in keys]
    unlike = [row for row in rows if any(value != row["values"][0] for value in row["values"][1:])]
    told = [row for row in unlike if row["key"] not in UNLIKE_BY_NATURE]
    return told, len(rows) - len(unlike)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
