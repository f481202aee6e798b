"""weft compare: several runs side by side, their numbers and configs; of continual runs, experiments over seeds."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.cli.report import bytes_of, opened, write_page
from weft.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from weft.dashboard.comparison import Side
    from weft.dashboard.continual import Experiment

Rows = Sequence[tuple[str, Sequence[str]]]


def run(argv: Sequence[str]) -> int:
    """Print the tables, or write the page. Experiments of continual runs come first."""
    arguments = _parser().parse_args(argv)
    folders = list({path.resolve(): path for named in arguments.runs for path in _runs_at(named)}.values())
    if len(folders) < 2:
        raise ConfigError("weft compare: one run alone has nothing beside it. Name two or more: weft compare A B.")
    most = bytes_of(arguments.max_mb)
    sides = _sides(folders)
    from weft.dashboard.continual import experiments_of, representatives

    experiments = experiments_of(sides)
    _check_metric(arguments.metric, experiments)
    if arguments.html:
        from weft.dashboard.comparison import write_comparison

        write_page(arguments.html, write_comparison(sides, arguments.samples, most, arguments.metric))
        return 0
    if experiments:
        _print_experiments(experiments, arguments.metric)
    shown = representatives(sides, experiments)
    for title, rows, note in told(shown):
        _print(title, [side.name for side in shown], rows, note)
    return 0


def _runs_at(path: Path) -> list[Path]:
    """What an argument names: a run, every run in a folder, or all that a pattern fits, by name. What is no run is
    left for `opened` to refuse."""
    from weft.dashboard.discover import find_runs, is_run

    if not path.exists() and any(sign in str(path) for sign in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(root)) if path.is_absolute() else str(path)
        return [run for found in sorted(root.glob(pattern)) for run in _runs_at(found)] or [path]
    if not is_run(path) and path.is_dir():
        return sorted(find_runs(path).values()) or [path]
    return [path]


def _check_metric(metric: str | None, experiments: "Sequence[Experiment]") -> None:
    """Raises ConfigError for a metric that no run was scored with."""
    known = list(dict.fromkeys(name for one in experiments for run in one.runs for name in run.scored.metrics))
    if metric is not None and metric not in known:
        raise ConfigError(
            f"--metric: no run was scored by '{metric}'. {did_you_mean(metric, known)}"
            if known
            else "--metric: none of these runs was scored on tasks, so there is nothing to compare by a metric."
        )


def _print_experiments(experiments: "Sequence[Experiment]", metric: str | None) -> None:
    """Means over seeds, then the differences to the first experiment."""
    from weft.dashboard.continual import differences_between, means

    names, main = [one.name for one in experiments], experiments[0].metric(metric)
    single = all(len(one.runs) == 1 for one in experiments)
    of = "one seed each" if single else "means over seeds ± 95 % interval"
    _print("Experiments", names, means(experiments, metric), f"ACC to next task: of {main}. {of.capitalize()}.")
    if len(names) > 1:
        rows = differences_between(experiments, metric)
        _print(f"Less {names[0]}", names[1:], rows, "Paired by seed: ± 95 % interval, p of the paired t-test.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft compare", description="Set runs beside one another.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="runs/NAME", help="folders of two runs or more, folders "
                        "that hold runs, or patterns such as 'runs/er-*'; runs that differ in their seed alone are one "
                        "experiment")  # fmt: skip
    parser.add_argument("--metric", help="of continual runs: what ACC, BWT and so on are of, such as auroc")
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
