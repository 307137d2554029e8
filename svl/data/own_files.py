"""One's own files and folders as tables."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from svl.core import SvlError
from svl.data import pictures
from svl.data.data_folder import PICTURE_ROWS, check_no_archives
from svl.data.json_files import open_json
from svl.data.tables import CsvTable, JoinedTables, ParquetTable, Row, RowList, Table

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")  # the latter three also with .gz behind
# pictures that are not read: they are named, not passed over
FOREIGN_PICTURES = (
    *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".svg", ".svgz", ".psd", ".eps", ".ai", ".ico"),
    *(".tga", ".pcx", ".exr", ".hdr", ".dds", ".xcf", ".sgi", ".wmf", ".emf", ".dng", ".nef", ".cr2", ".cr3", ".arw"),
    *(".orf", ".rw2", ".raf"),
)
QUESTIONS = {"prompt", "question", "caption", "text", "messages", "conversations", "texts"}  # columns that ask or tell


def open_table(path: Path) -> Table:
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
        return ParquetTable(path)
    return CsvTable(path) if suffix == ".csv" else open_json(path)


def _open_folder(folder: Path) -> Table:
    inside = sorted(p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir())
    files = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    if described := _described_pictures(folder, files):
        return described
    _check_foreign(folder, files)
    check_no_archives(files, folder, "calibration.path")
    if found := [file for file in files if file.suffix.lower() in pictures.SUFFIXES]:
        return RowList(folder, [{"image": str(file), "caption": None} for file in found])
    for suffix in SUFFIXES:
        if shards := [folder / file for file in files if _suffix(file) == suffix]:
            return JoinedTables(folder, [open_table(file) for file in shards])
    raise SvlError(f"calibration.path: there is no image and no metadata.jsonl in the folder '{folder}'")


def _check_foreign(folder: Path, files: Collection[Path]) -> None:
    if foreign := [str(file) for file in files if file.suffix.lower() in FOREIGN_PICTURES]:
        raise SvlError(
            f"calibration.path: {len(foreign)} pictures in '{folder}' are in a format that is not read, "
            f"'{foreign[0]}' for one; convert them to PNG or JPEG, or move them away"
        )


def _described_pictures(folder: Path, files: Collection[Path]) -> Table | None:
    """The rows of metadata files, as `datasets`' imagefolder has them: in the folder itself, or in some below."""
    for name in PICTURE_ROWS:
        found = [file for file in files if file.name == name]
        if top := [file for file in found if len(file.parts) == 1]:
            found = top
        if found:
            parts = [PicturesTable(open_table(folder / file), file.parent) for file in found]
            return parts[0] if len(parts) == 1 else JoinedTables(folder, parts)
    return None


def _suffix(path: Path) -> str:
    """The kind of a file, however it is compressed."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix.lower()


class PicturesTable(Table):
    """Rows of a metadata file; columns such as `file_name`, `image_file_name` or `file_names` become pictures.

    `inside` is its folder, relative to the one that pictures are looked for in.
    """

    def __init__(self, table: Table, inside: Path):
        super().__init__(table.path)
        self.table, self.inside = table, inside

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        return map(self._with_pictures, self.table.rows(numbers))

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
