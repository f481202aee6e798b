"""Real processes for tests: a function runs once on each rank, with the environment that a launcher gives."""

import faulthandler
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

GRACE = 3.0  # seconds that the other ranks have to end, once one has failed
# Imported once in a server of which every rank is a fork: importing them costs more than most tests.
PRELOADED = ["torch", "torch.distributed", "torch.distributed.fsdp", "diffusers", "transformers", "peft", "pytest",
             "tests.small", "tests.engines.equality", "weft.run.start", "weft.cli.train"]  # fmt: skip


class RankFailed(AssertionError):
    """A rank raised, was killed, or did not end in time."""


class Ranks:
    """Processes that run one function each. Kill one with `kill(rank)`; `results()` waits for all."""

    def __init__(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.function, self.timeout = function, timeout
        self.folder = Path(tempfile.mkdtemp(prefix="ranks."))
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
        environments = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        self.processes: list[BaseProcess] = [
            context.Process(target=_run, args=(environment, str(self.folder / str(rank)), function, args), daemon=True)
            for rank, environment in enumerate(environments)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, how: int = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, how)

    def results(self) -> list[Any]:
        """What the function returned on each rank. Raises RankFailed with the trace of the rank that failed first."""
        try:
            self._wait()
            # Only what these processes have just written is read.
            return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(len(self.processes))]
        finally:
            self.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def _wait(self) -> None:
        """Until every rank has ended well. Raises RankFailed."""
        until = time.monotonic() + self.timeout
        failed = False
        while any(process.is_alive() for process in self.processes):
            if not failed and any(process.exitcode for process in self.processes):
                failed, until = True, min(until, time.monotonic() + GRACE)
            if time.monotonic() > until:
                break
            time.sleep(0.005)
        if failed or any(process.exitcode != 0 for process in self.processes):
            raise RankFailed(self._story())

    def _story(self) -> str:
        """How each rank ended, and the traces, the first one first."""
        ends = {rank: "still running" if process.is_alive() else f"exit code {process.exitcode}"
                for rank, process in enumerate(self.processes)}  # fmt: skip
        found = [path for path in self.folder.iterdir() if path.suffix in (".trace", ".fault") and path.stat().st_size]
        found.sort(key=lambda path: path.stat().st_mtime_ns)
        read = {path.stem: path.read_text("utf-8").partition("Extension modules:")[0] for path in found}
        told = "\n".join(f"---- rank {rank} ----\n{trace}" for rank, trace in read.items())
        return f"{self.function.__qualname__} on {len(ends)} ranks, {self.timeout:.0f} s at most: {ends}\n{told}"


def spawn(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call a module-level function with args in `world` real processes; what it returned on each rank, in order.

    Each has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, and one thread. Results are what torch can
    save. Raises RankFailed with the trace of the first rank that failed; the others are then ended.
    """
    return Ranks(world, function, *args, timeout=timeout).results()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(environment: Mapping[str, str], stem: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The life of one rank: its result in STEM.pt, or the trace in STEM.trace and exit code 1, or in STEM.fault."""
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable(open(f"{stem}.fault", "w"))  # noqa: SIM115 - it stays open until the rank ends
    gc.freeze()  # or the first collection would touch, and so copy, every object that was preloaded
    torch.set_num_threads(1)
    try:
        result = function(*args)
        torch.save(result, f"{stem}.pt")
    except BaseException:
        Path(f"{stem}.trace").write_text(traceback.format_exc(), "utf-8")
        os._exit(1)  # at once: a normal end would wait for collectives that no other rank joins
