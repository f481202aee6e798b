"""One run as its small files and the light reading of its log show it: what the list and the status need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.dashboard import configs, gpus
from weft.dashboard.glance import Glance
from weft.dashboard.gpus import GpuFile
from weft.dashboard.liveness import Watch
from weft.dashboard.pace import eta, points_of_steps
from weft.dashboard.samples import newest_media
from weft.dashboard.small_files import Remembered, numbered
from weft.dashboard.state import Signs, Verdict, judge
from weft.dashboard.tail import number

SPARK = 60  # numbers of the small curve in the list
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Readers:
    """What was read of small files by all runs of a store, until they change."""

    json: Remembered[dict[str, Any]]
    gpu: Remembered[dict[str, Any]]
    yaml: Remembered[dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """A run at one moment. alive: rank -> whether its process lives, of the ranks that wrote themselves down."""

    verdict: Verdict
    config: Facts
    files: list[GpuFile]
    processes: dict[int, dict[str, Any]]
    beats: dict[int, dict[str, Any]]
    alive: dict[int, bool]

    @property
    def first(self) -> Facts:
        """What the GPU of the first rank says."""
        file = gpus.first_rank(self.files)
        return file.facts if file else {}

    def gpus(self) -> list[dict[str, Any]]:
        lives = self.verdict.alive
        return [gpus.told(file, self.verdict.state, self.alive.get(file.rank, lives)) for file in self.files]


class RunFolder:
    """A run's folder. Not safe for several threads: the store locks it."""

    def __init__(self, run: str, path: Path, readers: Readers, watch: Watch, now: Callable[[], float]) -> None:
        self.id, self.path = run, path
        self._readers, self._watch, self._now = readers, watch, now
        self.glance = Glance(path / "events.rank0.jsonl")

    def look(self) -> Seen:
        now = self._now()
        processes = {n: self._readers.json(p) for n, p in numbered(self.path, "process.rank*.json").items()}
        beats = {n: self._readers.json(p) for n, p in numbered(self.path, "heartbeat.rank*.json").items()}
        if 0 not in processes and 0 in beats:  # its process file was lost
            processes[0] = beats[0]
        files = gpus.gpu_files(self.path, {**beats, **processes}, self._readers.gpu)
        updated = {file.rank: file.updated for file in files}
        alive = {
            rank: self._watch.lives(process, _own(beats.get(rank, {}), process), updated.get(rank), now)
            for rank, process in processes.items()
        }
        self.glance.look(whole=bool(processes))
        first = gpus.first_rank(files)
        signs = Signs(
            alive=alive.get(0), process=processes.get(0, {}), beat=_own(beats.get(0, {}), processes.get(0, {})),
            glance=self.glance, updated=updated.get(0),
            seconds_per_step=number(first.facts.get("seconds_per_step")) if first else None,
            lost=tuple(rank for rank, lives in alive.items() if rank and not lives),
            other_beats=tuple(_own(beats.get(n, {}), processes[n]) for n, lives in alive.items() if n and lives),
        )  # fmt: skip
        config = self._readers.yaml(self.path / "config.yaml")
        return Seen(judge(signs, now), config, files, processes, beats, alive)

    def summary(self, seen: Seen) -> dict[str, Any]:
        """The run as the list has it."""
        verdict, first, glance = seen.verdict, seen.first, self.glance
        total = glance.total_steps or configs.total_steps(seen.config)
        media = newest_media(self.id, self.path)
        losses = gpus.losses_of(first)
        return {
            "id": self.id,
            "name": self.path.absolute().name,
            "state": verdict.state,
            "reason": verdict.reason,
            "phase": verdict.phase,
            "since": verdict.since,
            "step": verdict.step,
            "total_steps": total,
            "done": verdict.done,
            "total": verdict.total,
            "note": verdict.note,
            "eta": self._eta(seen, total),
            "seconds_per_step": number(first.get("seconds_per_step")),
            "losses": losses or _last_losses(glance),
            "validation": self._validation(first),
            "started_at": number(first.get("started_at")) or glance.first_time,
            "updated_at": self._updated(seen),
            "world": self._world(seen),
            "host": str(seen.processes.get(0, first).get("host") or ""),
            **configs.identity(seen.config),
            "spark": gpus.history_of(first).spark(SPARK),
            "incidents": _entries(self.path / "incidents"),
            "sample": media[0] if media else None,
        }

    def _eta(self, seen: Seen, total: int | None) -> float | None:
        """Only of a run that is at its steps, or between two of them."""
        verdict, begun = seen.verdict, self.glance.begun
        if verdict.state not in ("training", "validating", "sampling", "saving") or begun is None or total is None:
            return None
        points = gpus.history_of(seen.first).since(begun["time"]) or points_of_steps(self.glance.steps)
        return eta(points, self.glance.paused, number(seen.first.get("seconds_per_step")), total - verdict.step)

    def _validation(self, first: Facts) -> dict[str, Any] | None:
        """The newest: of a log of which only head and end were read, the GPU's file may know a later one."""
        found = [*self.glance.evaluations[-1:], first.get("validation")]
        sound = [one for one in found if isinstance(one, Mapping) and number(one.get("loss")) is not None]
        newest = max(sound, key=lambda one: number(one.get("step")) or 0, default=None)
        return {name: number(newest.get(name)) for name in ("step", "loss", "baseline")} if newest else None

    def _updated(self, seen: Seen) -> float | None:
        beats = [number(beat.get("progress")) for beat in seen.beats.values()]
        told = [*beats, self.glance.last_time, *(file.updated for file in seen.files)]
        return max((value for value in told if value), default=None)

    def _world(self, seen: Seen) -> int:
        world = (self.glance.begun or {}).get("world") or seen.beats.get(0, {}).get("world")
        return world if type(world) is int else max(1, len(seen.files))


def _own(beat: dict[str, Any], process: Facts) -> dict[str, Any]:
    """A heartbeat if it is that process's, and not one that an earlier left behind."""
    same = all(beat.get(name) == process.get(name) for name in ("host", "pid", "born"))
    return beat if same else {}


def _last_losses(glance: Glance) -> dict[str, float]:
    """The mean of each phase's loss over the last steps, where no GPU's file has a better one."""
    found: dict[str, list[float]] = {}
    for record in glance.steps:
        metrics = record.get("metrics")
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            if name.endswith("/loss") and (loss := number(value)) is not None:
                found.setdefault(name.removesuffix("/loss"), []).append(loss)
    return {phase: sum(losses) / len(losses) for phase, losses in found.items()}


def _entries(folder: Path) -> int:
    """How many folders of steps that went wrong there are."""
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0
