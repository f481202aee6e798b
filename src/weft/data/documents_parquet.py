"""Rows of dated documents out of parquet files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from weft.data.documents_reading import Record, check_columns
from weft.errors import DataError

ROWS_AT_ONCE = 4096


def parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a .parquet, only these columns of which are read. Raises DataError."""
    try:
        file, number = pyarrow.parquet.ParquetFile(path), 0
        check_columns(path, file.schema_arrow.names, columns)
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
            for cells in batch.to_pylist():
                number += 1
                yield Record(number, cells)
    except (OSError, pyarrow.ArrowException):  # its words may be of what stands there
        raise DataError(f"{path} is no parquet file that can be read.") from None
