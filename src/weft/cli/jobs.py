"""What a job file is made from, whatever system runs it: one run, its hosts, its GPUs, and the command on each host."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PORT = 29500  # of the rendezvous
SAVING = 120  # seconds between the warning of a preemption and the end


@dataclass(frozen=True)
class Job:
    """One run as a job. hours: as much as the job asks for. image: a container with weft; '' where none is asked for.

    config, overrides: as of weft train. processes: so many on a host's processor in place of GPUs; 0: GPUs.
    partition: Slurm's; '' for the default. accelerator: the GPUs' name, such as H100; '' for any.
    """

    name: str
    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus: int = 1
    processes: int = 0
    hours: float = 24
    partition: str = ""
    image: str = ""
    accelerator: str = ""

    def train(self, *options: str, weft: Sequence[str] = ("weft",)) -> str:
        """The command line of weft train. options: already quoted for the shell, for they hold its variables."""
        tail = shlex.join([str(self.config), *self.overrides])
        return " ".join([shlex.join([*weft, "train"]), *options, tail])

    def devices(self) -> str:
        """The option of weft train for the processes of one host."""
        return f"--processes {self.processes}" if self.processes else f"--gpus {self.gpus}"

    def clock(self) -> str:
        """The time as Slurm writes it: days-hours:minutes:seconds."""
        minutes = round(self.hours * 60)
        return f"{minutes // 1440}-{minutes % 1440 // 60:02}:{minutes % 60:02}:00"
