"""Whether pictures that were trained on are those of benchmarks, pixel by pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from PIL import Image

from svl.data.samples import Samples
from svl.evaluation import benchmarks
from svl.evaluation.lmms_tasks import load_task
from svl.evaluation.settings import TaskOptions


def picture_overlap(samples: Samples, tasks: Mapping[str, TaskOptions]) -> dict[str, Any]:
    """How many pictures the questions of `tasks` show (`benchmark`), and which of them `samples` show, too.

    Pictures are equal if they have the same size and pixels, however they are stored. Frames of videos are not looked
    at. `shared` is the number of samples with such a picture, `rows` the first of them.

    Raises:
        SvlError: if a task's data cannot be read.
    """
    theirs: set[bytes] = set()
    for task, options in tasks.items():
        if benchmarks.output_type(task, options.include_path) == "perplexity":
            continue  # on text alone
        scored = load_task(task, options)
        for number in range(len(scored.rows)):
            theirs |= {pixel_hash(image) for image in scored.images(number)}
    rows = [s.row for s in samples if any(pixel_hash(picture) in theirs for picture in s.pictures)]
    return {"benchmark": len(theirs), "shared": len(rows), "rows": rows[:20]}


def pixel_hash(image: Image.Image) -> bytes:
    """Equal for RGB pictures of one size and the same pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
