"""The example that figures of tokens show."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from svl.calibration.calibrate import calibrate, select
from svl.data.samples import Samples
from svl.run.figure_data import write_example_picture, write_token_scores
from svl.selectors.tis import Tis


@pytest.mark.parametrize("kind", ["llava", "qwen"])
@pytest.mark.parametrize("pictures", [1, 3])
def test_of_several_pictures_the_first_is_shown_with_its_own_scores(kind, pictures, request, samples, tmp_path):
    lvlm = request.getfixturevalue(kind)
    one, two, three, *_ = samples.samples
    sample = replace(one, images=(*one.images, *two.images, *three.images)[:pictures])
    data = Samples("given", (sample,))
    write_example_picture(lvlm, data, tmp_path)
    stats = select(calibrate(lvlm, data, batch_size=1), Tis())
    shown = tmp_path / "shown"
    shown.mkdir()
    write_token_scores(stats, tmp_path, shown)
    example = json.loads((shown / "example.json").read_text())
    rows, columns = example["grid"]
    (trace,) = stats.traces
    scores = Tis().scores(trace)
    scores = scores.mean(0) if scores.ndim == 2 else scores
    assert example["visual"] == pytest.approx(scores[trace.visual][: rows * columns].tolist())
    assert int(trace.visual.sum()) >= pictures * rows * columns // 2 > 0
    assert len(example["text"]) == int((~trace.visual).sum())
    assert Image.open(tmp_path / "example.png").size == sample.pictures[0].size


def test_without_a_picture_there_is_no_example(llava, samples, tmp_path):
    data = Samples("given", tuple(replace(sample, images=()) for sample in samples))
    write_example_picture(llava, data, tmp_path)
    assert not list(tmp_path.iterdir())
