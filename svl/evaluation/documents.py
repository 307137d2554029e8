"""The documents of a task: which of them a limit takes, and their pictures, read as everywhere in svl."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
from PIL import Image

from svl.core import SvlError
from svl.core.errors import explained
from svl.data.hub_data import left_encoded
from svl.data.pictures import LIMIT, open_picture
from svl.data.videos import SUFFIXES as VIDEO_SUFFIXES
from svl.evaluation.settings import taken_by_limit

Document = Mapping[str, Any]


def rows_of_limit(
    documents: Sequence[Document], limit: float | None, together: Callable[[Document], Hashable] | None
) -> list[int]:
    """The rows of the documents that a limit takes; of documents that are scored `together`, all or none."""
    n = taken_by_limit(len(documents), limit)
    if together is None or n == len(documents):
        return list(range(n))
    values = [together(document) for document in documents]
    chosen = set(values[:n])
    return [row for row, value in enumerate(values) if value in chosen]


def with_pictures(data: datasets.Dataset) -> datasets.Dataset:
    """A data set whose pictures are read by `open_picture` when a row is, wherever in its columns they are.

    `datasets` leaves them encoded: it would open any format, and what is left of a cut picture.
    """
    data = copy.deepcopy(data)
    for name, feature in data.features.items():  # only what rows are read as changes: casting would write lists anew
        data.info.features[name] = left_encoded(feature)
    return data.with_transform(_read_batch)


def _read_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [read_pictures(value) for value in values] for name, values in batch.items()}


def read_pictures(value: Any) -> Any:
    """A value of a row with the pictures in it read: open ones, and structs of `bytes` and `path`.

    Raises:
        SvlError: if one cannot be read.
    """
    if isinstance(value, Image.Image):
        return open_picture(value)
    if isinstance(value, list):
        return [read_pictures(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"bytes", "path"}:
        return {name: read_pictures(item) for name, item in value.items()}
    if value["bytes"] is not None:
        return open_picture(value["bytes"])
    if value["path"] is None:
        return None
    if "://" in value["path"]:  # inside an archive or on the hub
        with explained(f"cannot read the picture '{value['path']}'"), fsspec.open(value["path"], "rb") as file:
            return open_picture(file.read(LIMIT + 1))
    return open_picture(Path(value["path"]))


def video_lookup(folder: Path, column: str) -> Callable[[Document], list[str]]:
    """A `doc_to_visual` that finds a document's video in a folder: a file, or a folder of frames.

    Args:
        folder: where videos are, at any depth.
        column: of the document that holds the video's name, with or without folders before it and an ending behind.

    Raises:
        SvlError: when a document is asked for whose video is not there, or whose name several videos have.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
            for name in {path.name, path.stem}:
                by_name[name].append(path)

    def look_up(document: Document) -> list[str]:
        name = PurePosixPath(document[column])
        found = [path for path in by_name[name.name] if path.parts[-len(name.parts) : -1] == name.parts[:-1]]
        if len(found) != 1:
            listing = ", ".join(str(path.relative_to(folder)) for path in found)
            problem = f"several files have that name: {listing}" if found else f"it is not in '{folder}'"
            raise SvlError(f"its video '{name}': {problem}")
        return [str(found[0])]

    return look_up


def image_lookup(config: Mapping[str, Any], name: str, key: str) -> Callable[[Document], list[Image.Image]]:
    """A `doc_to_visual` that finds a document's image in another configuration of its data set, by its id.

    Args:
        config: the task's settings, which say where the data of the configuration with the images are.
        name: of that configuration.
        key: column of the document that holds the image's id.
    """
    split, options = config["test_split"], dict(config.get("dataset_kwargs") or {})
    if options.pop("load_from_disk", False):
        images = datasets.load_from_disk(str(Path(config["dataset_path"], name)))[split]
    else:
        images = datasets.load_dataset(config["dataset_path"], config["dataset_name"], split=split, **options)
    rows = {identity: row for row, identity in enumerate(images["id"])}
    images = with_pictures(images)

    def look_up(document: Document) -> list[Image.Image]:
        if document[key] not in rows:
            raise SvlError(f"its image '{document[key]}' is not among those of '{name}'")
        return [images[rows[document[key]]]["image"]]

    return look_up
