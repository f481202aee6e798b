"""Frozen records of what happened in a run: code tells them, listeners write or draw them and change nothing."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; kind is the name in the log."""

    kind: ClassVar[str]

    def record(self) -> dict[str, Any]:
        """The event as plain data for one line of JSON."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """The run entered a phase: starting, caching, training, validating, sampling, saving, paused."""

    kind: ClassVar[str] = "phase"
    phase: str
    total: int | None = None  # units of work ahead, when known


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something that the user should read: a checkpoint passed over, an item that failed."""

    kind: ClassVar[str] = "notice"
    text: str


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """One unit of a phase's work is done."""

    kind: ClassVar[str] = "progress"
    phase: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    kind: ClassVar[str] = "run_started"
    name: str
    step: int  # 0, or the step of the checkpoint that it resumed from
    total_steps: int
    resumed_from: str | None
    trainable: int
    device: str
    rank: int = 0
    world: int = 1


@dataclass(frozen=True, kw_only=True)
class StepEnded(Event):
    """metrics: `phase/quantity` -> mean over items and ranks. seconds: of the step, by part. items: learned from on all
    ranks, of text the tokens. memory: bytes that this process has of its GPU, or of the machine; None where unknown."""

    kind: ClassVar[str] = "step"
    step: int
    experience: str
    metrics: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    items: int = 0
    memory: int | None = None
    keys: tuple[str, ...] = ()  # items drawn in this step, in order


@dataclass(frozen=True, kw_only=True)
class Incident(Event):
    """A step whose loss or gradient was not finite; nothing was learned from it."""

    kind: ClassVar[str] = "incident"
    step: int
    phase: str
    reason: str
    folder: str | None
    in_a_row: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Validation on fixed noise. baseline: the same with the adapter off. failed: items that could not be measured."""

    kind: ClassVar[str] = "evaluated"
    step: int
    loss: float | None
    baseline: float | None
    by_time: Mapping[str, float]
    baseline_by_time: Mapping[str, float]
    items: int
    failed: int
    by_expert: Mapping[str, float] = field(default_factory=dict)  # where several experts are trained
    standard_error: float | None = None  # of the paired difference to the baseline


@dataclass(frozen=True, kw_only=True)
class Sampled(Event):
    kind: ClassVar[str] = "sampled"
    step: int
    prompt: str
    seed: int
    file: str
    adapter: bool  # False: the base model, for comparison


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    kind: ClassVar[str] = "saved"
    step: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Exported(Event):
    kind: ClassVar[str] = "exported"
    step: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Controlled(Event):
    """Somebody told the running trainer what to do, and it was done or refused. by: ctl or dashboard."""

    kind: ClassVar[str] = "control"
    step: int  # steps that were done when it was taken
    id: str
    command: str
    arguments: Mapping[str, Any]
    by: str
    done: bool
    reason: str = ""  # why not, or what came of it


@dataclass(frozen=True, kw_only=True)
class Scored(Event):
    """How well a model that has learned the stream up to one experience does on each experience, later ones too."""

    kind: ClassVar[str] = "scored"
    step: int
    after: str  # the experience that was just learned
    metric: str  # accuracy, macro_f1, ...
    scores: Mapping[str, float]  # experience -> value; one row of the matrix


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    kind: ClassVar[str] = "run_ended"
    step: int
    outcome: str  # finished | stopped | failed
    reason: str = ""


Listener = Callable[[Event], None]


def tell_all(*listeners: Listener) -> Listener:
    """One listener that passes each event to several, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
