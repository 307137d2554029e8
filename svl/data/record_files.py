"""Rows of files, of which only those that are asked for are read: parquet, JSON (lines, arrays, COCO), CSV, folders."""

from __future__ import annotations

import csv
import gzip
import io
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from svl.core import SvlError
from svl.core.errors import explained
from svl.data import pictures

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")  # the latter three also with .gz behind
# pictures that are not read: they are named, not passed over
FOREIGN_PICTURES = (".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd", ".eps", ".ico", ".tga", ".dng", ".nef", ".cr2")
PICTURE_ROWS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # beside pictures: columns of each
LONGEST_LINE = 2**26  # characters of one JSON record: far more than a prompt, far less than memory
LARGEST_DOCUMENT = 2**30  # bytes of a JSON file that is one object, such as COCO's: read whole
QUESTIONS = {"prompt", "question", "caption", "text", "messages", "conversations", "texts"}  # columns that ask or tell
CHUNK = 2**20
PATHS = ("image", "images", "video", "file_name")  # columns in which an empty cell is none
BOM = b"\xef\xbb\xbf"

Row = dict[str, Any]


class Records(ABC):
    """The rows of a file or folder."""

    def __init__(self, path: Path):
        self.path = path

    def name(self, number: int) -> str:
        """What messages call row `number`."""
        return f"row {number} of '{self.path}'"

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """The rows of these numbers (from 0, ascending), in order; the others are skipped.

        Raises:
            SvlError: if one cannot be read.
        """


def open_records(path: Path) -> Records:
    """The rows of a file, or of all files of a folder.

    A folder has pictures with a metadata file that says more of each (`file_name`, and other columns), pictures alone,
    or files with rows.

    Raises:
        SvlError: if there is no such file, or it is of another kind.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise SvlError(f"calibration.path: there is no file '{path}'")
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise SvlError(f"calibration.path: '{path.name}' is not one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return ParquetRecords(path)
    return CsvRecords(path) if suffix == ".csv" else _open_json(path)


def _suffix(path: Path) -> str:
    """The kind of a file, however it is compressed."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix.lower()


def _open(path: Path) -> IO[bytes]:
    """A file to read from its first byte after a byte order mark, uncompressed."""
    file = cast(IO[bytes], gzip.GzipFile(path)) if path.suffix == ".gz" else path.open("rb")
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    return file


class RowList(Records):
    """Rows in memory."""

    def __init__(self, path: Path, found: Sequence[Row]):
        super().__init__(path)
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        return (self.found[i] for i in numbers)


class ParquetRecords(Records):
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


class JsonLines(Records):
    """JSON objects, one a line; only the lines asked for are parsed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.begins = array("q")  # of each line, in bytes, and its number
        self.lines = array("q")

    def _scan(self) -> None:
        with _open(self.path) as file, explained(f"calibration file '{self.path}' cannot be read"):
            number, begin = 0, file.tell()
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise SvlError(f"{self._line(number)}: it is longer than {LONGEST_LINE:,} characters")
                if line.strip():
                    self.begins.append(begin)
                    self.lines.append(number)
                begin += len(line)

    def _line(self, number: int) -> str:
        return f"calibration file '{self.path}', line {number}"

    def __len__(self) -> int:
        if not self.begins:
            self._scan()
        return len(self.begins)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        len(self)
        with _open(self.path) as file:
            for i in numbers:
                file.seek(self.begins[i])
                where = self._line(self.lines[i])
                with explained(f"{where} cannot be read as UTF-8 text"):
                    text = file.readline().decode()
                with explained(where):
                    row = json.loads(text)
                yield _checked(row, where)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise SvlError(f"{where}: not an object with image and prompt")
    return row


class JsonArray(Records):
    """A JSON array of objects, of which one is in memory at a time."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._items())
        return self._count

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        wanted = set(numbers)
        for i, item in enumerate(self._items()):
            if i in wanted:
                yield _checked(item, f"calibration file '{self.path}', item {i}")
            if i == numbers[-1]:
                return

    def _items(self) -> Iterator[Any]:
        with _open(self.path) as file:
            items = _array_items(io.TextIOWrapper(file, encoding="utf-8"))
            number = 0
            while True:
                with explained(f"calibration file '{self.path}', item {number}"):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
                number += 1


def _array_items(file: IO[str]) -> Iterator[Any]:
    """The items of a JSON array, parsed as the text comes in.

    Raises:
        ValueError: if it is no array, or ends early.
    """
    decoder = json.JSONDecoder()
    text, begun = "", False
    while True:
        text = text.lstrip()
        head = text[:1]
        if not head:
            pass
        elif not begun or head == ",":
            if not begun and head != "[":
                raise ValueError("it is no JSON array")
            begun, text = True, text[1:]
            continue
        elif head == "]":
            return
        else:
            try:
                item, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                if len(text) > LONGEST_LINE:
                    raise
            else:
                if text[end:].lstrip()[:1] in (",", "]"):
                    yield item
                    text = text[end:]
                    continue
        more = file.read(max(CHUNK, len(text)))
        if not more:
            raise ValueError("the array ends early, or an item is no JSON")
        text += more


def _open_json(path: Path) -> Records:
    """JSON lines, an array, or one object, whatever the file's name says."""
    with explained(f"calibration file '{path}' cannot be read"), _open(path) as file:
        head = file.read(CHUNK).lstrip()
    if head[:1] == b"[":
        return JsonArray(path)
    lines = head.splitlines() or [b""]
    is_one_object = len(lines) == 1 or not (_is_json(lines[0]) or lines[1][:1] == b"{")
    if head[:1] == b"{" and is_one_object:
        is_coco = b'"images"' in head or b'"annotations"' in head
        return _open_document(path, LARGEST_DOCUMENT if is_coco else LONGEST_LINE)
    return JsonLines(path)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _open_document(path: Path, limit: int) -> Records:
    """One JSON object: captions as COCO has them, rows under `data`, or a single row."""
    where = f"calibration file '{path}'"
    with explained(f"{where}, line 1"), _open(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise SvlError(f"{where}, line 1: it is longer than {limit:,} characters")
        found = json.loads(content)
    if "annotations" in found and "images" in found:
        with explained(f"{where} is not as COCO's captions are"):
            files = {image["id"]: image["file_name"] for image in found["images"]}
            captions = ((files[told["image_id"]], told["caption"]) for told in found["annotations"])
            return RowList(path, [{"image": file, "caption": caption} for file, caption in captions])
    rows = found["data"] if isinstance(found.get("data"), list) else [found]
    return RowList(path, [_checked(row, f"{where}, item {i}") for i, row in enumerate(rows)])


class CsvRecords(Records):
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
        csv.field_size_limit(LONGEST_LINE)  # a picture in base64 is longer than usual cells
        with explained(f"calibration file '{self.path}' cannot be read as CSV"), _open(self.path) as file:
            for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
                yield {column: value for column, value in row.items() if not (column in PATHS and value == "")}


class Shards(Records):
    """Several files as one."""

    def __init__(self, path: Path, parts: Sequence[Records]):
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


def _open_folder(folder: Path) -> Records:
    inside = sorted(p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir())
    files = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    if described := _described_pictures(folder, files):
        return described
    _check_foreign(folder, files)
    if found := [file for file in files if file.suffix.lower() in pictures.SUFFIXES]:
        return RowList(folder, [{"image": str(file), "caption": None} for file in found])
    for suffix in SUFFIXES:
        if shards := [folder / file for file in files if _suffix(file) == suffix]:
            return Shards(folder, [open_records(file) for file in shards])
    raise SvlError(f"calibration.path: there is no image and no metadata.jsonl in the folder '{folder}'")


def _check_foreign(folder: Path, files: Collection[Path]) -> None:
    if foreign := [str(file) for file in files if file.suffix.lower() in FOREIGN_PICTURES]:
        raise SvlError(
            f"calibration.path: {len(foreign)} pictures in '{folder}' are in a format that is not read, "
            f"'{foreign[0]}' for one; convert them to PNG or JPEG, or move them away"
        )


def _described_pictures(folder: Path, files: Collection[Path]) -> Records | None:
    """The rows of metadata files, as `datasets`' imagefolder has them: in the folder itself, or in some below."""
    for name in PICTURE_ROWS:
        found = [file for file in files if file.name == name]
        if top := [file for file in found if len(file.parts) == 1]:
            found = top
        if found:
            parts = [PicturesRecords(open_records(folder / file), file.parent) for file in found]
            return parts[0] if len(parts) == 1 else Shards(folder, parts)
    return None


class PicturesRecords(Records):
    """Rows of a metadata file; columns such as `file_name`, `image_file_name` or `file_names` become pictures.

    `inside` is its folder, relative to the one that pictures are looked for in.
    """

    def __init__(self, records: Records, inside: Path):
        super().__init__(records.path)
        self.records, self.inside = records, inside

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        return map(self._with_pictures, self.records.rows(numbers))

    def _with_pictures(self, row: Row) -> Row:
        found: Row = {"image": None}
        for column, value in row.items():
            if column.endswith("file_name"):
                found[column.removesuffix("file_name").rstrip("_") or "image"] = self._path(value)
            elif column.endswith("file_names"):
                paths = [self._path(name) for name in value or ()]
                found[column.removesuffix("file_names").rstrip("_") or "images"] = paths
            else:
                found[column] = value
        return found if QUESTIONS & set(found) else {**found, "caption": None}

    def _path(self, name: Any) -> str | None:
        return None if name is None else str(self.inside / str(name))
