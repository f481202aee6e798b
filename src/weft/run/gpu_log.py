"""training_gpu{N}.json: one file in a run's folder that says what its GPU does now, and how it came there.

It is replaced as a whole, at most once a second and at the end. Everything in it is also in the event log, from which
a resumed run takes its history: this file is for whoever looks from outside and wants one small file to read.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weft import events
from weft.contracts import Engine
from weft.durable import write_whole
from weft.engines.visible import Gpu, gpus_here, own_number
from weft.events import Event
from weft.run.folder import born, is_alive
from weft.run.listeners import DataWait, Eta, Losses, finite, read_events, read_steps

FORMAT = 1
PAUSE = 1.0  # seconds between two writings
POINTS = 1000  # of the history; beyond that every second one goes


def open_gpu_log(run: Path, engine: Engine) -> "GpuLog":
    """The log of this process's GPU in a run's folder."""
    device = engine.device
    found = gpus_here() if device.type == "cuda" else None
    gpu = found.gpus[device.index or 0] if found and (device.index or 0) < len(found.gpus) else None
    # Processes on several machines, or on one processor, would have one number: there each has its rank.
    one_machine = os.environ.get("LOCAL_WORLD_SIZE", "1") == str(engine.world)
    number = own_number(gpu) if engine.world == 1 or (gpu and one_machine) else engine.rank
    path = run / f"training_gpu{number}.json"
    who = identity(gpu, number, device, found.notes if found else ())
    return GpuLog(path, {"run": run.name, "gpu": who}, run / f"events.rank{engine.rank}.jsonl", lambda: memory(device))


def identity(gpu: Gpu | None, number: int, device: torch.device, notes: tuple[str, ...]) -> dict[str, Any]:
    """Which GPU this is. index: the driver's number, ordinal: this process's own; both null on a cpu."""
    return {
        "number": number,
        "device": str(device),
        "index": gpu.physical if gpu else None,
        "ordinal": gpu.ordinal if gpu else None,
        "uuid": gpu.uuid if gpu else None,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "notes": list(notes),
    }


def remove_dead(run: Path) -> None:
    """Delete the logs of this machine's ended processes that trained this run, maybe on other GPUs: their history goes
    on in those of the processes that train it now. To be called before these begin to write."""
    for path in run.glob("training_gpu*.json"):
        there = json.loads(path.read_text())
        if there["host"] == platform.node() and not is_alive(there["pid"], there["born"]):
            path.unlink()


def memory(device: torch.device) -> dict[str, int | None]:
    """Bytes in use by this process, at most so far, in use by all, and in all: of the GPU, or of the machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
        return {"used": own, "peak": peak, "used_by_all": total - free, "total": total}
    status, machine = _kilobytes(Path("/proc/self/status")), _kilobytes(Path("/proc/meminfo"))
    total, free = machine.get("MemTotal"), machine.get("MemAvailable")
    by_all = total - free if total is not None and free is not None else None
    return {"used": status.get("VmRSS"), "peak": status.get("VmHWM"), "used_by_all": by_all, "total": total}


def _kilobytes(path: Path) -> dict[str, int]:
    """The sizes in one of Linux's status files, in bytes; nothing on other systems."""
    text = path.read_text() if path.is_file() else ""
    return {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


class History:
    """Points of a curve, thinned evenly so that they never become more than POINTS."""

    def __init__(self) -> None:
        self._points: list[dict[str, Any]] = []
        self._stride = 1
        self._seen = 0
        self._last: dict[str, Any] | None = None

    def add(self, point: dict[str, Any]) -> None:
        self._last = point
        if self._seen % self._stride == 0:
            self._points.append(point)
        self._seen += 1
        if len(self._points) > POINTS:
            self._points = self._points[::2]
            self._stride *= 2

    def points(self) -> list[dict[str, Any]]:
        """Those that are kept, and always the newest."""
        if self._last is None or self._points[-1] is self._last:
            return list(self._points)
        return [*self._points, self._last]


class GpuLog:
    """Hears a run's events and keeps the file. now: seconds since 1970."""

    def __init__(
        self,
        path: Path,
        who: Mapping[str, Any],
        events_log: Path,
        memory: Callable[[], Mapping[str, int | None]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._events_log = events_log
        self._memory = memory
        self._now = now
        self._written = 0.0
        self._history, self._losses, self._eta, self._wait = History(), Losses(), Eta(), DataWait()
        self._facts: dict[str, Any] = {
            "format": FORMAT,
            **who,
            "host": platform.node(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "state": "running",
            "activity": "starting",
            "step": 0,
            "total_steps": None,
            "loss": None,
            "smoothed_losses": {},
            "lr": None,
            "validation": None,
            "error": None,
            "started_at": now(),
            "resumed_at": None,
        }
        self._handlers: Mapping[type[Event], Callable[[Any], None]] = {
            events.PhaseStarted: self._phase,
            events.RunStarted: self._started,
            events.StepEnded: self._step,
            events.Evaluated: self._evaluated,
            events.Incident: lambda event: self._failed(event.step, event.reason),
            events.RunEnded: self._ended,
        }
        self.write()

    def __call__(self, event: Event) -> None:
        handler = self._handlers.get(type(event))
        if handler is None:
            return
        handler(event)
        waits = isinstance(event, events.PhaseStarted) and event.phase == "paused"  # no event comes for a while
        if isinstance(event, events.RunEnded) or waits or self._now() - self._written >= PAUSE:
            self.write()

    def write(self) -> None:
        """Replace the file. Numbers that are not finite become null."""
        left = (self._facts["total_steps"] or 0) - self._facts["step"]
        facts = {
            **self._facts,
            "seconds_per_step": self._eta.pace,
            "eta": self._eta.left(left) if self._facts["state"] == "running" else None,
            "data_wait": self._wait.share,
            "memory": self._memory(),
            "updated_at": self._now(),
        }
        # On one line: Python writes indented JSON many times more slowly, and this is done each second.
        write_whole(self.path, json.dumps({**finite(facts), "history": self._history.points()}, allow_nan=False) + "\n")
        self._written = self._now()

    def _phase(self, event: events.PhaseStarted) -> None:
        self._facts["activity"] = event.phase

    def _started(self, event: events.RunStarted) -> None:
        """Take the earlier steps of the run from its event log, which has just heard the same event."""
        self._facts |= {"step": event.step, "total_steps": event.total_steps}
        for step, record in sorted(read_steps(self._events_log).items()):
            self._remember(step, record["time"], record["metrics"], record["seconds"])
        if event.step:
            began = _first_start(self._events_log)
            self._facts |= {"resumed_at": self._now(), "started_at": began or self._facts["started_at"]}

    def _step(self, event: events.StepEnded) -> None:
        self._eta.step(event.seconds["total"])
        self._wait.step(event.seconds)
        self._facts |= {"activity": "training", "step": event.step}
        self._remember(event.step, self._now(), event.metrics, event.seconds)

    def _remember(self, step: int, at: float, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        phase, loss = self._losses.step(metrics)
        lr = next((value for name, value in metrics.items() if name.endswith("/lr")), None)
        self._facts |= {"loss": loss, "smoothed_losses": dict(self._losses.means), "lr": lr}
        self._history.add(
            {"step": step, "time": round(at, 3), "phase": phase, "loss": loss,
             "smoothed_loss": self._losses.means.get(phase), "lr": lr, "seconds": round(seconds["total"], 4)}
        )  # fmt: skip

    def _evaluated(self, event: events.Evaluated) -> None:
        self._facts["validation"] = {
            "step": event.step, "loss": event.loss, "baseline": event.baseline, "items": event.items,
            "failed": event.failed,
        }  # fmt: skip

    def _failed(self, step: int, reason: str) -> None:
        self._facts["error"] = {"step": step, "reason": reason, "time": self._now()}

    def _ended(self, event: events.RunEnded) -> None:
        self._facts |= {"state": event.outcome, "step": event.step}
        if event.reason:
            self._failed(event.step, event.reason)


def _first_start(events_log: Path) -> float | None:
    """When the run last began at step 0, as its log says."""
    starts = [e["time"] for e in read_events(events_log) if e["event"] == "run_started" and e["step"] == 0]
    return starts[-1] if starts else None
