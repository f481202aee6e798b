"""In which state a run is, in one word, with the reason as a sentence; from its files and the present time."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.dashboard.glance import Glance
from weft.dashboard.tail import number

PHASES = ("starting", "caching", "training", "validating", "sampling", "saving", "paused")
OVER = ("finished", "stopped", "crashed")
PATIENCE = 60.0  # seconds without a sign of work that are never a stall
HELD = 30.0  # seconds without a beat from a process that lives here: it does not run at all
USUAL_STEPS = 10  # so many steps' time is a usual gap
USUAL_GAPS = 5  # so many times the longest usual gap is none


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What a run's files say. alive: of its first rank's process; None where none wrote itself down."""

    alive: bool | None
    process: Mapping[str, Any]  # empty where none wrote itself down
    beat: Mapping[str, Any]  # of the first rank, empty without one
    glance: Glance
    updated: float | None  # when a file was last written, s since 1970
    seconds_per_step: float | None
    lost: tuple[int, ...] = ()  # other ranks whose processes are gone
    other_beats: tuple[Mapping[str, Any], ...] = ()  # of other ranks that live


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """since: when it came to be so, s since 1970. done, total, note: of the phase's units of work."""

    state: str
    phase: str
    since: float | None
    reason: str | None = None
    step: int = 0
    done: int | None = None
    total: int | None = None
    note: str = field(default="")

    @property
    def alive(self) -> bool:
        return self.state not in OVER


def judge(signs: Signs, now: float) -> Verdict:
    """The state of a run at a moment."""
    step = step_of(signs)
    ended = _end(signs)
    if ended is not None:
        return _ended(ended, step)
    if not signs.alive:
        return _vanished(signs, step)
    return _living(signs, step, now)


def step_of(signs: Signs) -> int:
    """Steps that are done: of the last process alone, for it may have gone back to a checkpoint."""
    steps = signs.glance.steps
    begun = signs.glance.begun["step"] if signs.glance.begun else 0
    return max(steps[-1]["step"], begun) if steps else begun


def _end(signs: Signs) -> Mapping[str, Any] | None:
    """The last word of the last process, None when it has not said it."""
    ended, started = signs.glance.ended, number(signs.process.get("started"))
    return ended if ended and (started is None or ended["time"] >= started - 1) else None


def _ended(ended: Mapping[str, Any], step: int) -> Verdict:
    outcome, said = ended.get("outcome"), str(ended.get("reason") or "")
    state = str(outcome) if outcome in ("finished", "stopped") else "crashed"
    reason = None
    if state == "crashed":
        interrupted = said.startswith("KeyboardInterrupt")
        reason = (
            f"Interrupted at step {step}, before it could save." if interrupted else f"Failed at step {step}: {said}"
        )
    elif said:
        reason = said
    return Verdict(state=state, phase=state, since=ended["time"], reason=reason, step=step)


def _vanished(signs: Signs, step: int) -> Verdict:
    phase, since = _phase(signs)
    last = max(filter(None, (number(signs.beat.get("time")), signs.glance.last_time)), default=None)
    where = f"at step {step}" if signs.glance.begun else f"while {_doing(phase)}, before its first step"
    if signs.alive is None:
        reason = f"Ended {where} without a word: a full disk leaves no room for one, and files may have been deleted."
    else:
        reason = (
            f"Ended without a word {where}: killed (most often for want of memory), or the machine went down. "
            "Start the same command again to go on from the newest checkpoint."
        )
    return Verdict(state="crashed", phase=phase, since=last or since, reason=reason, step=step)


def _living(signs: Signs, step: int, now: float) -> Verdict:
    phase, since = _phase(signs)
    beat = signs.beat if signs.beat.get("phase") == phase else {}
    counts = {"done": _count(beat, "done"), "total": _count(beat, "total"), "note": str(beat.get("note") or "")}
    if phase == "training":
        counts = {"done": None, "total": None, "note": ""}
    silent = silence(signs, now)
    if phase != "paused" and silent > patience(signs):
        at = now - silent
        gone = f" The process of rank {signs.lost[0]} is gone, for which the others wait." if signs.lost else ""
        why = "It may wait for a disk, a network or another process."
        if _is_held(signs, now):
            why = "It does not run at all: it is held (Ctrl-Z, SIGSTOP: go on with fg or kill -CONT), or swapped out."
        reason = f"No sign of work since {clock(at)}, while {_doing(phase)}; the process still lives. {why}{gone}"
        return Verdict(state="stalled", phase=phase, since=at, reason=reason, step=step, **counts)
    return Verdict(state=phase, phase=phase, since=since, step=step, **counts)


def _is_held(signs: Signs, now: float) -> bool:
    """Whether not even the beating thread of a process on this machine comes to work."""
    at = number(signs.beat.get("time"))
    return at is not None and signs.beat.get("host") == platform.node() and now - at > HELD


def _phase(signs: Signs) -> tuple[str, float | None]:
    """What the process is at, and since when: by the log, or by its heart where that knows later news."""
    glance, started = signs.glance, number(signs.process.get("started"))
    record = glance.phase
    if record is not None and started is not None and record["time"] < started - 1:
        record = None  # of an earlier process: this one has not said a word yet
    phase = str(record.get("phase")) if record else "starting"
    since = record["time"] if record else started
    steps = glance.steps
    if record is not None and glance.stepped and phase != "training" and steps:
        after = [s["time"] for s in steps if s["time"] >= record["time"]]
        phase, since = "training", after[0] if after else record["time"]
    beaten, at = signs.beat.get("phase"), number(signs.beat.get("time"))
    if beaten in PHASES and beaten != phase and at is not None and at > (glance.last_time or 0.0):
        phase, since = str(beaten), glance.last_time
    return (phase, since) if phase in PHASES else ("training", since)


def silence(signs: Signs, now: float) -> float:
    """Seconds since the last sign of any rank's main thread: one that waits for another gives none, and is well."""
    ages = [age for beat in (signs.beat, *signs.other_beats) if (age := _age(beat, now)) is not None]
    if ages:
        return min(ages)
    last = max(filter(None, (signs.updated, signs.glance.last_time, number(signs.process.get("started")))), default=now)
    return max(0.0, now - last)


def _age(beat: Mapping[str, Any], now: float) -> float | None:
    """Seconds since one main thread's last sign, None where it told of none."""
    at, progress = number(beat.get("time")), number(beat.get("progress"))
    if at is None or progress is None:
        return None
    here = beat.get("host") == platform.node()  # of another host's clock only differences count
    return max(0.0, (now if here else at) - progress)


def patience(signs: Signs) -> float:
    """Seconds of silence that are still usual for this run."""
    slowest = max(number(beat.get("slowest")) or 0.0 for beat in (signs.beat, *signs.other_beats))
    usual = max(slowest, USUAL_STEPS * (signs.seconds_per_step or 0.0))
    return max(PATIENCE, USUAL_GAPS * usual)


def _count(beat: Mapping[str, Any], name: str) -> int | None:
    value = beat.get(name)
    return value if type(value) is int else None


def _doing(phase: str) -> str:
    return {"starting": "loading the model", "caching": "encoding its data", "paused": "it was paused"}.get(
        phase, phase
    )


def clock(at: float) -> str:
    """Time of day, as this machine counts it."""
    return time.strftime("%H:%M:%S", time.localtime(at))
