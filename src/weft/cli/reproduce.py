"""weft reproduce: the run.yaml that an adapter was trained with."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from weft.errors import ConfigError


def run(argv: Sequence[str]) -> int:
    """Print the config, and warn of what is no longer as it was."""
    parser = argparse.ArgumentParser(
        prog="weft reproduce",
        description="Write the run.yaml that an adapter was trained with, from its header; of a file of another "
        "trainer one to begin from. Warns where data or base are not what they were.",
    )
    parser.add_argument("adapter", type=Path, help="an adapter in any format, or a run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here and not to the screen")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it is there")
    parser.add_argument("--full", action="store_true", help="every key, also those that are as by default")
    parser.add_argument("--no-check", action="store_true", help="do not look at data and base as they are now")
    arguments = parser.parse_args(argv)

    from weft.durable import write_whole
    from weft.formats.describe import describe
    from weft.run.foreign_header import begun
    from weft.run.origins import origin_of
    from weft.run.reproducing import refuse_overwriting, refuse_untrained, reproduced, warnings_of

    if arguments.out:
        refuse_overwriting(arguments.out, arguments.overwrite)
    origin = origin_of(arguments.adapter)
    refuse_untrained(origin)
    text = reproduced(origin, arguments.full) if origin.config else begun(describe(arguments.adapter))
    if arguments.out:
        try:
            write_whole(arguments.out, text)
        except OSError as error:
            raise ConfigError(f"--out: {arguments.out} cannot be written: {error.strerror}.") from None
    else:
        print(text, end="")
    warnings = [] if arguments.no_check else list(warnings_of(origin))
    for sentence in [*origin.problems, *warnings]:
        print(f"note: {sentence}", file=sys.stderr)
    return 0
