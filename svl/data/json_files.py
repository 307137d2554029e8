"""Tables in JSON: lines, an array, or one object, whatever the file's name says."""

from __future__ import annotations

import io
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from svl.core import SvlError
from svl.core.errors import explained
from svl.data.tables import LONGEST_RECORD, Row, RowList, Table, open_bytes

LARGEST_DOCUMENT = 2**30  # bytes of a file that is one object, such as COCO's: read whole
CHUNK = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonLines(Table):
    """JSON objects, one a line; only the lines asked for are parsed."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.begins = array("q")  # of each line, in bytes, and its number
        self.lines = array("q")

    def _scan(self) -> None:
        with open_bytes(self.path) as file, explained(f"calibration file '{self.path}' cannot be read"):
            number, begin = 0, file.tell()
            while line := file.readline(LONGEST_RECORD + 1):
                number += 1
                if len(line) > LONGEST_RECORD:
                    raise SvlError(f"{self._line(number)}: it is longer than {LONGEST_RECORD:,} characters")
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
        with open_bytes(self.path) as file:
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


class JsonArray(Table):
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
        with open_bytes(self.path) as file:
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
    text, at = "", 0  # what is in memory, and how far it has been read
    expected = "["  # what comes before the next item
    while True:
        at = _after_space(text, at)
        if text[at : at + 1] == "]" and expected != "[":
            return
        begin = _after_space(text, at + 1) if text[at : at + 1] == expected else -1
        if 0 <= begin < len(text):
            if text[begin] == "]" and expected == "[":
                return
            try:
                item, end = decoder.raw_decode(text, begin)
            except json.JSONDecodeError:
                if len(text) - begin > LONGEST_RECORD:
                    raise
            else:
                if _after_space(text, end) < len(text):
                    yield item
                    at, expected = end, ","
                    continue
        elif at < len(text) and text[at] != expected:
            raise ValueError(f"'{expected}' is expected, but there is '{text[at]}'")
        more = file.read(max(CHUNK, len(text) - at))
        if not more:
            raise ValueError("the array ends early, or an item is no JSON")
        text, at = text[at:] + more, 0


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def open_json(path: Path) -> Table:
    """JSON lines, an array, or one object, whatever the file's name says."""
    with explained(f"calibration file '{path}' cannot be read"), open_bytes(path) as file:
        head = file.read(CHUNK).lstrip()
    if head[:1] == b"[":
        return JsonArray(path)
    lines = head.splitlines() or [b""]
    is_one_object = len(lines) == 1 or not (_is_json(lines[0]) or lines[1][:1] == b"{")
    if head[:1] == b"{" and is_one_object:
        is_coco = b'"images"' in head or b'"annotations"' in head
        return _open_document(path, LARGEST_DOCUMENT if is_coco else LONGEST_RECORD)
    return JsonLines(path)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _open_document(path: Path, limit: int) -> Table:
    """One JSON object: captions as COCO has them, rows under `data`, or a single row."""
    where = f"calibration file '{path}'"
    with explained(f"{where}, line 1"), open_bytes(path) as file:
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
