"""weft report: one run as one HTML file, to read and to send."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import ConfigError, RunError, did_you_mean

if TYPE_CHECKING:
    from weft.dashboard.store import Store


def run(argv: Sequence[str]) -> int:
    """Write the file, and say where it lies and how large it is."""
    arguments = _parser().parse_args(argv)
    most = bytes_of(arguments.max_mb)
    store, id = opened(arguments.run)
    from weft.dashboard.report import Contents, write_report

    contents = Contents(
        samples=arguments.samples, config=arguments.config, log=arguments.with_log, host=arguments.with_host,
        most=most,
    )  # fmt: skip
    write_page(arguments.out or arguments.run / "report.html", write_report(store, id, contents))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weft report", description="Write one HTML file about a run, to share.")
    parser.add_argument("run", type=Path, metavar="runs/NAME", help="a run's folder; the run may be going on")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="where to write it (runs/NAME/report.html)")
    parser.add_argument("--no-samples", dest="samples", action="store_false", help="without videos, images and replies")
    parser.add_argument("--no-config", dest="config", action="store_false", help="without the config, which has paths")
    parser.add_argument("--max-mb", type=float, default=50.0, help="size up to which samples are taken (%(default)g)")
    parser.add_argument("--with-host", action="store_true", help="with the name of the machine")
    parser.add_argument("--with-log", action="store_true", help="with the last lines of the log of a run that crashed")
    return parser


def bytes_of(megabytes: float) -> int:
    """The most that a page may take. Raises ConfigError where that is nothing."""
    if not 0 < megabytes < 1e6:
        raise ConfigError(f"--max-mb: {megabytes:g} is no size of a page in megabytes. The default is 50.")
    return int(megabytes * 1e6)


def opened(folder: Path) -> "tuple[Store, str]":
    """A run's folder as the store of one run. Raises RunError where there is no run, with the nearest."""
    from weft.dashboard.discover import is_run
    from weft.dashboard.store import Store

    if not is_run(folder):
        raise RunError(f"{folder}: there is no run here. {_nearest(folder)}")
    store = Store(folder)
    return store, store.ids()[0]


def _nearest(folder: Path) -> str:
    from weft.dashboard.discover import find_runs

    if folder.is_dir():
        inside = list(find_runs(folder))
        return f"Runs within it: {', '.join(inside[:5])}." if inside else "It holds no events and no resolved config."
    if not folder.parent.is_dir():
        return f"There is no folder '{folder.parent}'."
    there = sorted(find_runs(folder.parent))
    return did_you_mean(folder.name, there) if there else f"There are no runs in '{folder.parent}'."


def write_page(path: Path, text: str) -> None:
    """Replace a file by a page at one stroke. Raises RunError where nothing can be written."""
    from weft.dashboard.report_parts import size
    from weft.durable import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Choose another place with --out.") from None
    print(f"{path} ({size(path.stat().st_size)})")
