"""weft cache: encode every clip and caption of a run ahead of its training."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Fill the cache; what is there already is not done again."""
    parser = argparse.ArgumentParser(prog="weft cache", description="Encode clips and captions of a run once.")
    parser.add_argument("config", type=Path, help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)

    from weft.cli.train import quiet_libraries

    quiet_libraries()

    from weft.run.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from weft.run.checks import check
    from weft.run.listeners import Terminal
    from weft.run.start import fill_cache

    terminal = Terminal()
    try:
        status = fill_cache(config, check(config), terminal)
    finally:
        terminal.close()
    print(status.line())
    return 0
