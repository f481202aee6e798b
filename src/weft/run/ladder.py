"""From what a run needs down to what there is: which ways to need less memory, and what each leaves."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from pydantic import ValidationError

from weft.engines.parallel import Layout
from weft.engines.residency import memory_of
from weft.errors import ConfigError, WeftError
from weft.run.config import RunConfig
from weft.run.estimate import Card, Estimate, card_of, device_of
from weft.run.parts import trained_of
from weft.run.questions import Shape
from weft.run.rungs import MAKERS, Need, host_memory
from weft.run.shares import ALONE

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One step down, on top of those before it. changes: `key=value` as on a command line. bytes: then needed."""

    name: str
    changes: tuple[str, ...]
    bytes: int
    cost: str

    def line(self) -> str:
        """The change as one would type it, what is then needed, and its price."""
        return f"{' '.join(self.changes)}  ({self.bytes / 2**30:.1f} GiB; {self.cost})"


def size_of(text: str) -> int:
    """Bytes of a size such as 16GiB, 16 GB, 900M or 17179869184. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--memory: '{text}' is no size. Write it like 16GiB, 24GB or 900M.")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def device_memory(config: RunConfig) -> int | None:
    """Bytes of the memory that the run's device computes in: a GPU's own, else the machine's or the container's.

    None where neither is known.
    """
    own = memory_of(device_of(config))
    return host_memory() if own is None else own


def ladder(
    config: RunConfig, shapes: Sequence[Shape], limit: int, card: Card | None = None, layout: Layout = ALONE
) -> list[Rung]:
    """The rungs that lead each process of a run below a limit in bytes, each on top of those before; empty when it fits
    as it is.

    The last may still not fit: then nothing more is known. card: that the run is planned for, if not this machine's.
    """
    need = needed(config, largest(shapes), card or card_of(config), layout)
    if need.estimate.total <= limit:
        return []
    rungs = []
    for rung in climb(need, limit):
        rungs.append(rung)
        if rung.bytes <= limit:
            break
    return rungs


def remedies(config: RunConfig, shape: Shape, limit: int, count: int = 3) -> list[Rung]:
    """The next rungs, whether or not the estimate says that they are needed: for a run that did not fit."""
    return list(islice(climb(needed(config, shape, card_of(config), config.parallel.least()), limit), count))


def needed(config: RunConfig, shape: Shape, card: Card, layout: Layout = ALONE) -> Need:
    """The need for a shape on a card."""
    trained, nothing = trained_of(config), Estimate(0, 0, 0, 0)
    spare = torch.cuda.device_count() if card.gpu else 1
    return Need(config, shape, card, trained, nothing, {}, layout, spare).of(config, shape)


def largest(shapes: Sequence[Shape]) -> Shape:
    return max(shapes, key=lambda shape: shape.tokens)


def climb(need: Need, limit: int) -> Iterator[Rung]:
    """All rungs from here on that leave less than before, in their order; shapes are cut as far as they must."""
    for make in MAKERS:
        step = make(need, limit)
        changed = None if step is None else changed_config(need.config, step.changes)
        if step is None or changed is None:
            continue
        try:
            changed.engine.check(step.layout or need.layout)
            after = need.of(changed, step.shape or need.shape, step.layout)
        except WeftError:  # such as a dtype that does not go with the precision: no way for this run
            continue
        if after.estimate.total < need.estimate.total or step.opens or step.name == "cache":
            need = after
            lines = tuple(f"{key}={spelled(value)}" for key, value in step.changes.items())
            yield Rung(step.name, lines, after.estimate.total, step.cost)


def changed_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """The config with other values at dotted keys; None where it does not take them."""
    plain = config.resolved()
    for key, value in changes.items():
        *path, last = key.split(".")
        section = plain
        for name in path:
            section = section[name]
        if section is None or last not in section:
            return None
        section[last] = value
    try:
        changed = RunConfig.model_validate(plain)
    except ValidationError:
        return None
    return changed


def spelled(value: object) -> str:
    """A value as YAML reads it on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    return str(value)
