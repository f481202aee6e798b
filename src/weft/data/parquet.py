"""Text data in parquet files, read row group by row group."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from weft.data.tapes import Row
from weft.errors import DataError

ROWS_AT_ONCE = 256


class Parquet:
    """A .parquet file. Places are row numbers; groups that lie before a place are not read."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._done = 0

    def count(self) -> int:
        return self._opened().metadata.num_rows

    def rows(self, at: Mapping[str, Any]) -> Iterator[Row]:
        self._done = at.get("row", 0)
        file, first = self._opened(), 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first + size > self._done:
                yield from self._group(file, group, first)
            first += size

    def here(self) -> dict[str, Any]:
        return {"row": self._done}

    def _group(self, file: "pyarrow.parquet.ParquetFile", group: int, first: int) -> Iterator[Row]:
        """The rows of a group that were not given yet. first: number of the group's first row."""
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
            skipped = min(max(self._done - first, 0), len(batch))
            for value in batch.slice(skipped).to_pylist():
                self._done += 1
                yield Row(f"{self._name}:{self._done}", f"{self._path}, row {self._done}", value)
            first += len(batch)

    def _opened(self) -> "pyarrow.parquet.ParquetFile":
        try:
            return pyarrow.parquet.ParquetFile(self._path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self._path} is no parquet file that can be read: {error}.") from error
