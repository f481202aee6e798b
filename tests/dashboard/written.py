"""A writer of run folders at told times, through the trainer's own log, GPU log and config."""

import json
import math
import os
import platform
import random
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import yaml

from weft import events
from weft.config.source import read_text
from weft.data.media import contact_sheet, write_video
from weft.durable import write_whole
from weft.events import Event
from weft.run.config import parse_config
from weft.run.folder import born, write_json
from weft.run.gpu_log import GpuLog, identity
from weft.run.listeners import EventLog

PROMPTS = ("a red ring moves to the left", "a blue square rests")
VIDEO: Mapping[str, Any] = {
    "family": {"kind": "wan", "source": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
    "adapter": {"kind": "lora", "rank": 16, "targets": "attention+ffn"},
    "objective": {"kind": "flow-matching"},
    "optimizer": {"kind": "adamw", "lr": 1e-4},
    "data": {"kind": "video", "sources": [{"path": "clips"}], "fps": 16,
             "buckets": {"sizes": [[480, 832]], "frames": [49]}},
    "validation": {"every": 50},
    "samples": {"prompts": list(PROMPTS)},
}  # fmt: skip
TEXT: Mapping[str, Any] = {
    "family": {"kind": "causal-lm", "source": "Qwen/Qwen3-0.6B"},
    "adapter": {"kind": "lora", "rank": 8, "targets": "all"},
    "objective": {"kind": "next-token"},
    "optimizer": {"kind": "adamw", "lr": 2e-4},
    "data": {"kind": "chat", "sources": [{"path": "chats.jsonl"}], "length": 1024},
    "validation": {"every": 50},
    "samples": {"prompts": ["Who are you?"]},
}
GIB = 1 << 30


class Clock:
    """Seconds since 1970, as a test sets them."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Process:
    """A process that a folder says trains there. One that lives is this one; one that is dead was a real one."""

    def __init__(self, alive: bool) -> None:
        self.pid, self.born = os.getpid(), born(os.getpid())
        if not alive:
            with subprocess.Popen(["sleep", "60"]) as child:
                self.pid, self.born = child.pid, born(child.pid)
                child.kill()

    @property
    def facts(self) -> dict[str, Any]:
        return {"pid": self.pid, "born": self.born, "host": platform.node()}


class RunWriter:
    """One run's folder, as it is written in the course of a training that began at `start`."""

    def __init__(self, folder: Path, start: float, config: Mapping[str, Any] = VIDEO, steps: int = 200) -> None:
        self.folder, self.start, self.steps = folder, start, steps
        self.clock = Clock(start)
        self.process: Process | None = None
        self.chance = random.Random(folder.name)
        self._logs: dict[int, EventLog] = {}
        folder.mkdir(parents=True)
        name = "-".join(re.findall(r"[\w.]+", folder.name))  # a folder may have been renamed, to anything
        schedule = {"steps": steps, "warmup": 10}
        plain = {**config, "name": name, "output": str(folder.parent), "schedule": schedule}
        resolved = parse_config(read_text(json.dumps(plain))).resolved()
        write_whole(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        write_whole(folder / "config.input.yaml", f"# What {folder.name} learns.\n{yaml.safe_dump(plain)}")
        write_json(folder / "environment.json", {"versions": {"weft": "0.1.0", "torch": "2.13.0"}, "python": "3.11.7",
                                                 "device": "cuda:0", "argv": ["weft", "train", "run.yaml"],
                                                 "git": None})  # fmt: skip

    @classmethod
    def reopened(cls, folder: Path, now: float, steps: int = 200) -> "RunWriter":
        """A writer that goes on in a folder that stands."""
        run = cls.__new__(cls)
        run.folder, run.start, run.steps, run.clock = folder, now, steps, Clock(now)
        run.process, run.chance, run._logs = Process(alive=True), random.Random(folder.name), {}
        return run

    def tell(self, *told: Event, after: float = 0.0, rank: int = 0) -> None:
        """Write events into a rank's log, `after` seconds later than the last."""
        self.clock.now += after
        if rank not in self._logs:
            self._logs[rank] = EventLog(self.folder / f"events.rank{rank}.jsonl", self.clock)
        for event in told:
            self._logs[rank](event)

    def begin(self, step: int = 0, world: int = 1, trainable: int = 21_233_664) -> None:
        """Up to the first step of a process: loading, caching, and the word that the model is ready."""
        self.tell(events.PhaseStarted(phase="starting"))
        self.tell(events.PhaseStarted(phase="caching", total=100), after=2)
        behind = str(self.folder / "checkpoints" / f"global_step_{step}") if step else None
        for rank in range(world):
            self.tell(self.started(step, behind, trainable, rank, world), after=10 if rank == 0 else 0, rank=rank)
            self.tell(events.PhaseStarted(phase="training", total=self.steps), rank=rank)

    def started(self, step: int, behind: str | None, trainable: int, rank: int, world: int) -> events.RunStarted:
        return events.RunStarted(
            name=self.folder.name, step=step, total_steps=self.steps, resumed_from=behind, trainable=trainable,
            device=f"cuda:{rank}", rank=rank, world=world,
        )  # fmt: skip

    def step(self, step: int, phases: Sequence[str] = ("train",), seconds: float = 1.5, rank: int = 0,
             **more: float) -> None:  # fmt: skip
        """One step's record; more: further metrics, with __ for the slash."""
        self.tell(self.stepped(step, phases, seconds, **more), after=seconds, rank=rank)

    def stepped(self, step: int, phases: Sequence[str], seconds: float, **more: float) -> events.StepEnded:
        metrics: dict[str, float] = {}
        for phase in phases:
            metrics |= self.metrics(step, phase)
        metrics |= {name.replace("__", "/"): value for name, value in more.items()}
        waited = 0.02 * seconds
        parts = {"data": waited, "forward": 0.35 * seconds, "backward": 0.6 * seconds, "optimizer": 0.03 * seconds}
        return events.StepEnded(
            step=step, experience="all", metrics=metrics, seconds={**parts, "total": seconds},
            items=8, memory=(38 << 30) + step * 1000, keys=(f"secret clip {step}",),
        )  # fmt: skip

    def many(self, told: Iterable[events.StepEnded]) -> None:
        """Steps of 1.5 s, in the log's own words, but many times more quickly than it writes them one by one."""
        with (self.folder / "events.rank0.jsonl").open("a") as file:
            for event in told:
                self.clock.now += 1.5
                record = {"time": round(self.clock.now, 3), "event": "step", **vars(event)}
                file.write(json.dumps(record) + "\n")

    def metrics(self, step: int, phase: str) -> dict[str, float]:
        role = "default" if phase == "train" else phase
        loss = 0.12 + 0.24 * math.exp(-3 * step / self.steps) + self.chance.gauss(0, 0.02)
        rate = 1e-4 * min(1.0, step / 10) * (0.55 + 0.45 * math.cos(math.pi * step / self.steps))
        return {f"{phase}/loss": loss, f"{phase}/unweighted_loss": loss, f"{role}/grad_norm": 0.1 + 2 * loss,
                f"{role}/lr": rate}  # fmt: skip

    def evaluated(self, step: int, experts: Sequence[str] = ()) -> None:
        loss = 0.16 + 0.2 * math.exp(-3 * step / self.steps)
        times = {"0.1": 2.0, "0.3": 1.2, "0.5": 0.9, "0.7": 0.75, "0.9": 0.6}
        self.tell(events.PhaseStarted(phase="validating"))
        self.tell(
            events.Evaluated(step=step, loss=loss, baseline=0.36, items=6, failed=0, standard_error=0.01,
                             by_time={t: f * loss for t, f in times.items()},
                             baseline_by_time={t: f * 0.36 for t, f in times.items()},
                             by_expert=dict.fromkeys(experts, loss)),
            after=3.0,
        )  # fmt: skip

    def sampled(
        self, step: int, prompts: Sequence[str] = PROMPTS, adapter: bool = True, cwd: Path | None = None
    ) -> None:
        """Short real videos of a square, faster the later the step. cwd: the files are told relative to it."""
        folder = self.folder / "samples" / (f"step_{step:06d}" if adapter else "base")
        self.tell(events.PhaseStarted(phase="sampling", total=len(prompts)))
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for i, prompt in enumerate(prompts):
            video = square(side=64, frames=9, speed=1 + 3 * step // self.steps, colour=(220, 60 + 70 * i, 60))
            write_video(folder / f"{i:02d}.mp4", video, 8.0)
            rows.append((prompt, video))
            self._sample(step, prompt, i, folder / f"{i:02d}.mp4", adapter, cwd)
        contact_sheet(rows, folder / "sheet.png")

    def replied(self, step: int, replies: Mapping[str, str], adapter: bool = True) -> None:
        folder = self.folder / "samples" / (f"step_{step:06d}" if adapter else "base")
        for i, (prompt, reply) in enumerate(replies.items()):
            write_whole(folder / f"{i:02d}.txt", f"{prompt}\n\n---\n\n{reply}\n")
            self._sample(step, prompt, 0, folder / f"{i:02d}.txt", adapter, None)

    def _sample(self, step: int, prompt: str, seed: int, file: Path, adapter: bool, cwd: Path | None) -> None:
        told = file.relative_to(cwd) if cwd else file
        self.tell(events.Sampled(step=step, prompt=prompt, seed=seed, file=str(told), adapter=adapter), after=1.0)

    def end(self, step: int, outcome: str = "finished", reason: str = "", world: int = 1) -> None:
        for rank in range(world):
            self.tell(events.RunEnded(step=step, outcome=outcome, reason=reason), after=1.0 if rank == 0 else 0.0,
                      rank=rank)  # fmt: skip

    def trains(self, alive: bool, rank: int = 0) -> None:
        """Leave the file of a process that trains here since the start, as a kill leaves it."""
        self.process = self.process or Process(alive)
        write_json(self.folder / f"process.rank{rank}.json", {**self.process.facts, "started": self.start})

    def beats(self, phase: str, step: int, progress: float | None = None, rank: int = 0, world: int = 1,
              **more: Any) -> None:  # fmt: skip
        """The heartbeat of the process at this moment; progress: when its main thread last gave a sign."""
        assert self.process is not None, "a heart beats in a process: trains() first"
        beat = {
            "format": 1, **self.process.facts, "rank": rank, "world": world, "time": self.clock.now, "every": 2.0,
            "progress": self.clock.now if progress is None else progress, "phase": phase, "step": step,
            "total_steps": self.steps, "done": None, "total": None, "note": "", "slowest": 2.0,
        }  # fmt: skip
        (self.folder / f"heartbeat.rank{rank}.json").write_text(json.dumps({**beat, **more}))

    def gpu_file(self, number: int = 0, rank: int = 0, every: int = 1) -> None:
        """training_gpuN.json as the trainer's own listener makes it of the log so far, of every n-th line of it."""
        import torch

        who = identity(None, number, torch.device("cpu"), ())
        run = {"run": self.folder.name, "gpu": {**who, "device": f"cuda:{rank}", "name": "NVIDIA H200"}}
        memory = {"used": (40 + number) * GIB, "peak": 52 * GIB, "used_by_all": 60 * GIB, "total": 140 * GIB}
        clock, nothing = Clock(self.start), self.folder / "no.jsonl"  # what it would remember it is told here
        nothing.touch()
        log = GpuLog(self.folder / f"training_gpu{number}.json", run, nothing, lambda: memory, clock)
        log._written = math.inf  # no file a step
        lines = (self.folder / f"events.rank{rank}.jsonl").read_text().splitlines()
        for record in map(json.loads, [*lines[:10], *lines[10:-10:every], *lines[-10:]]):
            clock.now = record.pop("time")
            log(KINDS[record.pop("event")](**record))
        log.write()
        nothing.unlink()
        if self.process is not None:
            path = self.folder / f"training_gpu{number}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **self.process.facts}))


KINDS = {kind.kind: kind for kind in (
    events.PhaseStarted, events.Notice, events.RunStarted, events.StepEnded, events.Incident, events.Evaluated,
    events.Sampled, events.Saved, events.Exported, events.Controlled, events.Scored, events.RunEnded,
)}  # fmt: skip


def square(side: int, frames: int, speed: int, colour: tuple[int, int, int]) -> numpy.ndarray:
    """Frames (F, side, side, 3) of a square that moves to the right."""
    video = numpy.full((frames, side, side, 3), 24, numpy.uint8)
    for frame in range(frames):
        left = min(side - 16, 4 + speed * frame)
        video[frame, 24:40, left : left + 16] = colour
    return video
