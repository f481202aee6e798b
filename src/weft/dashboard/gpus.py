"""The GPUs of a run, from the small file that each rank keeps of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.dashboard.gpu_history import History
from weft.dashboard.small_files import Remembered, numbered
from weft.dashboard.tail import number

STATES = {"finished": "finished", "stopped": "stopped", "failed": "crashed", "crashed": "crashed"}
MEMORY = ("used", "peak", "used_by_all", "total")


@dataclass(frozen=True)
class GpuFile:
    """training_gpu{N}.json. rank: whose it is."""

    number: int
    rank: int
    facts: Mapping[str, Any]

    @property
    def updated(self) -> float:
        return number(self.facts.get("updated_at")) or 0.0


def gpu_files(folder: Path, processes: Mapping[int, Mapping[str, Any]], read: Remembered) -> list[GpuFile]:
    """The files in the order of their numbers. A rank is known by its process, and where that has signed off, by the
    order of numbers, in which ranks take their GPUs."""
    found = {n: read(path) for n, path in numbered(folder, "training_gpu*.json").items()}
    found = {n: facts for n, facts in found.items() if facts}
    who = {n: (facts.get("host"), facts.get("pid")) for n, facts in found.items()}
    writer = {rank: (p.get("host"), p.get("pid")) for rank, p in processes.items()}
    rank_of = {process: rank for rank, process in writer.items()}
    known = {n: n if writer.get(n) == who[n] else rank_of[who[n]] for n in found if who[n] in rank_of}
    free = iter(rank for rank in range(len(found) + len(known)) if rank not in known.values())
    return [GpuFile(n, known[n] if n in known else next(free), facts) for n, facts in found.items()]


def first_rank(files: list[GpuFile]) -> GpuFile | None:
    """That of the rank whose numbers are the run's."""
    return min(files, key=lambda file: (file.rank, -file.updated), default=None)


def told(file: GpuFile, run_state: str, alive: bool) -> dict[str, Any]:
    """A GPU as the page and the status have it. alive: whether its own process lives; run_state: of the whole run."""
    facts, memory = file.facts, file.facts.get("memory")
    state = STATES.get(str(facts.get("state")))
    if state is None:
        state = "active" if alive else run_state if run_state in STATES else "crashed"
        state = "stalled" if state == "active" and run_state == "stalled" else state
    active = state == "active"
    doing = "paused" if run_state == "paused" else str(facts.get("activity") or "")
    activity = doing if active else state
    gpu = facts.get("gpu")
    return {
        "number": file.number,
        "rank": file.rank,
        "name": str(gpu.get("name")) if isinstance(gpu, Mapping) else "",
        "host": str(facts.get("host") or ""),
        "state": state,
        "activity": activity,
        "step": facts.get("step"),
        "total_steps": facts.get("total_steps"),
        "loss": number(facts.get("loss")),
        "smoothed_losses": losses_of(facts),
        "lr": number(facts.get("lr")),
        "memory": {name: number(memory.get(name)) if isinstance(memory, Mapping) else None for name in MEMORY},
        "seconds_per_step": number(facts.get("seconds_per_step")),
        "eta": number(facts.get("eta")) if active and activity != "paused" else None,
        "data_wait": number(facts.get("data_wait")),
        "updated_at": number(facts.get("updated_at")),
        "error": facts.get("error") if isinstance(facts.get("error"), Mapping) else None,
    }


def losses_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Phase -> moving mean of its loss."""
    found = facts.get("smoothed_losses")
    sound = found.items() if isinstance(found, Mapping) else ()
    return {str(phase): value for phase, loss in sound if (value := number(loss)) is not None}


def history_of(facts: Mapping[str, Any]) -> History:
    found = facts.get("history")
    return found if isinstance(found, History) else History()
