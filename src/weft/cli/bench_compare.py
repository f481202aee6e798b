"""weft bench compare: the ratios of two files of figures, and whether the second is slower than it may be."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def compare(argv: Sequence[str]) -> int:
    """Print a table; 1 when a case takes longer than --fail-above allows."""
    parser = argparse.ArgumentParser(prog="weft bench compare", description="Compare two files of weft bench --json.")
    parser.add_argument("first", type=Path, help="figures to compare with")
    parser.add_argument("second", type=Path, help="figures that are judged")
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="exit code 1 for a case above this")
    parser.add_argument("--force", action="store_true", help="compare cases or hardware that differ")
    arguments = parser.parse_args(argv)

    from weft.run.bench_compare import compared, read_figures

    lines = compared(read_figures(arguments.first), read_figures(arguments.second), arguments.force)
    wide = max((len(line.name) for line in lines), default=4)
    print(f"{'case':<{wide}}  {'first':>10}  {'second':>10}  {'time':>6}  {'memory':>6}")
    for line in lines:
        memory = "" if line.memory is None else f"x{line.memory:.3f}"
        times = f"{1000 * line.first:8.1f}ms  {1000 * line.second:8.1f}ms"
        print(f"{line.name:<{wide}}  {times}  x{line.time:.3f}  {memory:>6}")
    limit = arguments.fail_above
    slow = [line for line in lines if limit is not None and line.time > limit]
    if slow:
        print(f"{len(slow)} of {len(lines)} cases took more than {limit:g} times as long, first '{slow[0].name}'")
    return 1 if slow else 0
