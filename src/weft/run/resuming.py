"""Whether a run may go on from a checkpoint: what it is made of must be what it was, but for what changes no number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weft.config.show import Change, diff
from weft.errors import RunError
from weft.run.checkpoint import Checkpoint, read_checkpoint
from weft.run.config import FIXED_ON_RESUME, FREE_ON_RESUME, RunConfig


def resumed_state(config: RunConfig, inputs: Mapping[str, str], checkpoint: Path | None) -> Checkpoint | None:
    """The checkpoint, its tensors unread. Raises RunError with the differences when config or inputs are others."""
    if checkpoint is None:
        return None
    saved = read_checkpoint(checkpoint)
    before, now = spelled_out(completed(saved.config), {**config.resolved(), "inputs": dict(inputs)})
    changes = [c for c in diff(before, now) if not is_free(c, config.resume_allow)]
    if changes:
        lines = "\n".join(f"  {c.path}: {c.old!r} -> {c.new!r}" for c in changes)
        paths = sorted({c.path for c in changes})
        fixed = [path for path in paths if is_under(as_of_all(path), FIXED_ON_RESUME)]
        allow = "" if fixed else f", or allow it: resume_allow=[{','.join(paths)}]"
        raise RunError(
            f"{config.folder} cannot go on from {checkpoint.name}: what it is made of has changed since.\n{lines}\n"
            f"Change it back, or give the run another 'name'{allow}."
        )
    if saved.step > config.schedule.steps:
        raise RunError(
            f"{checkpoint} is at step {saved.step}, beyond the {config.schedule.steps} steps that "
            f"schedule.{'epochs' if config.schedule.epochs is not None else 'steps'} makes. Raise it."
        )
    return saved


def completed(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved config with the defaults of keys that came into being since; as it is where it no longer parses."""
    plain = dict(saved)
    inputs = plain.pop("inputs", {})
    try:
        return {**RunConfig.model_validate(plain).resolved(), "inputs": inputs}
    except ValidationError:
        return saved


def spelled_out(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two configs with the roles' own sections written out wherever either has one, so that they differ key by key."""
    roles = [dict(config.get("roles") or {}) for config in (saved, now)]
    for name in sorted({*roles[0], *roles[1]}):
        own = [dict(each.get(name) or {}) for each in roles]
        for section in ("adapter", "optimizer"):
            if any(each.get(section) for each in own):
                for each, config in zip(own, (saved, now), strict=True):
                    each[section] = each.get(section) or config[section]
        for each, role in zip(roles, own, strict=True):
            each[name] = role
    first, second = ({**config, "roles": each} for config, each in zip((saved, now), roles, strict=True))
    return first, second


def as_of_all(path: str) -> str:
    """adapter.rank for roles.critic.adapter.rank: what a state cannot be fitted to is the same for a role."""
    return path.split(".", 2)[-1] if path.startswith("roles.") else path


def is_free(change: Change, allowed: Sequence[str]) -> bool:
    """Whether a change alters no number of the training, or is allowed by name."""
    return is_under(change.path, (*FREE_ON_RESUME, *allowed))


def is_under(path: str, keys: Sequence[str]) -> bool:
    """Whether a dotted path is one of the keys or lies within one."""
    return any(path == key or path.startswith(f"{key}.") for key in keys)
