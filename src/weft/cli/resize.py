"""weft resize: an adapter of a smaller rank."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.resizing import Resized

SHOWN = 5  # layers that lose most


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft resize", description="Cut each layer of a LoRA to its largest singular values."
    )
    parser.add_argument("adapter", type=Path, help="a folder or file with a LoRA, or the folder of a finished run")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--rank", type=int, help="of all layers")
    way.add_argument(
        "--energy",
        type=float,
        help="of each layer the smallest rank that keeps such a share of its squares: 0.95",
    )
    parser.add_argument("--max-rank", type=int, help="with --energy: no layer gets more")
    parser.add_argument("--all", action="store_true", help="say the rank and the loss of every layer")
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder, written for PEFT, and of video adapters for diffusers"
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Make an adapter's rank smaller, and say what is lost."""
    arguments = arguments_of(argv)
    if arguments.max_rank is not None and arguments.energy is None:
        raise ConfigError("--max-rank goes with --energy: --rank is the rank of every layer.")
    if arguments.energy is not None and not 0 < arguments.energy < 1:
        raise ConfigError(f"--energy: expected a share between 0 and 1, such as 0.95; got {arguments.energy:g}.")
    for name in ("rank", "max_rank"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected a whole number of at least 1, got {value}.")

    from weft.formats.reading import read_adapter
    from weft.run.merge import folders_of, write_merged
    from weft.run.resizing import Cut, resized

    cut = Cut(arguments.rank, arguments.energy, arguments.max_rank)
    made = {}
    for path in folders_of(arguments.adapter):
        adapter = read_adapter(path)
        made[adapter.metadata.get("weft.expert", "default")] = resized(path, adapter, cut)
    write_merged(arguments.out, {expert: one.adapter for expert, one in made.items()})
    for expert, one in made.items():
        if len(made) > 1:
            print(f"expert {expert}")
        tell(one, arguments.all)
    print(arguments.out)
    return 0


def tell(made: "Resized", every: bool) -> None:
    counts = Counter(made.ranks.values())
    ranks = ", ".join(f"{rank} on {counts[rank]} layers" for rank in sorted(counts, reverse=True))
    print(
        f"rank {ranks}; of the change {made.whole:.2%} is lost ({1 - made.whole**2:.2%} of its squares kept), most in"
    )
    worst = sorted(made.lost, key=lambda path: -made.lost[path])
    for path in list(made.lost) if every else worst[:SHOWN]:
        print(f"{made.lost[path]:8.2%}  rank {made.ranks[path]:<4} {path}")
