"""weft convert: one safetensors file from a checkpoint of many processes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from weft.errors import ConfigError


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="weft convert",
        description="Turn a checkpoint of many processes into one safetensors file: the adapters of one of Weft's, the "
        "weights of one that DeepSpeed wrote under ZeRO, or all tensors of a folder of torch's DCP.",
    )
    parser.add_argument("checkpoint", type=Path, help="the checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as weights.safetensors")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of all floating tensors")
    parser.add_argument("--under", metavar="PREFIX", help="only tensors whose names begin so, without it, as in model.")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read DCP's .metadata, which can run code, of a writer you trust"
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Convert, and say what is in the file."""
    arguments = arguments_of(argv)
    out: Path = arguments.out
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out: '{out}' should end in .safetensors.")
    if out.exists():
        raise ConfigError(f"--out: {out} is there already. Choose another name, or delete it.")

    from weft.run.consolidate import DTYPES, consolidate, heads, open_source, under

    source = open_source(arguments.checkpoint, arguments.allow_pickle)
    if arguments.under:
        source = under(source, arguments.under)
    size = consolidate(source, out, DTYPES[arguments.dtype])
    print(f"{len(source.shapes)} tensors, {size / 1e6:,.1f} MB, {arguments.dtype}: {out}")
    if source.left_out:
        print(f"left out, for they are no tensors: {len(source.left_out)}, such as {source.left_out[0]}")
    if len(heads(source)) > 1 and not arguments.under:
        print(f"names begin with: {', '.join(heads(source)[:6])}; --under takes those of one beginning alone")
    return 0
