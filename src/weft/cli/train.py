"""weft train: one run, from its config to its adapter, in this process or on several."""

import argparse
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from weft.cli.launched import STOPPED_EVERYWHERE, Rank, as_rank, own_rank
from weft.cli.seeds import add_shorthands, seeds_of, shorthands, train_seeds
from weft.cli.together import Asked
from weft.config.ready import find_config
from weft.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Train. Exit code 0 when finished, 130 when stopped by Ctrl-C, 143 by SIGTERM; both saved first."""
    # Alone it would take the config for its port, where that comes next.
    words = [f"{word}=usual" if word == "--dashboard" else word for word in argv]
    arguments = parser().parse_intermixed_args(words)
    config, overrides = find_config(arguments.config), [*arguments.overrides, *shorthands(arguments)]
    asked = Asked(
        arguments.gpus, arguments.processes, arguments.nodes, arguments.node_rank, arguments.rendezvous,
        arguments.restarts, arguments.patience,
    )  # fmt: skip
    if arguments.independent and (odd := asked.joining()):
        raise ConfigError(f"{odd} joins processes in one run, and --independent parts them. Leave one out.")
    if arguments.seeds is not None and (arguments.detach or arguments.independent or arguments.seed is not None):
        raise ConfigError("--seeds trains one run after another here: leave --detach, --independent and --seed out.")
    if arguments.dashboard and own_rank(os.environ).number == 0:
        from weft.cli.dashboard import start_beside
        from weft.run.config import load_config

        start_beside(arguments.dashboard, load_config(config, overrides).output)
    if arguments.detach:
        from weft.cli.detached import detach

        return detach(config, overrides, asked.words(), independent=arguments.independent)
    if arguments.independent:
        from weft.cli.independent import train_independently

        return train_independently(config, overrides, arguments.processes)
    if arguments.seeds is not None:
        return train_seeds(config, overrides, seeds_of(arguments.seeds), lambda more: train_once(config, more, asked))
    return train_once(config, overrides, asked)


def train_once(config: Path, overrides: Sequence[str], asked: Asked) -> int:
    """One run, in this process or on those that were asked for."""
    if asked.words():
        from weft.cli.together import train_together

        return train_together(config, overrides, asked)
    return train(config, overrides)


def parser() -> argparse.ArgumentParser:
    """The options of weft train."""
    parser = argparse.ArgumentParser(prog="weft train", description="Train an adapter as a config says.")
    parser.add_argument("config", type=Path, help="the run's YAML, or the name of a ready config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as adapter.rank=32 resume=latest")
    add_shorthands(parser)
    parser.add_argument(
        "--seeds", metavar="A-B", help="a run with each of these seeds, one after another, in NAME-seedN"
    )
    parser.add_argument("--detach", action="store_true", help="train in the background, and return once it has begun")
    parser.add_argument("--dashboard", metavar="[=PORT]", help="a page about it in the browser, by a process of its "
                        "own, which ends when nobody watches and nothing runs")  # fmt: skip
    several = parser.add_argument_group("on several GPUs, one run (parallel: in the config says how they share it)")
    several.add_argument("--gpus", metavar="N|all", help="so many of this host's visible GPUs, a process for each")
    several.add_argument("--processes", type=int, metavar="N", help="so many processes on the processor")
    several.add_argument("--nodes", metavar="N|MIN:MAX", help="so many hosts, this command on each; MIN:MAX: go on "
                         "when hosts come or go")  # fmt: skip
    several.add_argument("--node-rank", type=int, metavar="K", help="this host's number; 0 keeps the rendezvous")
    several.add_argument("--rendezvous", metavar="HOST:PORT", help="where hosts meet; else MASTER_ADDR:MASTER_PORT")
    several.add_argument("--restarts", type=int, metavar="N", help="after a failure begin again from the newest "
                         "checkpoint, so often (one host: 0, several: 3)")  # fmt: skip
    several.add_argument("--patience", type=int, metavar="SECONDS", help="after which a silent host is lost (30)")
    parser.add_argument(
        "--independent", action="store_true",
        help="one run for each visible GPU or each of --processes: each trains its own adapter, NAME_gpuN, on its "
        "share of the clips",
    )  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # what deepspeed appends
    return parser


def train(path: Path, overrides: Sequence[str]) -> int:
    """Train in this process, which may be one rank of several."""
    rank = own_rank(os.environ)
    return as_rank(rank, lambda: train_here(path, overrides, rank))


def train_here(path: Path, overrides: Sequence[str], rank: Rank) -> int:
    """The training itself; only rank 0 talks of it."""
    quiet_libraries()
    from weft.cli.accelerated import accelerate_overrides
    from weft.run.config import parse_config, read_source

    source = read_source(path, overrides)
    if implied := accelerate_overrides(os.environ, source.data):
        source = read_source(path, [*implied, *overrides])
    config = parse_config(source)

    from weft.run.listeners import Terminal
    from weft.run.start import train_run

    terminal = Terminal() if rank.number == 0 else None
    request = StopRequest(silent=not rank.alone and (rank.number > 0 or rank.outcome is not None))
    request.listen()
    try:
        result = train_run(config, terminal or (lambda event: None), request, path.read_text(encoding="utf-8"))
    finally:
        if terminal:
            terminal.close()
    if result.finished:
        for folder in result.adapters if terminal else ():
            print(f"adapter: {folder}")
        if terminal and config.family.medium == "documents":
            print_scores(result.folder)
        return 0
    if terminal:
        to_go_on = "" if rank.outcome else f" To go on, run {again(path, overrides, rank)}"
        print(f"saved at step {result.step}.{to_go_on}", file=sys.stderr)
    if result.commanded and rank.outcome is not None:
        return STOPPED_EVERYWHERE
    return 128 + (request.signal or signal.SIGTERM)  # it may have been another rank that was asked


def print_scores(folder: Path) -> None:
    """What a run on documents comes to: the matrix of its main metric, and where all numbers stand."""
    from weft.run.score_table import SUMMARY, scored_run, table_lines

    if (found := scored_run(folder)) is not None:
        print("\n".join(["", *table_lines(found), f"all numbers and their formulas: {folder / SUMMARY}"]))


def again(path: Path, overrides: Sequence[str], rank: Rank) -> str:
    """What starts this run once more; another launcher's words are not known here."""
    if not rank.alone:
        return "the launcher's command that started it once more."
    return f"the same command again:\n  {shlex.join(['weft', 'train', str(path), *overrides])}"


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of ours; their errors still come. Before they are imported: they
    read these variables once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # transformers imports DeepSpeed where it is installed, which then says so on every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(NoRemark("Setting accelerator to CPU"))


class NoRemark(logging.Filter):
    """Lets all messages pass but those that begin with the given words."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


class StopRequest:
    """Remembers a Ctrl-C or SIGTERM until the step is done; a second one ends the process at once. silent: of ranks
    whose launcher, or whose rank 0, tells it."""

    def __init__(self, silent: bool = False) -> None:
        self.signal = 0
        self.silent = silent
        self._since = 0.0

    def __call__(self) -> bool:
        return self.signal != 0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGTERM and time.monotonic() - self._since < REPEATED:
            return
        if self.signal:
            raise KeyboardInterrupt
        self.signal, self._since = number, time.monotonic()
        if not self.silent:
            print(STOPPING, file=sys.stderr, flush=True)


# Seconds in which a second SIGTERM is the first one again: schedulers and launchers tell every process of a job.
REPEATED = 5
STOPPING = "\nstopping: this step is finished and saved first. Once more ends at once."
