"""weft compare: the last numbers of several runs and what their configs differ in, side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.cli.report import bytes_of, opened, write_page
from weft.errors import ConfigError

if TYPE_CHECKING:
    from weft.dashboard.comparison import Side

Rows = Sequence[tuple[str, Sequence[str]]]


def run(argv: Sequence[str]) -> int:
    """Print the tables, or write the page. Tests between runs are further tables, told after these two."""
    arguments = _parser().parse_args(argv)
    folders = list({path.resolve(): path for path in arguments.runs}.values())
    if len(folders) < 2:
        raise ConfigError("weft compare: one run alone has nothing beside it. Name two or more: weft compare A B.")
    most = bytes_of(arguments.max_mb)
    sides = _sides(folders)
    if arguments.html:
        from weft.dashboard.comparison import write_comparison

        write_page(arguments.html, write_comparison(sides, arguments.samples, most))
        return 0
    for title, rows, note in told(sides):
        _print(title, [side.name for side in sides], rows, note)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft compare", description="Set runs beside one another.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="runs/NAME", help="folders of two runs or more")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page with curves and samples instead")
    parser.add_argument("--no-samples", dest="samples", action="store_false", help="with --html: without samples")
    parser.add_argument("--max-mb", type=float, default=50.0, help="with --html: size up to which samples are taken")
    return parser


def _sides(folders: Sequence[Path]) -> "list[Side]":
    """The runs under their names; where two have the same, under their folders."""
    from weft.dashboard.comparison import Side

    sides = []
    for folder in folders:
        store, id = opened(folder)
        sides.append(Side(store, store.run(id), store.config(id)["resolved"]))
    names = [side.name for side in sides]
    if len(set(names)) < len(names):
        sides = [
            Side(side.store, {**side.run, "name": str(folder)}, side.resolved)
            for side, folder in zip(sides, folders, strict=True)
        ]
    return sides


def told(sides: "Sequence[Side]") -> list[tuple[str, Rows, str]]:
    """(title, rows, closing words) of each table, in order."""
    from weft.dashboard.comparison import differences, last_numbers

    differing, same = differences(sides)
    keys = f"{same} keys are the same in all."
    return [("Last numbers", last_numbers(sides), ""), ("Config", differing, keys)]


def _print(title: str, names: Sequence[str], rows: Rows, note: str) -> None:
    """A table for the width of the terminal; elsewhere plain columns that no line breaks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name in (title, *names):
        table.add_column(Text(name), no_wrap=not terminal, overflow="fold")
    for what, values in rows:
        table.add_row(*(Text(cell) for cell in (what, *values)))
    console = Console(width=None if terminal else 100_000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
    print(f"{note}\n" if note else "")
