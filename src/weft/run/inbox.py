"""Commands to a running trainer: one JSON file each in its run's inbox/, which it reads between its steps."""

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from weft.durable import is_running, write_whole
from weft.errors import RunError, did_you_mean
from weft.run.folder import born, is_zombie

# Command -> what it does.
COMMANDS: Mapping[str, str] = {
    "pause": "wait after this step; its memory stays taken",
    "resume": "go on after a pause",
    "stop": "save after this step, and end",
    "save": "save a checkpoint and the adapter after this step",
    "validate": "measure the held-out items after this step",
    "sample": "make a sample of every prompt after this step",
    "rate": "set or scale the learning rate at the top of its schedule",
}
ENDING = ".json"
LARGEST = 1 << 16  # bytes of a command's file


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command as its trainer took it. refusal: why it is none that could be followed."""

    id: str
    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    by: str = "unknown"  # ctl or dashboard
    refusal: str = ""


# ---- Giving a command ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """The process of a run's first rank, as it wrote itself down."""

    pid: int
    born: str | None
    host: str
    started: float  # seconds since 1970

    @property
    def is_here(self) -> bool:
        return self.host == platform.node()

    def has_ended(self) -> bool:
        """Whether it is known that the process is gone; of another host's it is not."""
        if not self.is_here:
            return False
        gone = is_running(self.pid) is False or (self.born is not None and born(self.pid) != self.born)
        return gone or is_zombie(self.pid)


def trainer_of(run: Path) -> Trainer:
    """Who trains in a run's folder. Raises RunError when nobody does."""
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run.{_nearest(run)}")
    try:
        facts = json.loads((run / "process.rank0.json").read_text())
        found = Trainer(facts["pid"], facts["born"], facts["host"], facts["started"])
    except FileNotFoundError:
        raise RunError(f"{run}: nobody trains here now, so nobody would hear a command.") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{run}: process.rank0.json is damaged. Look for the process by hand: ps -ef.") from None
    if found.has_ended():
        raise RunError(
            f"{run}: process {found.pid} trained here and has ended without signing off (killed, or the machine went "
            "down), so nobody would hear a command. Start the training again to go on from the newest checkpoint."
        )
    return found


def _nearest(run: Path) -> str:
    """Folders beside the missing one that look like it."""
    if not run.parent.is_dir():
        return f" There is no folder '{run.parent}' either."
    there = sorted(path.name for path in run.parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    return f" {did_you_mean(run.name, there)}" if there else ""


def post(folder: Path, command: str, arguments: Mapping[str, Any], by: str) -> str:
    """Leave a command for the process that trains in a run's folder; the command's id, under which the event `control`
    answers. Raises RunError for what is no command, where nobody trains, and where the folder cannot be written."""
    asked = checked(command, arguments)
    trainer_of(folder)
    identity = f"{time.time_ns():020d}-{uuid4().hex[:8]}"
    letter = {"format": 1, "id": identity, "command": command, "arguments": asked, "by": by, "time": time.time()}
    try:
        write_whole(folder / "inbox" / f"{identity}{ENDING}", json.dumps(letter))
    except PermissionError:
        raise RunError(
            f"{folder / 'inbox'}: it may not be written by this user. Give the command as the user who trains there."
        ) from None
    except OSError as failed:
        raise RunError(f"{folder / 'inbox'}: the command could not be written: {failed.strerror}.") from failed
    return identity


def checked(command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command. Raises RunError for an unknown command, and for arguments that it does not take."""
    if command not in COMMANDS:
        raise RunError(f"there is no command '{command}'. {did_you_mean(command, list(COMMANDS))}")
    if not isinstance(arguments, Mapping):
        raise RunError(f"{command}: arguments are named, and got {arguments!r}.")
    known = ("lr", "factor", "optimizer") if command == "rate" else ()
    if odd := [name for name in arguments if name not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise RunError(f"{command}: '{odd[0]}' is no argument of it; {takes}.")
    return checked_rate(arguments) if command == "rate" else {}


def checked_rate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """lr or factor, and the optimizer's name or None for all. Raises RunError."""
    given = {name: arguments[name] for name in ("lr", "factor") if arguments.get(name) is not None}
    if len(given) != 1:
        got = "both" if given else "neither"
        raise RunError(
            f"rate: give lr (the new learning rate) or factor (what the old one is multiplied by), and got {got}."
        )
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise RunError(f"rate: {name} must be a number above 0, and got {value!r}.")
    optimizer = arguments.get("optimizer")
    if optimizer is not None and not isinstance(optimizer, str):
        raise RunError(f"rate: optimizer must be the name of one, and got {optimizer!r}.")
    return {name: float(value), "optimizer": optimizer}


# ---- Hearing it ----------------------------------------------------------------------------------------------------


class Inbox:
    """The inbox of a run as its trainer sees it; early: the commands that lay there before it began."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "inbox"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stuck: set[str] = set()  # names of what was answered and could not be deleted
        self.early = self.take()

    def waiting(self) -> bool:
        """Whether there is anything to take. Raises OSError when the folder cannot be read."""
        with os.scandir(self.folder) as there:
            return any(self._is_letter(entry.name) for entry in there)

    def take(self) -> list[Command]:
        """What has come, the oldest first; it is gone from the folder then. Raises OSError as above."""
        with os.scandir(self.folder) as there:
            letters = sorted((entry for entry in there if self._is_letter(entry.name)), key=lambda entry: entry.name)
        found = []
        for entry in letters:
            found.append(read(Path(entry), entry.is_file(follow_symlinks=False)))
            try:
                os.unlink(entry)
            except OSError:  # it is answered once, and stays where it is
                self._stuck.add(entry.name)
        return found

    def _is_letter(self, name: str) -> bool:
        """Drafts of letters begin with a point."""
        return name.endswith(ENDING) and not name.startswith(".") and name not in self._stuck


def read(path: Path, is_file: bool) -> Command:
    """The command in a file, or what cannot be followed, with the reason. Its id is the file's name, which whoever
    waits for an answer knows."""
    identity = path.name.removesuffix(ENDING)
    try:
        if not is_file or path.stat().st_size > LARGEST:
            raise RunError(f"no file of at most {LARGEST} bytes.")
        letter = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(letter, dict) or not isinstance(letter.get("command"), str):
            raise RunError("no JSON object with a command.")
    except (OSError, ValueError, RecursionError):
        return Command(id=identity, command="unreadable", refusal="it is no JSON that can be read")
    except RunError as odd:
        return Command(id=identity, command="unreadable", refusal=f"it is {odd}".removesuffix("."))
    by = letter.get("by")
    known = Command(id=identity, command=letter["command"], by=by if isinstance(by, str) else "unknown")
    arguments = letter.get("arguments", {})
    try:
        asked = checked(known.command, arguments)
    except RunError as odd:
        kept = arguments if isinstance(arguments, dict) else {}
        return Command(**{**asdict(known), "arguments": kept, "refusal": str(odd)})
    return Command(**{**asdict(known), "arguments": asked})
