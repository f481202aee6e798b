"""weft merge: adapters into a base model, or one adapter from several."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.run.block_strengths import BlockStrengths
    from weft.run.merged_base import Written
    from weft.run.merging import Merge
    from weft.run.post_hoc import Averaged
    from weft.run.summed import Part, Sum

SHOWN = 5  # layers that lose most
SIGMA_REL = 0.15  # of --ema without a width: a short average, as musubi-tuner's users take it
DTYPES = ("as-stored", "bf16", "fp16", "fp32")
# Options that belong to some of the ways alone; given with another one they are refused, not ignored.
OF_WAYS: Mapping[str, tuple[str, ...]] = {
    "rank": ("average", "stack"), "weights": ("into", "average", "stack"), "blocks": ("into", "stack"),
    "dtype": ("into",), "expert": ("into",), "copy": ("into",), "force": ("into",), "overwrite": ("into",),
    "sigma_rel": ("ema",), "decay": ("ema",),
}  # fmt: skip


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft merge", description="Put adapters into a base model, or make one adapter of several."
    )
    parser.add_argument(
        "adapters", nargs="*", type=Path, metavar="ADAPTER", help="with --into: what goes into the base"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--into",
        type=Path,
        metavar="BASE",
        help="a model's folder or its weight file: written anew with the adapters in it, laid out alike",
    )
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
    way.add_argument(
        "--ema",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="the moving average of a run's weights, from the adapters that it saved: its folder, or those adapters",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new folder, written for PEFT, and of video adapters for diffusers; with --into a folder or .safetensors "
        "file, as the base is",
    )
    parser.add_argument("--rank", type=int, help="of the result; default: the sum of all ranks, which is exact")
    parser.add_argument(
        "--weights", help="such as 3,1: how much each adapter counts (default: all alike; of --stack and --into each 1)"
    )
    parser.add_argument("--blocks", help="strengths by block, such as 0-9=0.5,20-=0; HunyuanVideo: double:0-9=0.5")
    into = parser.add_argument_group("with --into")
    into.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: as-stored)")
    into.add_argument("--expert", choices=("high", "low"), help="of two networks, the one that the adapters are for")
    into.add_argument("--copy", action="store_true", help="copy the base's other files; default: hard links")
    into.add_argument("--force", action="store_true", help="also where an adapter names other base weights")
    into.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    ema = parser.add_argument_group("with --ema")
    ema.add_argument(
        "--sigma-rel", type=float, help=f"width of the average as a share of the training time (default: {SIGMA_REL})"
    )
    ema.add_argument("--decay", type=float, help="in place of it: share of the average that stays at each step")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Merge, average or add adapters, and say what came of it."""
    arguments = arguments_of(argv)
    way = next(name for name in ("into", "average", "stack", "ema") if getattr(arguments, name) is not None)
    refuse_options_of_others(arguments, way)
    weights = numbers(arguments.weights) if arguments.weights else None
    if way == "into":
        return into_base(arguments, weights or ())
    if way == "ema":
        return post_hoc(arguments)

    from weft.run.merge import average, read_parents, read_summands, stacked, write_merged

    blocks = strengths_of(arguments.blocks)
    if way == "stack":
        groups = read_summands(arguments.stack, weights, blocks)
        made = {expert: stacked(parts, arguments.rank, blocks) for expert, parts in groups.items()}
    else:
        groups = read_parents(arguments.average, weights)
        made = {expert: average(parts, arguments.rank) for expert, parts in groups.items()}
    write_merged(arguments.out, {expert: one.adapter for expert, one in made.items()})
    for expert, parts in groups.items():
        if len(groups) > 1:
            print(f"expert {expert}")
        tell(parts, made[expert], "sum" if way == "stack" else "average")
    print(arguments.out)
    return 0


def refuse_options_of_others(arguments: argparse.Namespace, way: str) -> None:
    """Raises ConfigError for options that the chosen way has not, and for numbers that cannot be."""
    for name, ways in OF_WAYS.items():
        value = getattr(arguments, name)
        if value not in (None, False) and way not in ways:
            belongs = " and ".join(f"--{each}" for each in ways)
            raise ConfigError(f"--{name.replace('_', '-')} goes with {belongs}, and not with --{way}. Leave it out.")
    if way == "into" and not arguments.adapters:
        raise ConfigError("--into: which adapter? Name one before it: weft merge ADAPTER --into BASE --out FOLDER.")
    if way != "into" and arguments.adapters:
        raise ConfigError(
            f"'{arguments.adapters[0]}' belongs behind --{way}: weft merge --{way} ADAPTER ADAPTER --out X."
        )
    if arguments.rank is not None and arguments.rank < 1:
        raise ConfigError(f"--rank: expected a whole number of at least 1, got {arguments.rank}.")


def numbers(text: str) -> list[float]:
    """Numbers between commas. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights: expected numbers such as 3,1, got '{text}'.") from error


def strengths_of(text: str | None) -> "BlockStrengths | None":
    """Strengths by block; None where none are given. Raises ConfigError."""
    from weft.run.block_strengths import BlockStrengths

    return BlockStrengths.parse(text) if text else None


def tell(parts: "Sequence[Part]", made: "Sum", way: str) -> None:
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


# ---- Into a base ----------------------------------------------------------------------------------------------------


def into_base(arguments: argparse.Namespace, weights: Sequence[float]) -> int:
    from weft.run.block_strengths import BlockStrengths
    from weft.run.merged_base import merged_files, write
    from weft.run.merging import Asked, planned

    dtype = None if arguments.dtype in (None, "as-stored") else arguments.dtype
    blocks = strengths_of(arguments.blocks) or BlockStrengths()
    asked = Asked(arguments.adapters, arguments.into, weights, blocks, arguments.expert, dtype, arguments.force)
    merge = planned(asked)
    for note in merge.notes:
        print(f"note: {note}.", file=sys.stderr)
    meter = Meter(sum(file.data_bytes for file in merged_files(merge).values()))
    written = write(merge, arguments.out, meter.add, arguments.copy, arguments.overwrite)
    meter.close()
    tell_merged(merge, written, meter.seconds)
    return 0


class Meter:
    """How far the writing is, on a terminal's last line. total: bytes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began, self.shown = total, 0, monotonic(), 0.0
        self.on_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return max(monotonic() - self.began, 1e-9)

    def add(self, count: int) -> None:
        self.done += count
        if self.on_terminal and monotonic() - self.shown > 0.2:
            self.shown = monotonic()
            pace = self.done / self.seconds / 1e6
            print(f"\r{self.done / self.total:6.1%}  {pace:.0f} MB/s ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.on_terminal:
            print("\r" + " " * 24 + "\r", end="", file=sys.stderr, flush=True)


def tell_merged(merge: "Merge", written: "Written", seconds: float) -> None:
    for network in merge.networks:
        for one in network.adapters:
            print(f"{one.strength:6g}  {one.path} (rank {one.adapter.rank}, scale {one.adapter.scale:g})")
        which = f" of expert {network.expert}" if network.expert in ("high", "low") else ""
        print(f"{network.layers} layers{which} changed")
    size, pace = written.bytes / 1e6, written.bytes / 1e6 / seconds
    said = f"{size / 1e3:.2f} GB" if size >= 1e3 else f"{size:.1f} MB"
    print(f"{said} in {seconds:.1f} s ({pace:.0f} MB/s); {written.compared} tensors read back and compared")
    if written.linked == 1:
        print("1 other file is a hard link to the base's (--copy makes a copy)")
    elif written.linked:
        print(f"{written.linked} other files are hard links to those of the base (--copy makes copies)")
    for name in written.left_out:
        print(f"left out: {name}, which holds weights without the change")
    print(written.path)


# ---- A moving average -----------------------------------------------------------------------------------------------


def post_hoc(arguments: argparse.Namespace) -> int:
    if arguments.sigma_rel is not None and arguments.decay is not None:
        raise ConfigError("--sigma-rel and --decay are two profiles of an average. Give one.")
    if arguments.decay is not None and not 0 < arguments.decay < 1:
        raise ConfigError(f"--decay: expected a number between 0 and 1, such as 0.99; got {arguments.decay:g}.")

    from weft.run.merge import write_merged
    from weft.run.post_hoc import Profile, averaged, found_snapshots, gamma_of

    if arguments.decay is not None:
        profile, told = Profile(decay=arguments.decay), {"decay": arguments.decay}
    else:
        sigma = SIGMA_REL if arguments.sigma_rel is None else arguments.sigma_rel
        profile = Profile(gamma=gamma_of(sigma))
        told = {"sigma_rel": sigma, "gamma": profile.gamma or 0.0}
    groups = found_snapshots(arguments.ema)
    made = {expert: averaged(group, profile, told) for expert, group in groups.items()}
    write_merged(arguments.out, {expert: one.adapter for expert, one in made.items()})
    for expert, one in made.items():
        if len(made) > 1:
            print(f"expert {expert}")
        tell_average(one)
    print(f"{', '.join(f'{name} {value:.4g}' for name, value in told.items())}: the average of the parameters")
    print(arguments.out)
    return 0


def tell_average(made: "Averaged") -> None:
    for snapshot, share in made.shares:
        print(f"{share:7.2%}  step {snapshot.step}  {snapshot.path}")
    if made.noted:
        print(f"note: {made.noted}.", file=sys.stderr)
