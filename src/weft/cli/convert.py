"""weft convert: an adapter in another format, or one safetensors file from a checkpoint of many processes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from weft.cli.export import FORMATS, add_options, export_all
from weft.errors import ConfigError

OF_ADAPTERS = ("expert", "step", "overwrite")  # options that checkpoints have not
OF_CHECKPOINTS = ("under", "allow_pickle")


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft convert",
        description="With --to, turn an adapter, also another trainer's, into another format, and check the file as "
        "weft export does. Without, turn a checkpoint of many processes into one safetensors file: the adapters of one "
        "of Weft's, the weights of one that DeepSpeed wrote under ZeRO, or all tensors of a folder of torch's DCP.",
    )
    parser.add_argument("source", type=Path, help="an adapter or a run's folder; or a checkpoint's folder")
    parser.add_argument("--to", metavar="FORMAT", help=FORMATS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="such as weights.safetensors; of adapters optional")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: adapters as stored, checkpoints in bf16"
    )
    checkpoints = parser.add_argument_group("for checkpoints")
    checkpoints.add_argument(
        "--under", metavar="PREFIX", help="only tensors whose names begin so, without it, as in model."
    )
    checkpoints.add_argument(
        "--allow-pickle", action="store_true", help="read DCP's .metadata, which can run code, of a writer you trust"
    )
    add_options(parser.add_argument_group("for adapters"))
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Convert, and say what is in the file."""
    arguments = arguments_of(argv)
    strange = OF_CHECKPOINTS if arguments.to else OF_ADAPTERS
    if given := [name for name in strange if getattr(arguments, name)]:
        what = "checkpoints alone: leave it out, or --to" if arguments.to else "adapters alone, which need --to FORMAT"
        raise ConfigError(f"--{given[0].replace('_', '-')}: this is for {what}.")
    if arguments.to:
        return export_all(arguments)
    return consolidated(arguments)


def consolidated(arguments: argparse.Namespace) -> int:
    """One file from a checkpoint."""
    out: Path | None = arguments.out
    if out is None:
        raise ConfigError("--out: name the file, such as weights.safetensors; or, for an adapter, its format by --to.")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: '{out}' should end in .safetensors.")
    if out.exists():
        raise ConfigError(f"--out: {out} is there already. Choose another name, or delete it.")

    from weft.run.consolidate import DTYPES, consolidate, heads, open_source, under

    precision = arguments.dtype or "bf16"
    source = open_source(arguments.source, arguments.allow_pickle)
    if arguments.under:
        source = under(source, arguments.under)
    size = consolidate(source, out, DTYPES[precision])
    print(f"{len(source.shapes)} tensors, {size / 1e6:,.1f} MB, {precision}: {out}")
    if source.left_out:
        print(f"left out, for they are no tensors: {len(source.left_out)}, such as {source.left_out[0]}")
    if len(heads(source)) > 1 and not arguments.under:
        print(f"names begin with: {', '.join(heads(source)[:6])}; --under takes those of one beginning alone")
    return 0
