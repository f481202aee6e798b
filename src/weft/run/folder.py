"""A run's folder: what stands where, and how files and folders come to be there whole or not at all.

config.yaml            resolved; parses to the same config          config.input.yaml   as the user wrote it
environment.json       versions, device, git, command line          process.rank0.json  who runs here, since when
events.rank0.jsonl     one event a line, appended for ever      run.rank0.log       what it said, and how it crashed
heartbeat.rank0.json   that it lives, and when it last moved
checkpoints/global_step_N/   everything to resume exactly           global_step_N/      the adapter, for use
adapter/               the finished adapter                         samples/ incidents/
predictions/           answers to test documents, without text      summary.json        what a stream of them comes to
"""

import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weft.durable import is_running, remove_drafts, write_whole
from weft.errors import RunError

PACKAGES = ("weft", "torch", "diffusers", "transformers", "peft", "safetensors", "av", "numpy", "pydantic")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; safetensors tells it in words alone."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written in a run."""
    for parent in (folder, folder / "checkpoints"):
        remove_drafts(parent)


def claim(folder: Path, rank: int = 0) -> Path:
    """Write down that this process trains here. Raises RunError when a living process of this machine does already."""
    path = folder / f"process.rank{rank}.json"
    if path.is_file():
        try:
            other = json.loads(path.read_text())
        except json.JSONDecodeError:
            other = {}
        pid = other.get("pid")
        if pid and other.get("host") == platform.node() and pid != os.getpid() and is_alive(pid, other.get("born")):
            raise RunError(
                f"{folder}: process {pid} trains in this run folder. Wait for it, stop it, or choose another 'name'."
            )
    facts = {"pid": os.getpid(), "born": born(os.getpid()), "host": platform.node(), "started": time.time()}
    write_whole(path, json.dumps(facts))
    return path


def born(pid: int) -> str | None:
    """When a process began, as the kernel counts it: pids are used again, births are not. None off Linux."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def is_alive(pid: int, birth: str | None) -> bool:
    """Whether the process that wrote itself down still works. Not known on Windows, where asking would end it."""
    return bool(is_running(pid)) and (birth is None or born(pid) == birth) and not is_zombie(pid)


def is_zombie(pid: int) -> bool:
    """Whether a process has ended, but its parent has not asked how: in containers nobody may ever ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and command line of this run, for its folder and its adapters' provenance."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": device,
        "argv": sys.argv,
        "git": git_commit(),
    }


def git_commit() -> str | None:
    """Commit of the working directory, with a plus when files have changed; None outside of a repository."""
    try:
        asked = ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically."""
    write_whole(path, json.dumps(data, indent=1, default=str) + "\n")
