"""Text data as rows, one after the other, with a place from which reading goes on: JSON files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weft.data.manifest import Findings, json_rows
from weft.errors import DataError

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row. key: FILE:LINE, its name in events. place: where a user would look for it. problem: why it holds
    nothing."""

    key: str
    place: str
    value: Any = None
    problem: str = ""


class Tape(Protocol):
    """A file, or a part of a dataset, that is read from front to back."""

    def count(self) -> int | None:
        """Rows that it holds, where that can be told without reading them."""
        ...

    def rows(self, at: Mapping[str, Any]) -> Iterator[Row]:
        """The rows from a place on; {} is the beginning. Raises DataError for a file that cannot be read at all."""
        ...

    def here(self) -> dict[str, Any]:
        """The place behind the row that was given last, as plain data."""
        ...


class JsonLines:
    """A .jsonl file: one object on each line. Places are byte offsets, so that going on costs nothing."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._offset = self._line = 0

    def count(self) -> int:
        with opened(self._path) as file:
            return sum(1 for line in file if line.strip())

    def rows(self, at: Mapping[str, Any]) -> Iterator[Row]:
        self._offset, self._line = at.get("offset", 0), at.get("line", 0)
        with opened(self._path) as file:
            file.seek(self._offset)
            for line in file:
                first = self._line == 0
                self._offset, self._line = self._offset + len(line), self._line + 1
                content = line.removeprefix(BOM) if first else line
                if content.strip():
                    yield self._row(content)

    def here(self) -> dict[str, Any]:
        return {"offset": self._offset, "line": self._line}

    def _row(self, content: bytes) -> Row:
        key, place = f"{self._name}:{self._line}", f"{self._path}, line {self._line}"
        try:
            return Row(key, place, json.loads(content))
        except UnicodeDecodeError as error:
            return Row(key, place, problem=f"not UTF-8 at byte {error.start} of the line. Save the file as UTF-8.")
        except json.JSONDecodeError as error:
            told = f"not JSON, {error.msg.lower()} at column {error.colno}. Expected one object per line."
            return Row(key, place, problem=told)


class JsonList:
    """A .json file that holds a list of objects. Places are numbers of members."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._read: list[Row] | None = None
        self._done = 0

    def count(self) -> int:
        return len(self._rows())

    def rows(self, at: Mapping[str, Any]) -> Iterator[Row]:
        self._done = at.get("row", 0)
        for row in self._rows()[self._done :]:
            self._done += 1
            yield row

    def here(self) -> dict[str, Any]:
        return {"row": self._done}

    def _rows(self) -> list[Row]:
        if self._read is None:
            found = Findings(self._path, self._path.parent)
            self._read = [Row(f"{self._name}:{line}", found.place(line), value) for line, value in json_rows(found)]
            self._read += [Row(self._name, "", problem=problem) for problem in found.problems]
        return self._read


def opened(path: Path) -> Any:
    """A file for reading bytes. Raises DataError when it is not there."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Was it moved?") from error
