"""weft merge: one adapter from several."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.summed import Part, Sum

SHOWN = 5  # layers that lose most


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weft merge", description="Make one adapter of several.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--average",
        nargs="+",
        type=Path,
        metavar="ADAPTER",
        help="the mean of what they change: folders or files of LoRA adapters on the same layers, or folders of "
        "finished runs",
    )
    way.add_argument(
        "--stack",
        nargs="+",
        type=Path,
        metavar="ADAPTER",
        help="the sum of what they change, as when all are applied at once: a few-step adapter and a concept",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder, written for PEFT, and of video adapters for diffusers"
    )
    parser.add_argument("--rank", type=int, help="of the result; default: the sum of all ranks, which is exact")
    parser.add_argument(
        "--weights", help="such as 3,1: how much each adapter counts (default: all alike; of --stack each 1)"
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Average or add the changes of adapters, and say what a smaller rank lost."""
    arguments = arguments_of(argv)
    if arguments.rank is not None and arguments.rank < 1:
        raise ConfigError(f"--rank: expected a whole number of at least 1, got {arguments.rank}.")
    weights = numbers(arguments.weights) if arguments.weights else None

    from weft.run.merge import average, read_parents, read_summands, stacked, write_merged

    if arguments.stack:
        parts = read_summands(arguments.stack, weights)
        made = stacked(parts, arguments.rank)
    else:
        parts = read_parents(arguments.average, weights)
        made = average(parts, arguments.rank)
    write_merged(arguments.out, made.adapter)
    tell(parts, made, arguments.out, "sum" if arguments.stack else "average")
    return 0


def numbers(text: str) -> list[float]:
    """Numbers between commas. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights: expected numbers such as 3,1, got '{text}'.") from error


def tell(parts: "Sequence[Part]", made: "Sum", folder: Path, way: str) -> None:
    for part in parts:
        adapter = part.adapter
        counts = f"{part.weight:6.1%}" if way == "average" else f"{part.weight:6g}"
        print(f"{counts}  {part.path} (rank {adapter.rank}, scale {adapter.scale:g})")
    layers = len(made.adapter.paths)
    if made.lost:
        print(f"rank {made.adapter.rank} on {layers} layers; of the exact {way} {made.whole:.2%} is lost, most in")
        for path in sorted(made.lost, key=lambda path: -made.lost[path])[:SHOWN]:
            print(f"{made.lost[path]:8.2%}  {path}")
    else:
        print(f"rank {made.adapter.rank} on {layers} layers: the exact {way}")
    if steps := made.adapter.step_list:
        print(f"{steps}, guidance 1")
    print(folder)
