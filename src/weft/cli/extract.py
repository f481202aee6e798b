"""weft extract: the adapter between a base model and one that was tuned from it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from weft.run.extract import Extraction, Rule
    from weft.run.extracting import Pair

SHOWN = 5  # layers of which least is held
RANK, MOST = 32, 128


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft extract",
        description="Find the LoRA that is nearest to what a tuned model changes of its base, layer by layer. Each may "
        "be a folder of diffusers or transformers, the makers' own directory, or one .safetensors file.",
    )
    parser.add_argument("base", help="the model that the tuned one was made from")
    parser.add_argument("tuned", help="the tuned model")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="ADAPTER", help="a new folder, or a .safetensors file"
    )
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--rank", type=int, help=f"of every layer (default: {RANK})")
    rule.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="such as 0.98: of each layer the smallest rank that holds so much",
    )
    parser.add_argument("--max-rank", type=int, help=f"with --energy: at most this rank (default: {MOST})")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="as in adapter.targets (default: attention, MLPs)",
    )
    parser.add_argument("--format", nargs="+", default=["peft"], help="of the adapter (default: peft)")
    parser.add_argument("--expert", choices=("high", "low"), help="of a model with two networks")
    parser.add_argument("--device", default="cpu", help="what decomposes the matrices: cpu, cuda or cuda:1")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is there")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Extract, write, and say what is held and what is not."""
    arguments = arguments_of(argv)

    from weft import plugins
    from weft.run.extracting import check_place, extracted, open_pair, write_extracted

    rule = rule_of(arguments.rank, arguments.energy, arguments.max_rank)
    for name in arguments.format:
        plugins.find("format", name)
    check_place(arguments.out, arguments.format, arguments.overwrite)
    device = device_of(arguments.device)
    pair = open_pair(arguments.base, arguments.tuned, arguments.expert, arguments.targets)
    for line in pair.warnings:
        print(f"warning: {line}", file=sys.stderr)
    made = extracted(pair, rule, device, Progress(len(pair.base.shapes)).seen)
    write_extracted(arguments.out, made.adapter, arguments.format)
    tell(pair, rule, made)
    print(arguments.out)
    return 0


def rule_of(rank: int | None, share: float | None, most: int | None) -> "Rule":
    """Raises ConfigError."""
    from weft.run.extract import Rule

    if share is None and most is not None:
        raise ConfigError("--max-rank: goes with --energy alone. Write --rank for a fixed one.")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--energy: expected a share above 0 and at most 1, such as 0.98, got {share:g}.")
    for option, number in (("--rank", rank), ("--max-rank", most)):
        if number is not None and number < 1:
            raise ConfigError(f"{option}: expected a whole number of at least 1, got {number}.")
    return Rule(most=rank or most or (RANK if share is None else MOST), share=share)


def device_of(name: str) -> "torch.device":
    """Raises ConfigError."""
    import torch

    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ConfigError(f"--device: expected cpu, cuda or cuda:1, got '{name}'.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device: there is no {name} here; torch sees {torch.cuda.device_count()}. Write cpu.")
    return torch.device(name)


class Progress:
    """A line on a terminal that says how many tensors were read."""

    def __init__(self, tensors: int) -> None:
        self.tensors, self.read, self.shown = tensors, 0, sys.stderr.isatty()

    def seen(self, name: str) -> None:
        self.read += 1
        if self.shown:
            end = "\r" if self.read < self.tensors else "\n"
            print(f"{self.read} of {self.tensors} tensors", end=end, file=sys.stderr, flush=True)


def tell(pair: "Pair", rule: "Rule", made: "Extraction") -> None:
    layers = made.layers
    ranks = sorted({layer.rank for layer in layers.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    print(f"{rank} on {len(layers)} layers; of their change {made.captured:.2%} is held, least in")
    for path in sorted(layers, key=lambda path: layers[path].captured)[:SHOWN]:
        print(
            f"{layers[path].captured:8.2%}  {path} (rank {layers[path].rank}, change {layers[path].energy ** 0.5:.3g})"
        )
    if made.unchanged:
        print(f"left out: {len(made.unchanged)} target layers that are the same, such as {made.unchanged[0]}")
    if made.left_out:
        print(f"not held: what differs elsewhere; the adapter has {made.captured_of_all:.2%} of all that differs")
        for kind, of in sorted(made.left_out.items(), key=lambda item: -item[1].energy):
            relative = f", {(of.energy / of.before) ** 0.5:.2%} of them" if of.before else ""
            print(f"  {len(of.names)} {kind}: change {of.energy**0.5:.3g}{relative}, such as {of.names[0]}")
    if made.alone:
        print(f"not compared: {len(made.alone)} tensors that one of the models has not, such as {made.alone[0]}")
    short = [path for path, layer in layers.items() if rule.share is not None and layer.captured < rule.share]
    if short:
        print(f"{len(short)} layers hold less than {rule.share:.2%} at the largest rank, {rule.most}")
    tell_rounding(pair, made)


def tell_rounding(pair: "Pair", made: "Extraction") -> None:
    rounded = [path for path, layer in made.layers.items() if layer.rounded]
    if rounded:
        print(
            f"warning: {len(rounded)} of {len(made.layers)} layers differ as by rounding alone, such as {rounded[0]}: "
            f"by as much, and in no direction more than in another. Is {pair.tuned.path} a tuned model of this base?",
            file=sys.stderr,
        )
    explained = sum(min(layer.rounding, layer.energy) for layer in made.layers.values()) / made.energy
    if explained >= 0.01:
        print(f"rounding to 16 bits explains about {explained:.0%} of the change, and no adapter holds that")
