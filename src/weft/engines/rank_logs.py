"""Where the ranks of one host write: rank 0 to the terminal, the others into files; and how each has ended."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

OUTCOME = "WEFT_OUTCOME"  # the file in which a rank writes how it ended
LAUNCHER = "WEFT_LAUNCHER"  # number of the agent's process, which a rank does not outlive


def keep_agents_words(folder: Path) -> logging.Handler:
    """Write what torch's agent logs into a file of its own, in place of the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / "agent.log", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.propagate = False
    elastic.handlers = [file]
    return file


class RankLogs(LogsSpecs):
    """Rank 0 writes to the terminal itself; the others into files, from where their lines come under their numbers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.outcomes: dict[int, Path] = {}  # by global rank, of the round that runs
        self.files: dict[int, Path] = {}
        self.leaves = False  # this host ends, and the others may go on without it
        self._round = 0

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        destination = LogsDest()
        self.outcomes, self.files = {}, {}
        for local, env in envs.items():
            rank = int(env["RANK"])
            stem = f"{self.folder}/rank{rank}" + (f".round{self._round}" if self._round else "")
            self.outcomes[rank] = Path(f"{stem}.outcome")
            self.outcomes[rank].unlink(missing_ok=True)
            env |= {OUTCOME: str(self.outcomes[rank]), LAUNCHER: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
            destination.stdouts[local] = destination.stderrs[local] = ""
            destination.error_files[local] = f"{stem}.error"
            if rank:
                self.files[rank] = Path(f"{stem}.stderr.log")
                destination.stdouts[local] = destination.tee_stdouts[local] = f"{stem}.stdout.log"
                destination.stderrs[local] = destination.tee_stderrs[local] = f"{stem}.stderr.log"
        self._round += 1
        return destination

    def outcome(self, rank: int) -> dict[str, Any]:
        """What a rank wrote down of its end; nothing when it was killed."""
        try:
            return json.loads(self.outcomes[rank].read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def log(self, rank: int) -> Path | None:
        """The file with a rank's trace, else with what it wrote as errors; None when it wrote nothing, or all on the
        terminal."""
        files = self.outcomes[rank].with_suffix(".trace"), self.files.get(rank)
        return next((file for file in files if file and file.is_file() and file.stat().st_size), None)

    def last_line(self, rank: int) -> str:
        """The last line that a rank wrote as an error, where it is in a file."""
        file = self.files.get(rank)
        lines = file.read_text("utf-8", errors="replace").split("\n") if file and file.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def tidy(self) -> None:
        """Delete logs that say nothing."""
        for file in self.folder.glob("*"):
            if file.suffix == ".outcome" or file.stat().st_size == 0:
                file.unlink()
        for folder in (self.folder, self.folder.parent):
            if not any(folder.iterdir()):
                folder.rmdir()
