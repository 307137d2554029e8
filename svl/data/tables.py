"""Tables, of which only the rows asked for are read: what every table does, parquet, CSV, several as one."""

from __future__ import annotations

import csv
import gzip
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from svl.core.errors import explained

LONGEST_RECORD = 2**26  # characters of one row as text: far more than a prompt, far less than memory
PATHS = ("image", "images", "video", "file_name")  # columns in which an empty cell is none
BOM = b"\xef\xbb\xbf"

Row = dict[str, Any]


def open_bytes(path: Path) -> IO[bytes]:
    """A file to read from its first byte after a byte order mark, uncompressed if its name ends in .gz."""
    file = cast(IO[bytes], gzip.GzipFile(path)) if path.suffix == ".gz" else path.open("rb")
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    return file


class Table(ABC):
    """The rows of a file or folder."""

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """The rows of these numbers (from 0, ascending), in order; the others are skipped.

        Raises:
            SvlError: if one cannot be read.
        """


class RowList(Table):
    """Rows in memory."""

    def __init__(self, path: Path, found: Sequence[Row]):
        super().__init__(path)
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        return (self.found[i] for i in numbers)


class ParquetTable(Table):
    """A parquet file, read by row groups."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        super().__init__(path)
        with self._explained():
            self.file = pyarrow.parquet.ParquetFile(path)

    def _explained(self) -> Any:
        return explained(f"calibration file '{self.path}' is no readable parquet file")

    def __len__(self) -> int:
        return int(self.file.metadata.num_rows)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        waiting = list(reversed(numbers))
        begin = 0
        for group in range(self.file.num_row_groups):
            end = begin + self.file.metadata.row_group(group).num_rows
            if waiting and waiting[-1] < end:
                yield from self._of_group(group, begin, waiting)
            begin = end

    def _of_group(self, group: int, begin: int, waiting: list[int]) -> Iterator[Row]:
        """Rows of one group, taken from the end of `waiting`, a few in memory at a time."""
        with self._explained():
            batches = self.file.iter_batches(batch_size=64, row_groups=[group])
        while True:
            with self._explained():
                batch = next(batches, None)
            if batch is None:
                return
            while waiting and waiting[-1] < begin + batch.num_rows:
                yield batch.slice(waiting.pop() - begin, 1).to_pylist()[0]
            begin += batch.num_rows


class CsvTable(Table):
    """A CSV file with a head."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._rows())
        return self._count

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        wanted = set(numbers)
        return (row for i, row in enumerate(self._rows()) if i in wanted)

    def _rows(self) -> Iterator[Row]:
        csv.field_size_limit(LONGEST_RECORD)  # a picture in base64 is longer than usual cells
        with explained(f"calibration file '{self.path}' cannot be read as CSV"), open_bytes(self.path) as file:
            for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
                yield {column: value for column, value in row.items() if not (column in PATHS and value == "")}


class JoinedTables(Table):
    """Several files as one."""

    def __init__(self, path: Path, parts: Sequence[Table]):
        super().__init__(path)
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        begin = 0
        for part in self.parts:
            inside = [i - begin for i in numbers if begin <= i < begin + len(part)]
            if inside:
                yield from part.rows(inside)
            begin += len(part)
