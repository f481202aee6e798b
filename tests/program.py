"""`weft` as a process of its own that a test can signal: a fork of the server that has imported all it needs."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.multi import PRELOADED
from weft.cli.main import main


class Program:
    """A running command, in a session of its own as behind a shell, with both outputs in one; like a Popen of it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        handle, name = tempfile.mkstemp(prefix="program.")
        os.close(handle)
        self.output = Path(name)
        found = {**os.environ, **(environment or {})}
        self.process = context.Process(target=_command, args=(list(arguments), found, os.getcwd(), name), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Its output, once it has ended. Raises TimeoutError when it has not in so many seconds."""
        self.process.join(timeout)
        said = self.output.read_text("utf-8", errors="replace")
        if self.process.is_alive():
            raise TimeoutError(f"still running after {timeout} s:\n{said}")
        self.output.unlink()
        return said, None


def _command(arguments: list[str], environment: Mapping[str, str], folder: str, output: str) -> None:
    """The life of the process."""
    gc.freeze()  # or the first collection would touch, and so copy, every object that was preloaded
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment.get("PYTHON_EXEC", sys.executable)  # of what it starts; torch's name for this
    out = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    faulthandler.enable()
    raise SystemExit(main(arguments))
