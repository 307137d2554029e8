"""Whether pictures that were trained on are those of benchmarks, pixel by pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from PIL import Image

from svl.data.pictures import open_picture
from svl.data.samples import Samples
from svl.evaluation import benchmarks
from svl.evaluation.lmms_tasks import load_task
from svl.evaluation.settings import TaskOptions

ROWS = 20  # samples with a picture of a benchmark that are listed


def picture_overlap(samples: Samples, tasks: Mapping[str, TaskOptions]) -> dict[str, Any]:
    """How many pictures the questions of `tasks` show (`benchmark`), and which of them `samples` show, too.

    Pictures are equal if they have the same size and pixels, however they are stored. `shared` is the number of samples
    with such a picture, `rows` the first ROWS of them. Videos are not looked at: which frames stand for one depends on
    how many are taken. `videos` is the number of samples and questions with one.

    Raises:
        SvlError: if a task's data cannot be read.
    """
    theirs: set[bytes] = set()
    videos = sum(bool(sample.frames) for sample in samples)
    for task, options in tasks.items():
        if benchmarks.output_type(task, options.include_path) == "perplexity":
            continue  # on text alone
        scored = load_task(task, options)
        for number in range(len(scored.rows)):
            shown = scored.visuals(number)
            images = [image for image in shown if isinstance(image, Image.Image)]
            theirs |= {pixel_hash(open_picture(image)) for image in images}
            videos += len(images) < len(shown)
    rows = [s.row for s in samples if any(pixel_hash(picture) in theirs for picture in s.pictures)]
    return {"benchmark": len(theirs), "shared": len(rows), "rows": rows[:ROWS], "videos": videos}


def pixel_hash(image: Image.Image) -> bytes:
    """Equal for RGB pictures of one size and the same pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
