"""weft import: another trainer's config as a run.yaml, and a list of what became of each of its settings."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from weft.errors import ConfigError


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    from weft.importers.detect import IMPORTERS

    parser = argparse.ArgumentParser(
        prog="weft import",
        description="Turn another trainer's config files, launch scripts or command lines into a run.yaml. They are "
        "read and never run. What became of each setting is told here and at the end of the file.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="config, launch script, dataset file")
    parser.add_argument(
        "--from", dest="program", metavar="PROGRAM", help=f"whose they are: {', '.join(IMPORTERS)}; default: told apart"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="such as run.yaml; default: written to stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out names")
    parser.add_argument("--model", metavar="SOURCE", help="folder or file of the base model, in place of theirs")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Write the run.yaml, and say what it holds and lacks."""
    arguments = arguments_of(argv)
    out: Path | None = arguments.out
    if out and out.is_dir():
        raise ConfigError(f"--out: {out} is a folder. Name a file, such as {out / 'run.yaml'}.")
    if out and out.exists() and not arguments.overwrite:
        raise ConfigError(f"--out: {out} is there already. Choose another name, or write --overwrite.")

    from weft.durable import write_whole
    from weft.importers.detect import importer, recognised
    from weft.importers.draft import Draft
    from weft.importers.reading import read
    from weft.importers.writing import MARK, story, written

    read_files = [read(path) for path in arguments.files]
    found = importer(arguments.program or recognised(read_files))
    draft = Draft(found.name, arguments.model)
    found.read(read_files, draft)
    schema = (Path(str(files("weft"))) / "weft.schema.json").as_uri()
    text = written(draft, schema)
    if out:
        try:
            write_whole(out, text)
        except OSError as error:
            raise ConfigError(f"--out: {out} cannot be written: {error.strerror}.") from None
    else:
        print(text, end="")
    _complain(f"{', '.join(str(path) for path in arguments.files)}: {found.name}")
    for line in story(draft):
        _complain(line)
    if out:
        gaps = text.count(f"# {MARK}")
        fill = f"fill in {gaps} value{'s' if gaps > 1 else ''} marked with <--, then: " if gaps else ""
        _complain(f"\nwrote {out}. Next: {fill}weft plan {shlex.quote(str(out))}")
    return 0


def _complain(line: str) -> None:
    print(line, file=sys.stderr)
