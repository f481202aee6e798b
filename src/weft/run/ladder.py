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
from weft.run.blocks import ROOM
from weft.run.config import RunConfig
from weft.run.estimate import Card, Estimate, card_of, device_of
from weft.run.parts import trained_of
from weft.run.questions import Shape
from weft.run.rungs import CACHE, MAKERS, Need, Step, host_memory
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


def room_in(memory: int) -> int:
    """Bytes of so large a memory that a run may be planned to fill."""
    return int(ROOM * memory)


def ladder(
    config: RunConfig, shapes: Sequence[Shape], limit: int, card: Card | None = None, layout: Layout = ALONE
) -> list[Rung]:
    """The rungs that lead each process of a run below a limit in bytes, each on top of those before; empty when it fits
    as it is. None of them could be left out.

    The last may still not fit: then nothing more is known. card: that the run is planned for, if not this machine's.
    """
    return descent(needed(config, largest(shapes), card or card_of(config), layout), limit)


def descent(need: Need, limit: int) -> list[Rung]:
    """The rungs from a need down to a limit in bytes."""
    taken: list[Taken] = []
    if need.estimate.total > limit:
        for each in climbed(need, limit):
            taken.append(each)
            if each.after.estimate.total <= limit:
                taken = without_idle(need, taken, limit)
                break
    return [each.rung() for each in taken]


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


@dataclass(frozen=True)
class Taken:
    """A step and what is needed after it."""

    step: Step
    after: Need

    def rung(self) -> Rung:
        lines = tuple(f"{key}={spelled(value)}" for key, value in self.step.changes.items())
        return Rung(self.step.name, lines, self.after.estimate.total, self.step.cost)


def climb(need: Need, limit: int) -> Iterator[Rung]:
    """All rungs from here on that leave less than before, in their order; shapes are cut as far as they must."""
    return (each.rung() for each in climbed(need, limit))


def climbed(need: Need, limit: int) -> Iterator[Taken]:
    for make in MAKERS:
        step = make(need, limit)
        after = None if step is None else stepped(need, step)
        if step is None or after is None:
            continue
        if after.estimate.total < need.estimate.total or step.opens or step.name == CACHE:
            need = after
            yield Taken(step, after)


def stepped(need: Need, step: Step) -> Need | None:
    """What is needed after a step; None where it is no way for this run."""
    changed = changed_config(need.config, step.changes)
    if changed is None:
        return None
    try:
        changed.engine.check(step.layout or need.layout)
        return need.of(changed, step.shape or need.shape, step.layout)
    except WeftError:  # such as a dtype that does not go with the precision
        return None


def without_idle(start: Need, taken: Sequence[Taken], limit: int) -> list[Taken]:
    """Without the steps that those after them have made needless, of which the dearest is left out first: an early step
    saves little where a late one saves far more than was missing."""
    kept = list(taken)
    for each in reversed(taken[:-1]):
        fewer = [other.step for other in kept if other.step is not each.step]
        again = None if each.step.name == CACHE else walked(start, fewer)
        if again is not None and again[-1].after.estimate.total <= limit:
            kept = again
    return kept


def walked(need: Need, steps: Sequence[Step]) -> list[Taken] | None:
    """Steps one after the other; None where one of them is no way without those that are not there."""
    found: list[Taken] = []
    for step in steps:
        after = stepped(need, step)
        if after is None:
            return None
        need = after
        found.append(Taken(step, after))
    return found


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
    # The same family knows already what its files hold and what its weights take.
    return changed if changed.family != config.family else changed.model_copy(update={"family": config.family})


def spelled(value: object) -> str:
    """A value as YAML reads it on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    return str(value)
