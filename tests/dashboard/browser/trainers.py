"""Trains small runs in processes of their own, forked from one that has read torch and its company already."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from weft.cli.main import main


class Trainers:
    """Asks the process below for runs. root: where it keeps its models, configs and runs."""

    def __init__(self, root: Path, process: "subprocess.Popen[str]") -> None:
        self.root, self._process = root, process

    def start(self, name: str, steps: int) -> int:
        """Begin `weft train` of a run; its process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"name": name, "schedule": {"steps": steps}}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def trainers(root: Path) -> Iterator[Trainers]:
    root.mkdir(parents=True)
    with (root / "trainers.log").open("w") as log:
        command = [sys.executable, "-m", "tests.dashboard.browser.trainers", str(root)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        yield Trainers(root, process)
        process.communicate()  # at the end of its input it kills those that still train


def small_model(root: Path) -> dict[str, Any]:
    """A config to be changed, of a model and clips that are made in the folder."""
    from tests.small import make_clips, make_wan, merged, plain_config

    make_wan(root / "model")
    make_clips(root / "clips", count=3)
    samples = {"prompts": ["a square"], "frames": 5, "width": 32, "height": 32, "steps": 1, "every": 0}
    change = {"save": {"every": 0}, "validation": {"every": 0}, "samples": samples}
    return merged(plain_config(root, root / "model", root / "clips"), change)


def forked(root: Path, plain: dict[str, Any]) -> int:
    """The process that trains; in it, this does not return."""
    path = root / f"{plain['name']}.yaml"
    path.write_text(yaml.safe_dump(plain))
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    with (root / f"{plain['name']}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    raise SystemExit(main(["train", str(path)]))


def serve(root: Path) -> None:
    plain, begun = small_model(root), []
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead leave no zombies
    for line in sys.stdin:
        begun.append(forked(root, {**plain, **json.loads(line)}))
        print(begun[-1], flush=True)
    for pid in begun:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
