"""Pictures that are trained on, compared with those of benchmarks."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from svl.data.samples import Sample, Samples

pytest.importorskip("lmms_eval")


def test_equal_pixels_are_found_however_they_are_stored():
    """Of a benchmark question's picture: as it is, as BMP, one pixel changed, and of calibration."""
    import svl
    from svl.demo import scenes
    from svl.evaluation.lmms_tasks import load_task
    from svl.evaluation.picture_overlap import picture_overlap
    from svl.evaluation.settings import TaskOptions

    folder = scenes.__file__.rpartition("/")[0]
    tasks = {"svl_demo_open": TaskOptions("accuracy", limit=5, include_path=f"{folder}/tasks")}
    shown = load_task("svl_demo_open", tasks["svl_demo_open"]).images(3)[0]
    changed = shown.copy()
    changed.putpixel((0, 0), tuple(255 - value for value in shown.getpixel((0, 0))))

    def stored(image: Image.Image, kind: str) -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    pictures = [stored(shown, "png"), stored(shown, "bmp"), stored(changed, "png")]
    tasks["svl_prose_fiction"] = TaskOptions("loss", include_path=f"{folder}/tasks")  # which shows none
    mine = Samples("mine", tuple(Sample(row, "?", (picture,), "a") for row, picture in enumerate(pictures)))
    assert picture_overlap(mine, tasks) == {"benchmark": 5, "shared": 2, "rows": [0, 1], "videos": 0}
    theirs = svl.read_samples(f"{folder}/data/calibration.parquet")
    assert picture_overlap(theirs, tasks)["shared"] == 0


def test_videos_are_counted_as_not_compared(tmp_path):
    """Six questions on videos, and a sample with one."""
    pytest.importorskip("av")
    from helpers.video_standins import write_videomme

    from svl.evaluation.picture_overlap import picture_overlap
    from svl.evaluation.settings import TaskOptions

    write_videomme(tmp_path)
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "png")
    picture = file.getvalue()
    mine = Samples("mine", (Sample(0, "?", (picture,), "a"), Sample(1, "?", frames=(picture, picture))))
    tasks = {"svl_videomme": TaskOptions("accuracy", data=str(tmp_path))}
    assert picture_overlap(mine, tasks) == {"benchmark": 0, "shared": 0, "rows": [], "videos": 7}
