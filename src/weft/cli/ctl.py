"""weft ctl: tell a run that trains what to do, and hear what came of it."""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import RunError

if TYPE_CHECKING:
    from weft.run.inbox import Trainer

PATIENCE = 60.0  # seconds
GLANCE = 0.2  # seconds between two looks
SILENT = 60.0  # seconds without a sign of life after which another host's process is doubted


def run(argv: Sequence[str]) -> int:
    """Give a command and wait for the answer; without a command say who trains and what can be asked of it."""
    arguments = parser().parse_args(argv)
    given = arguments_of(arguments)
    if arguments.command is None:
        show(arguments.run)
        return 0
    return command(arguments.run, arguments.command, given, arguments.timeout)


def parser() -> argparse.ArgumentParser:
    """The options of weft ctl."""
    from weft.run.inbox import COMMANDS

    parser = argparse.ArgumentParser(
        prog="weft ctl",
        description="Tell a run that trains what to do. It hears commands between its steps.",
        epilog="\n".join(["commands:", *listed(COMMANDS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="runs/NAME", help="folder of a run")
    parser.add_argument("command", nargs="?", help="one of those below; without one the run's state is told")
    parser.add_argument("lr", nargs="?", type=float, help="of rate: the new learning rate at the top of the schedule")
    parser.add_argument("--factor", type=float, help="of rate, in place of lr: multiply the old one by it")
    parser.add_argument("--optimizer", metavar="NAME", help="of rate: this one alone, such as critic; else all")
    parser.add_argument("--timeout", type=float, default=PATIENCE, help="seconds to wait for an answer (%(default)g)")
    return parser


def listed(commands: Mapping[str, str]) -> list[str]:
    return [f"  {name:<10} {what}" for name, what in commands.items()]


def arguments_of(asked: argparse.Namespace) -> dict[str, Any]:
    """What was given with the command, by name; whether the command takes it, the inbox says."""
    return {name: value for name in ("lr", "factor", "optimizer") if (value := getattr(asked, name)) is not None}


def command(run: Path, name: str, arguments: dict[str, Any], timeout: float) -> int:
    """Give the command, and wait until it is done. Raises RunError when it is refused, or not answered in time."""
    from weft.run.inbox import post, trainer_of

    answers = Answers(run / "events.rank0.jsonl")
    identity = post(run, name, arguments, by="ctl")
    trainer = trainer_of(run)
    deadline = time.monotonic() + timeout
    while True:
        over = trainer.has_ended() or not (run / "process.rank0.json").is_file()  # before the log is read once more
        if answer := answers.to(identity):
            return report(run, answer)
        if over:
            raise RunError(f"{run}: process {trainer.pid} ended before it heard '{name}'{answers.last_end()}.")
        if time.monotonic() > deadline:
            raise RunError(f"{run}: {unanswered(run, name, trainer, timeout)}")
        time.sleep(GLANCE)


def report(run: Path, answer: dict[str, Any]) -> int:
    """Say what came of a command. Raises RunError when it was refused."""
    if not answer["done"]:
        raise RunError(f"{run}: '{answer['command']}' was refused at step {answer['step']}: {answer['reason']}")
    reason = f": {answer['reason']}" if answer["reason"] else ""
    print(f"{run}: {answer['command']} at step {answer['step']}{reason}.")
    return 0


def unanswered(run: Path, name: str, trainer: "Trainer", timeout: float) -> str:
    """Why there may be no answer yet, and what becomes of the command."""
    facts = last_beat(run)
    where = "" if trainer.is_here else f" on {trainer.host}"
    doing = f", {facts['phase']} at step {facts['step']}" if facts else ""
    silence = time.time() - facts["time"] if facts else 0.0
    doubt = f" It gave its last sign of life {silence:.0f} s ago." if silence > SILENT else ""
    return (
        f"process {trainer.pid}{where}{doing} has not answered '{name}' within {timeout:g} s.{doubt} The command stays "
        "in its inbox and is heard after the step; what comes of it stands in the run's log."
    )


class Answers:
    """The events that a run tells from now on."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._place = log.stat().st_size if log.is_file() else 0
        self._end: dict[str, Any] | None = None

    def to(self, identity: str) -> dict[str, Any] | None:
        """The answer to a command, once there is one."""
        for event in self._new():
            if event.get("event") == "run_ended":
                self._end = event
            if event.get("event") == "control" and event.get("id") == identity:
                return event
        return None

    def last_end(self) -> str:
        """How the run ended, for the end of a sentence; nothing when it did not tell."""
        if self._end is None:
            return ""
        reason = f", {self._end['reason']}" if self._end["reason"] else ""
        return f" ({self._end['outcome']} at step {self._end['step']}{reason})"

    def _new(self) -> Iterator[dict[str, Any]]:
        """Whole lines that have come; one that is half-written is read with the next look."""
        if not self._log.is_file():
            return
        with self._log.open("rb") as log:
            log.seek(self._place)
            whole, _, _ = log.read().rpartition(b"\n")
        if not whole:
            return
        self._place += len(whole) + 1
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # a line that a kill cut off
                continue
            if isinstance(event, dict):
                yield event


def show(run: Path) -> None:
    """Who trains in a run's folder, where it stands, and what can be asked of it. Raises RunError when nobody does."""
    from weft.run.inbox import COMMANDS, trainer_of

    trainer = trainer_of(run)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(trainer.started))
    print(f"{run}: process {trainer.pid} on {trainer.host}, since {since}{standing(run)}")
    print(f"weft ctl {run} COMMAND:")
    for line in listed(COMMANDS):
        print(line)


def standing(run: Path) -> str:
    """Phase and step, with a point before."""
    facts = last_beat(run)
    if facts is None:
        return ""
    of = f" of {facts['total_steps']}" if facts.get("total_steps") else ""
    silence = time.time() - facts["time"]
    doubt = f"; last sign of life {silence:.0f} s ago" if silence > SILENT else ""
    return f": {facts['phase']}, step {facts['step']}{of}{doubt}"


def last_beat(run: Path) -> dict[str, Any] | None:
    """What the first rank last said of itself; None before it did."""
    from weft.run.heartbeat import read_heartbeats

    return read_heartbeats(run).get(0)
