"""weft stop: end a run in the background after its step, with everything saved."""

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import RunError, did_you_mean

PATIENCE = 600.0  # seconds; saving a large run and the step before it may take minutes
GLANCE = 0.2  # seconds between two looks
ASKED = "stop_asked"  # a second signal would end the process at once, so it is written down that one was sent


def run(argv: Sequence[str]) -> int:
    """Stop the runs. Exit code 1 when one ended by a fault before it had saved."""
    parser = argparse.ArgumentParser(prog="weft stop", description="Let runs finish their step, save, and end.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="runs/NAME", help="folders of running runs")
    parser.add_argument("--timeout", type=float, default=PATIENCE, help="seconds to wait for the saving (%(default)g)")
    arguments = parser.parse_args(argv)

    trainers, problems = [], []
    for folder in arguments.folders:
        try:
            trainers.append(trainer_of(folder))
        except RunError as error:
            problems.append(str(error))
    if not trainers:
        raise RunError("\n".join(problems))
    for problem in problems:  # one of several that has ended already keeps none of the others running
        print(problem, file=sys.stderr)
    for trainer in trainers:
        ask(trainer)
    deadline = time.monotonic() + arguments.timeout
    return max(report(trainer, deadline) for trainer in trainers)


@dataclass(frozen=True)
class Trainer:
    """The process that wrote itself down in a run's folder. facts: as it wrote them."""

    folder: Path
    facts: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / "process.rank0.json"

    @property
    def pid(self) -> int:
        return self.facts["pid"]

    def works(self) -> bool:
        """Whether it still trains here: it runs, is no other program under its old number, and has not signed off."""
        from weft.run.folder import is_alive

        return self.file.is_file() and is_alive(self.pid, self.facts["born"])


def trainer_of(folder: Path) -> Trainer:
    """Who trains in a run's folder. Raises RunError when nobody does, or on another machine."""
    if os.name != "posix":
        raise RunError("weft stop: Windows has no signal that lets a process save first. Press Ctrl-C where it runs.")
    found = read_trainer(folder)
    if found is None:
        raise RunError(f"{folder}: nothing trains here.{_nearest(folder)}")
    if found.facts["host"] != platform.node():
        raise RunError(f"{folder}: process {found.pid} trains here on {found.facts['host']}. Run weft stop there.")
    if not found.works():
        raise RunError(
            f"{folder}: process {found.pid} trained here and has ended without signing off (killed, or the machine "
            "went down); the number may be another program's by now, so nothing was stopped. To go on from the newest "
            "checkpoint, start the training again."
        )
    return found


def read_trainer(folder: Path) -> Trainer | None:
    """The process written down in a run's folder, living or not; None when there is none."""
    try:
        facts = json.loads((folder / "process.rank0.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise RunError(f"{folder}: process.rank0.json is damaged. Look for the process by hand: ps -ef.") from None
    return Trainer(folder, facts)


def _nearest(folder: Path) -> str:
    if folder.is_dir() or not folder.parent.is_dir():
        return "" if folder.is_dir() else f" There is no folder '{folder.parent}'."
    there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    return f" There is no such folder. {did_you_mean(folder.name, there)}" if there else " There is no such folder."


def ask(trainer: Trainer) -> None:
    """Send one SIGTERM, and never a second one."""
    from weft.durable import write_whole

    if ASKED in trainer.facts:
        print(f"{trainer.folder}: process {trainer.pid} was asked before, at {_clock(trainer.facts[ASKED])}.")
        return
    write_whole(trainer.file, json.dumps({**trainer.facts, ASKED: time.time()}))
    try:
        os.kill(trainer.pid, signal.SIGTERM)
    except PermissionError:
        raise RunError(f"{trainer.folder}: process {trainer.pid} is another user's. Stop it as that user.") from None
    except ProcessLookupError:  # it ended in this moment; how is told next
        return
    print(f"{trainer.folder}: process {trainer.pid} finishes its step and saves.", flush=True)


def report(trainer: Trainer, deadline: float) -> int:
    """Wait until it has ended, and say how. Raises RunError when it takes too long."""
    while trainer.works():
        if time.monotonic() > deadline:
            raise RunError(
                f"{trainer.folder}: process {trainer.pid} has not ended yet: it may be encoding clips, or within a "
                f"long step. Wait on: weft stop {trainer.folder} --timeout 3600. To end it without saving: kill -9 "
                f"{trainer.pid}"
            )
        time.sleep(GLANCE)
    end = last_end(trainer)
    if end is None:
        print(f"{trainer.folder}: ended before its training began; there was nothing to save.")
        return 0
    if end["outcome"] == "failed":
        print(f"{trainer.folder}: failed at step {end['step']}: {end['reason']}")
        return 1
    print(f"{trainer.folder}: {end['outcome']} and saved at step {end['step']}.")
    return 0


def last_end(trainer: Trainer) -> dict[str, Any] | None:
    """How the process ended, as its log says; None when it ended before it could tell."""
    from weft.run.listeners import read_events

    log = trainer.folder / "events.rank0.jsonl"
    ends = [e for e in read_events(log) if e["event"] == "run_ended"] if log.is_file() else []
    return ends[-1] if ends and ends[-1]["time"] >= trainer.facts["started"] else None


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
