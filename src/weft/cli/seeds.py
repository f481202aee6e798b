"""Short ways to say seed= and schedule.epochs=, and one experiment over several seeds, a run after another."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from weft.errors import ConfigError


def add_shorthands(parser: argparse.ArgumentParser) -> None:
    """--seed and --max-epochs."""
    parser.add_argument("--seed", type=int, metavar="N", help="as seed=N")
    parser.add_argument("--max-epochs", type=float, metavar="N", help="as schedule.epochs=N: passes over the data; of "
                        "documents, over each year")  # fmt: skip


def shorthands(arguments: argparse.Namespace) -> list[str]:
    """The overrides that they stand for."""
    said: list[str] = []
    if arguments.seed is not None:
        said.append(f"seed={arguments.seed}")
    if arguments.max_epochs is not None:
        said.append(f"schedule.epochs={arguments.max_epochs:g}")
    return said


def seeds_of(text: str) -> list[int]:
    """0-4, 1,3 or 0-2,7. Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--seeds: '{text}' is no list of seeds. Write such as 0-4 or 0,1,7.")
        seeds += range(int(first), int(last if dash else first) + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: '{text}' names a seed twice, and each seed is one run.")
    return seeds


def train_seeds(path: Path, overrides: Sequence[str], seeds: Sequence[int], train: Callable[[list[str]], int]) -> int:
    """Train with each seed in a folder of its own, NAME-seedN. Exit code of the first run that does not finish; those
    that finished before are not trained again."""
    from weft.run.config import load_config

    config = load_config(path, overrides)
    folders = [config.output / f"{config.name}-seed{seed}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        print(f"seed {seed}: {folder}", flush=True)
        if code := train([*overrides, f"seed={seed}", f"name={folder.name}"]):
            print(f"stopped at seed {seed}; the same command goes on there.", file=sys.stderr)
            return code
    return 0
