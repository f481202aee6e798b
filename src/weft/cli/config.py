"""weft config: help on every key, what a config resolves to, and the JSON schema for editors."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from weft.config.explain import explain, schema_text
from weft.config.show import show
from weft.config.source import read_source
from weft.run.config import RunConfig, parse_config


def run(argv: Sequence[str]) -> int:
    """Print one of the three."""
    # argparse wants positional arguments side by side, and none of our options takes a value.
    arguments = _parser().parse_args(sorted(argv, key=lambda argument: argument.startswith("-")))
    if arguments.action == "schema":
        print(schema_text(RunConfig), end="")
    elif arguments.action == "explain":
        print(explain(RunConfig, arguments.section))
    else:
        source = read_source(arguments.file, arguments.changes)
        print(show(parse_config(source), source if arguments.origin else None), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft config", description="Help on configs, and what one resolves to.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shows = actions.add_parser("show", help="the resolved config, with every default")
    shows.add_argument("file", type=Path, help="a run.yaml")
    shows.add_argument("changes", nargs="*", metavar="key=value", help="such as adapter.rank=32")
    shows.add_argument("--origin", action="store_true", help="say where each value comes from")
    explains = actions.add_parser("explain", help="help on a section or a key")
    explains.add_argument("section", nargs="?", default="", help="such as adapter or adapter.rank; none: all sections")
    actions.add_parser("schema", help="the JSON schema, which editors read")
    return parser
