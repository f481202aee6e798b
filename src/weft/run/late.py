"""The account of steps: their numbers come to the host when the device has long gone on to the next one."""

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from weft.contracts import Batch, Phase
from weft.events import Listener, StepEnded
from weft.run.learner import Learner
from weft.run.stopwatch import Stopwatch

Key = TypeVar("Key", bound=Hashable)


class Sent(Generic[Key]):
    """Numbers by name on their way from a device to the host. `read` waits for these, and for no later work.

    Those that are the host's already stay as they are. All others are () tensors; they are copied, so that the device
    may write over them at once. Sums of integers come over exactly where the device knows fp64.
    """

    def __init__(self, values: Mapping[Key, Tensor | float], device: torch.device) -> None:
        there = {key: v for key, v in values.items() if isinstance(v, Tensor) and v.device.type == device.type}
        self._here = {key: float(value) for key, value in values.items() if key not in there}
        by_kind: dict[torch.dtype, dict[Key, Tensor]] = {}
        for key, value in there.items():
            by_kind.setdefault(value.dtype, {})[key] = value.detach()
        self._names = [key for kind in by_kind.values() for key in kind]
        wide = torch.float32 if device.type == "mps" else torch.float64
        packed = [torch.stack(list(kind.values())).to(wide) for kind in by_kind.values()]
        self._numbers = torch.cat(packed) if packed else torch.empty(0)
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda" and packed:
            host = torch.empty(self._numbers.shape, dtype=wide, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[Key, float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here | dict(zip(self._names, self._numbers.tolist(), strict=True))


@dataclass(frozen=True)
class Launched:
    """A phase that the device has been given to do. Numbers are on the device, or on the host where they are known.

    metrics: means over items and ranks, norms and rates. moved: whether each optimizer did, by its name. after: what
    adapters tell of a step that was not skipped. items: of all ranks. stopping, asked: whether any rank was asked to
    stop, or knew of commands, when the phase began. scaled: a skip is fp16 loss scaling at work. step: its number.
    drawn: micro-batches of all ranks until then.
    """

    phase: Phase
    batches: Sequence[Batch]
    step: int
    drawn: int
    metrics: Mapping[str, Tensor | float]
    moved: Mapping[str, Tensor | float]
    after: Mapping[str, Tensor | float]
    items: Tensor | float
    stopping: Tensor | float = 0.0
    asked: Tensor | float = 0.0
    scaled: bool = False

    def numbers(self) -> dict[tuple[str, str], Tensor | float]:
        """All of its numbers under two names: of what, and which."""
        named = {"metrics": self.metrics, "moved": self.moved, "after": self.after}
        alone = {"items": self.items, "stopping": self.stopping, "asked": self.asked}
        return {(of, name): v for of, mapping in {**named, "": alone}.items() for name, v in mapping.items()}


@dataclass(frozen=True)
class Outcome:
    """What one phase did, known on the host. metrics: means over items and ranks. items: of all ranks. step: its
    number, counted from 1. drawn: micro-batches of all ranks until then."""

    metrics: dict[str, float]
    skipped: tuple[str, ...]  # optimizers that did not move
    batches: Sequence[Batch]
    items: int = 0
    stopping: bool = False  # whether any rank was asked to stop when the phase began
    asked: bool = False  # whether commands lay in the inbox then
    overflow: bool = False  # whether a skip is fp16 loss scaling at work
    step: int = 0
    drawn: int = 0

    @property
    def moved(self) -> bool:
        return not self.skipped


def outcome_of(launched: Launched, numbers: Mapping[tuple[str, str], float]) -> Outcome:
    """What came of a phase, once its numbers are here."""

    def part(of: str) -> dict[str, float]:
        return {name: value for (kind, name), value in numbers.items() if kind == of}

    alone = part("")
    skipped = tuple(name for name in launched.moved if not numbers["moved", name])
    logged = {f"{launched.phase.name}/skipped": 1.0} if skipped else part("after")
    known = part("metrics")
    return Outcome(
        {name: known[name] for name in launched.metrics} | logged,
        skipped,
        launched.batches,
        int(alone["items"]),
        alone["stopping"] > 0,
        alone["asked"] > 0,
        launched.scaled and bool(skipped),
        launched.step,
        launched.drawn,
    )


class Milestones(Protocol):
    """What happens between steps; none of it changes what is learned."""

    def is_due(self, learner: Learner) -> bool:
        """Whether something happens after this step for which all before it must be known. All ranks say the same."""
        ...

    def after_step(self, learner: Learner) -> None: ...
    def after_experience(self, learner: Learner) -> None: ...
    def skipped(self, learner: Learner, phase: Phase, outcome: Outcome) -> None:
        """A step whose gradient was not finite. Raises RunError when there were too many in a row."""
        ...


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device has been given to do."""

    number: int
    experience: str
    phases: Sequence[Launched]
    watch: Stopwatch
    memory: int | None
    sent: Sent[tuple[int, tuple[str, str]]]


@dataclass
class Journal:
    """Steps that nobody has been told of yet, at most `depth` of them; they are told in order.

    With depth 1 a step is told when the next has been launched: skips are then counted, and refused when they are too
    many, one step late. Whatever needs a step that is wholly known settles first.
    """

    learner: Learner
    milestones: Milestones
    tell: Listener
    depth: int
    _under_way: deque[LaunchedStep] = field(default_factory=deque)
    _said: tuple[bool, bool] = (False, False)

    def add(self, step: LaunchedStep) -> None:
        """Take in a step, and tell those that are due."""
        self._under_way.append(step)
        while len(self._under_way) > self.depth:
            self._tell(self._under_way.popleft())

    def settle(self) -> None:
        """Tell all that is under way."""
        while self._under_way:
            self._tell(self._under_way.popleft())

    def words(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether commands had come, in the steps told since this was last
        asked. When there is a word, all that is under way is settled. Every rank hears the same after the same step."""
        if any(self._said):
            self.settle()
        said, self._said = self._said, (False, False)
        return said

    @contextmanager
    def told_first(self) -> Iterator[None]:
        """Around the launch of a step: when it fails, the steps before it are told all the same."""
        try:
            yield
        except Exception as failed:
            try:
                self.settle()
            except Exception as also:
                failed.add_note(f"The step before it could not be told: {also}")
            raise

    def _tell(self, step: LaunchedStep) -> None:
        learner, metrics, items = self.learner, {}, 0
        numbers = step.sent.read()
        for place, launched in enumerate(step.phases):
            outcome = outcome_of(launched, {name: v for (at, name), v in numbers.items() if at == place})
            learner.skipped_in_a_row = 0 if outcome.moved else learner.skipped_in_a_row + 1
            if not outcome.moved:
                self.milestones.skipped(learner, launched.phase, outcome)
            metrics |= outcome.metrics
            items += outcome.items
            self._said = (self._said[0] or outcome.stopping, self._said[1] or outcome.asked)
        keys = tuple(key for launched in step.phases for batch in launched.batches for key in batch.keys)
        self.tell(
            StepEnded(
                step=step.number, experience=step.experience, metrics=metrics, seconds=step.watch.seconds(),
                items=items, memory=step.memory, keys=keys,
            )
        )  # fmt: skip
