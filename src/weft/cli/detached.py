"""weft train --detach: the same training in the background, with its output in the run's folder."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.cli.stop import read_trainer
from weft.errors import RunError

if TYPE_CHECKING:
    from weft.run.config import RunConfig

PATIENCE = 60.0  # seconds that are waited for the training to begin, or for its refusal
GLANCE = 0.1  # seconds between two looks


def detach(path: Path, overrides: Sequence[str], options: Sequence[str], *, independent: bool = False) -> int:
    """Start `weft train` in a session of its own. Exit code 0 once it has begun, else its own.

    options: those that start several processes. independent: as runs of their own, each with its own folder.
    """
    from weft.run.config import load_config

    if os.name != "posix":
        raise RunError(
            "--detach: Windows cannot part a process from its console so. Use Start-Process, or leave it out."
        )
    config = load_config(path, overrides)
    log = config.output / f"{config.name}_independent.log" if independent else config.folder / "train.log"
    living = read_trainer(config.folder)
    if living is not None and living.works():
        raise RunError(f"{config.folder}: process {living.pid} trains here. Follow it: tail -F {shlex.quote(str(log))}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        began, now = out.tell(), time.time()
        mode = ["--independent"] * independent
        process = subprocess.Popen(
            [sys.executable, "-m", "weft.cli.main", "train", *mode, *options, str(path), *overrides],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not has_begun(config, now, log, began):
        time.sleep(GLANCE)
    if process.returncode is not None:
        sys.stderr.write(log.read_bytes()[began:].decode(errors="replace"))
        return process.returncode
    print(f"process {process.pid} trains in the background.")
    print(f"  follow: tail -F {shlex.quote(str(log))}")
    print(f"  stop:   weft stop {stoppable(config, independent)}")
    return 0


def has_begun(config: "RunConfig", started: float, log: Path, began: int) -> bool:
    """Whether a process has found config and data usable and stands in the run's folder: the one that was started, or
    the first rank that it started. The parent of independent runs has only its first line, behind the log's earlier
    bytes."""
    trainer = read_trainer(config.folder)
    first = trainer is not None and trainer.facts["started"] >= started and trainer.works()
    return first or (log.parent != config.folder and log.stat().st_size > began)


def stoppable(config: "RunConfig", independent: bool) -> str:
    """The folder, or the pattern of folders, to stop."""
    return shlex.quote(str(config.folder)) + ("_gpu*" if independent else "")
