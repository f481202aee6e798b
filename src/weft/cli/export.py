"""weft export: an adapter in another program's format, read back by that program's rules before it gets its name."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.run.exporting import Origin, Result
    from weft.run.verifying import Verified

FORMATS = "peft, diffusers, comfyui, musubi, videox-fun or original"
SHOWN = 5  # layers that differ most
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft export",
        description="Write an adapter in another program's format. The file is read back by that program's own rules, "
        "and kept only when every layer changes as in the source.",
    )
    parser.add_argument("source", type=Path, help="an adapter of any format, or the folder of a run")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=FORMATS)
    parser.add_argument("--out", type=Path, help="a .safetensors file, or a folder; default: beside the source")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as it is stored")
    add_options(parser)
    return parser.parse_args(argv)


def add_options(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """What export and convert --to have alike, besides --out and --dtype."""
    parser.add_argument(
        "--expert", choices=("high", "low"), help="of a run or file for both; or what a file does not say"
    )
    parser.add_argument("--step", type=int, help="of a run: the adapter of this step, not the finished one")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--metadata",
        choices=("full", "short", "none"),
        default="full",
        help="full: all provenance; short: without the config, its paths and prompts; none: what the format needs",
    )


def run(argv: Sequence[str]) -> int:
    """Export, and say what was written and how to load it. 1 where the check failed."""
    return export_all(arguments_of(argv))


def export_all(arguments: argparse.Namespace) -> int:
    from weft.run.exporting import Order, export, origins, targets

    order = Order(
        to=arguments.to, out=arguments.out, dtype=arguments.dtype, metadata=arguments.metadata,
        overwrite=arguments.overwrite,
    )  # fmt: skip
    found = origins(arguments.source, arguments.expert, arguments.step)
    places = targets(found, order)
    results = export(found, places, order)
    for origin, target, result in zip(found, places, results, strict=True):
        tell(origin, target, order.to, result)
    return 1 if any(result.path is None for result in results) else 0


def tell(origin: "Origin", target: Path, to: str, result: "Result") -> None:
    adapter, verified = result.adapter, result.verified
    if result.path is None and verified.is_equal:
        print(f"{target}: not written, though right, since the other expert's is not.")
        return
    if result.path is None:
        print(f"{target}: not written. As {to} reads it, it is not what {origin.path} is:")
        tell_differences(verified)
        return
    from weft.run.load_lines import load_line

    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors.values()}
    precision = ", ".join(sorted(SHORT.get(kind, kind) for kind in kinds))
    apart = f"{verified.largest:.1e} from the source at most" if verified.largest else "exactly what the source does"
    print(f"{'file':<9} {result.path} ({size_of(result.size)}, {precision})")
    expert = f", expert {origin.expert}" if origin.expert != "default" else ""
    print(f"{'holds':<9} {len(verified.differences)} layers in {result.keys} keys, {scale_of(origin)}{expert}")
    print(f"{'check':<9} read back as {to} does: {apart}")
    if result.rounding is not None and result.rounding.largest > 0:
        path, loss = max(result.rounding.differences.items(), key=lambda each: each[1])
        print(f"{'rounding':<9} to {precision}: {loss:.1e} of the change at most, in {path}")
    print(f"{'load':<9} {load_line(to, result.path, adapter, origin.expert)}")
    if steps := adapter.step_list:
        print(f"{'sample':<9} {steps}, guidance 1")
    for note in result.notes:
        print(f"{'note':<9} {note}")


def size_of(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def scale_of(origin: "Origin") -> str:
    adapter = origin.adapter
    kind = "dora" if adapter.dora else adapter.kind
    if not adapter.rank:
        return kind
    root = "sqrt(rank)" if adapter.rslora else "rank"
    return f"{kind} of rank {adapter.rank}, scale {adapter.scale:g} (alpha {adapter.alpha:g} / {root})"


def tell_differences(verified: "Verified") -> None:
    """What is wrong, worst first."""
    for fault in verified.faults[:SHOWN]:
        print(f"  {fault}")
    for what, names in (("not known there", verified.ignored), ("changed in one alone", verified.alone)):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        if names:
            print(f"  {what}: {names[0]}{more}")
    for path, apart in verified.worst(SHOWN):
        print(f"  {apart:.2e}  {path}")
