"""weft train --independent: one process for each GPU, each with its own adapter and its own share of the clips."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from types import FrameType
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.config import RunConfig

HANGUP = getattr(signal, "SIGHUP", None)  # a closed terminal; Windows has no such signal


@dataclass(frozen=True)
class Share:
    """One process: the number in its names, its environment, and what its config says beyond the common one."""

    number: int
    run: Path
    environment: dict[str, str]
    assignments: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"gpu {self.number}"


def train_independently(path: Path, overrides: Sequence[str], processes: int | None) -> int:
    """Train every share at once. Exit code 0 when all have finished, 128 + signal when stopped, else that of the first
    that failed, after the others have finished."""
    from weft.run.config import load_config

    config = load_config(path, overrides)
    refuse_contradictions(config)
    shares, notes = shares_of(config, processes)
    print(
        f"{len(shares)} independent runs, not data-parallel training: they share no gradients, and each trains an "
        "adapter of its own on its own share of the clips.",
        flush=True,
    )
    for note in notes:
        print(note)
    children = Children()
    children.listen()
    if config.data.cache == "disk":
        # Once, for all: the encoders are then loaded by one process alone, and what is wrong with the clips is told
        # before the others start.
        caching = Task("cache", weft("cache", path, overrides), shares[0].environment)
        if (code := children.run([caching])[0]) or children.heard:
            return children.exit_code([code])
    tasks = [
        Task(share.label, weft("train", path, (*overrides, *share.assignments)), share.environment) for share in shares
    ]
    codes = children.run(tasks)
    conclude(shares, codes, config.name)
    if children.heard and any(codes):
        again = shlex.join(["weft", "train", "--independent", str(path), *overrides])
        print(f"To go on, run the same command again:\n  {again}")
    return children.exit_code(codes)


def refuse_contradictions(config: "RunConfig") -> None:
    """Raises ConfigError for settings that cannot hold for several processes with one GPU each."""
    if config.data.medium == "documents":
        raise ConfigError(
            "data.kind: documents are learned year by year, and --independent parts what one run learns. For several "
            "runs: weft train --seeds 0-4; for one on all GPUs: weft train --gpus all."
        )
    if config.engine.kind != "torch":
        raise ConfigError(
            f"engine.kind: '{config.engine.kind}' joins GPUs, and --independent parts them. Leave one out."
        )
    if config.engine.device == "mps" or ":" in config.engine.device:
        raise ConfigError(
            f"engine.device: '{config.engine.device}' is one GPU, and --independent starts a process for each visible "
            "one. Write engine.device=auto, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    if config.resume not in ("auto", "latest", "never"):
        raise ConfigError(
            f"resume: '{config.resume}' is one run's checkpoint. Write resume=auto: each run has its own."
        )
    if config.data.share is not None:
        raise ConfigError("data.share: --independent gives each process its own share. Leave it out.")


def shares_of(config: "RunConfig", processes: int | None) -> tuple[list[Share], tuple[str, ...]]:
    """A share for each GPU, or for each of so many processes on the cpu; and what is to be said of the GPUs."""
    import torch

    from weft.engines.visible import PROCESS_NUMBER, child_environment, gpus_here

    found = gpus_here(identify=False)
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes: {processes} is none. Leave it out for one for each visible GPU.")
    if config.engine.device == "cpu" or not found.gpus:
        if processes is None or config.engine.device == "cuda":
            seen = (
                "engine.device is cpu" if config.engine.device == "cpu" else "torch sees no GPU (weft doctor says why)"
            )
            raise ConfigError(
                f"--independent starts a process for each visible GPU, and {seen}. To train on the processor: "
                "weft train --independent --processes 2 RUN.yaml engine.device=cpu"
            )
        given = [(i, {**os.environ, PROCESS_NUMBER: str(i)}) for i in range(processes)]
        return [share(config, i, len(given), number, env) for i, (number, env) in enumerate(given)], ()
    if processes is not None and processes > len(found.gpus):
        raise ConfigError(f"--processes: {processes} were asked for, and {len(found.gpus)} GPUs are visible.")
    rocm = torch.version.hip is not None
    given = [(gpu.number, child_environment(os.environ, gpu, rocm=rocm)) for gpu in found.gpus[:processes]]
    return [share(config, i, len(given), number, env) for i, (number, env) in enumerate(given)], found.notes


def share(config: "RunConfig", index: int, shares: int, number: int, environment: dict[str, str]) -> Share:
    """The index-th of so many shares: a run of its own name that trains on every n-th clip."""
    name = f"{config.name}_gpu{number}"
    return Share(number, config.output / name, environment, (f"name={name}", f"data.share=[{index},{shares}]"))


def weft(verb: str, path: Path, overrides: Sequence[str]) -> list[str]:
    """A command line of this very installation."""
    return [sys.executable, "-m", "weft.cli.main", verb, str(path), *overrides]


def conclude(shares: Sequence[Share], codes: Sequence[int], name: str) -> None:
    """Say how each run ended, and how their adapters become one: with two experts, one of each."""
    for share, code in zip(shares, codes, strict=True):
        how = {0: "finished", 128 + signal.SIGINT: "stopped", 128 + signal.SIGTERM: "stopped"}
        print(f"[{share.label}] {how.get(code, f'FAILED with exit code {code}')}: {share.run}")
    if len(shares) > 1 and not any(codes):
        print("To make one adapter of them:")
        for folder in sorted(folder.name for folder in shares[0].run.glob("adapter*") if folder.is_dir()):
            adapters = shlex.join(str(share.run / folder) for share in shares)
            out = shares[0].run.with_name(f"{name}_average{folder.removeprefix('adapter')}")
            print(f"  weft merge --average {adapters} --out {shlex.quote(str(out))}")
    sys.stdout.flush()


@dataclass(frozen=True)
class Task:
    """A command, the label of its lines, and its environment."""

    label: str
    command: Sequence[str]
    environment: dict[str, str]


@dataclass
class Children:
    """Processes that run at once: their lines come out under their labels, and each signal is passed on once.

    They stand in sessions of their own, for a Ctrl-C goes to all processes of a terminal's group, and a second one
    would end them before they have saved.
    """

    heard: int = 0  # the first signal, 0 when there was none
    _running: list[subprocess.Popen[str]] = field(default_factory=list)
    _told: set[int] = field(default_factory=set)  # pids that a signal was passed on to
    _lines: Lock = field(default_factory=Lock)
    _gone: bool = False  # the terminal was closed, so there is nobody to print to

    def listen(self) -> None:
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = self.heard or number
        for process in self._running:
            self._pass_on(process, number)

    def _pass_on(self, process: subprocess.Popen[str], number: int) -> None:
        self._told.add(process.pid)
        process.send_signal(signal.SIGTERM if number == HANGUP else number)

    def run(self, tasks: Sequence[Task]) -> list[int]:
        """Exit codes, when all have ended; as a shell counts them, 128 + signal for those that a signal ended."""
        self._running = []
        for task in tasks:
            if not self.heard:
                process = self._started(task)
                self._running.append(process)
                if self.heard and process.pid not in self._told:  # it came while this one was being started
                    self._pass_on(process, self.heard)
        readers = [
            Thread(target=self._relay, args=(process, task.label), daemon=True)
            for process, task in zip(self._running, tasks, strict=False)  # fewer, when a signal came early
        ]
        for reader in readers:
            reader.start()
        codes = [process.wait() for process in self._running]
        codes += [128 + self.heard] * (len(tasks) - len(codes))
        for reader in readers:
            reader.join()
        self._running = []
        return [code if code >= 0 else 128 - code for code in codes]

    def _started(self, task: Task) -> subprocess.Popen[str]:
        return subprocess.Popen(
            task.command, env=task.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip

    def _relay(self, process: subprocess.Popen[str], label: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._lines:
                self._print(f"[{label}] {line.rstrip()}")

    def _print(self, line: str) -> None:
        # When the terminal was closed the children are read all the same: with a full pipe they would never save.
        if self._gone:
            return
        try:
            print(line, flush=True)
        except OSError:
            self._gone = True

    def exit_code(self, codes: Sequence[int]) -> int:
        """0 when all are; what stopped them; else the first that is not 0."""
        if not any(codes):
            return 0
        return 128 + self.heard if self.heard else next(code for code in codes if code)
