"""One rank of several, whoever launched it: what is wrong is told once, and how it ended is left to the launcher."""

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError, WeftError

# Given by `weft train --gpus`; the same names as in engines/rank_logs.py, which is not read here, for it holds torch.
OUTCOME = "WEFT_OUTCOME"
LAUNCHER = "WEFT_LAUNCHER"
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
MENDABLE = 2  # exit code for what the user can mend
STOPPED_EVERYWHERE = 144  # between a rank's work and its outcome: a command ended the run, for every host


@dataclass(frozen=True)
class Rank:
    """This process among those of its run. outcome: the file for its end, when `weft train --gpus` started it."""

    number: int = 0
    world: int = 1
    outcome: Path | None = None

    @property
    def alone(self) -> bool:
        return self.world == 1 and self.outcome is None


def own_rank(environment: Mapping[str, str]) -> Rank:
    """The rank that torchrun, accelerate, deepspeed, Slurm's srun or weft itself has given this process."""
    outcome = environment.get(OUTCOME)
    try:
        number, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ConfigError(
            f"RANK is '{environment.get('RANK')}' and WORLD_SIZE '{environment.get('WORLD_SIZE')}', and both must be "
            "numbers. A launcher such as torchrun sets them; without one, unset both."
        ) from None
    return Rank(number, world, Path(outcome) if outcome else None)


def as_rank(rank: Rank, work: Callable[[], int]) -> int:
    """Run a rank's work. Raises what is to be told here, and returns the exit code of what was told elsewhere."""
    if rank.alone:
        return work()
    if rank.outcome is not None:
        end_with_parent()
    try:
        code = work()
    except KeyboardInterrupt:
        if rank.number == 0 and rank.outcome is None:
            raise
        return 128 + signal.SIGINT
    except Exception as error:
        return failed(rank, error)
    if rank.outcome is None:
        return code
    # 0 also when stopped: with any other code the agent would end ranks that are still writing.
    leave(rank.outcome, stopped=code != 0, **({"everywhere": True} if code == STOPPED_EVERYWHERE else {}))
    return 0


def failed(rank: Rank, error: Exception) -> int:
    """Answer an error: leave it to the launcher where that is ours, else tell it unless another rank does."""
    from weft.engines.peers import LOST_PEER, is_to_be_told, lost_peer

    if lost_peer(error):
        said = f"{LOST_PEER}: {first_line(error)}"
        return left(rank, 1, said, lost_peer=True) or complain(rank, said, 1)
    if isinstance(error, WeftError):
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        if code := left(rank, MENDABLE, problems[0], problems=problems):
            return code
        told = is_to_be_told(rank.number, "\n".join(problems))
        if rank.number == 0:
            raise error
        return complain(rank, "\n".join(problems), MENDABLE) if told else MENDABLE
    if rank.outcome is not None and rank.number:
        # Mostly all ranks fail alike, and the first one's trace is on the terminal.
        rank.outcome.with_suffix(".trace").write_text("".join(traceback.format_exception(error)), "utf-8")
    code = left(rank, 1, f"{type(error).__name__}: {first_line(error)}")
    if code and rank.number:
        return code
    raise error


def left(rank: Rank, code: int, said: str, **facts: Any) -> int:
    """The exit code, after the outcome was written for our own launcher; 0 when another one started this process."""
    if rank.outcome is None:
        return 0
    leave(rank.outcome, said=said, **facts)
    return code


def complain(rank: Rank, said: str, code: int) -> int:
    for line in said.splitlines():
        print(f"[rank {rank.number}] error: {line}" if rank.number else f"error: {line}", file=sys.stderr)
    return code


def leave(outcome: Path, **facts: Any) -> None:
    """Write down how this process ends."""
    from weft.durable import write_whole

    write_whole(outcome, json.dumps(facts))


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def end_with_parent() -> None:
    """Be sent a SIGTERM, and so save, when the launcher is killed: its processes would train on unseen. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(os.environ[LAUNCHER]):  # it was killed before
            os.kill(os.getpid(), signal.SIGTERM)
