"""Calibration files: what they may hold, and how their mistakes are reported."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from svl import config
from svl.core import SvlError
from svl.data import json_files
from svl.data.row_formats import DESCRIBE, RowOptions
from svl.data.sample_files import read_samples
from svl.data.samples import Samples

config.register_with_hydra()
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]


def picture(color, mode: str = "RGB", kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).convert(mode).save(file, kind)
    return file.getvalue()


PICTURES = [picture(color) for color in COLORS]


def write_parquet(file, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


def write_lines(file, *rows):
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture
def lines(tmp_path):
    """A file of four samples whose images lie beside it."""
    (tmp_path / "images").mkdir()
    for i, content in enumerate(PICTURES):
        (tmp_path / "images" / f"{i}.png").write_bytes(content)
    return write_lines(tmp_path / "data.jsonl", *[{"image": f"images/{i}.png", "prompt": f"p{i}"} for i in range(4)])


# ---------------------------------------------------------------------------------------------- reading


def test_every_form_of_image_gives_the_same_examples(tmp_path, lines, monkeypatch):
    prompts = [f"p{i}" for i in range(4)]
    plain = write_parquet(tmp_path / "bytes.parquet", image=PICTURES, prompt=prompts)
    wrapped = write_parquet(
        tmp_path / "hf.parquet", image=[{"bytes": b, "path": None} for b in PICTURES], prompt=prompts
    )
    paths = write_parquet(tmp_path / "paths.parquet", image=[f"images/{i}.png" for i in range(4)], prompt=prompts)
    monkeypatch.chdir("/")  # paths are relative to the file, not to where one happens to be
    copied = shutil.copy(lines, tmp_path / "data.json")
    for file in (plain, wrapped, paths, lines, copied):
        found = read_samples(file)
        assert [(e.row, e.prompt, e.answer) for e in found.samples] == [(i, f"p{i}", "") for i in range(4)]
        assert [e.pictures[0].getpixel((0, 0)) for e in found.samples] == COLORS
        assert (len(found), found.source) == (4, str(file))


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpeg"), ("1", "bmp")]
)
def test_images_are_decoded_to_rgb(mode, kind, tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=[picture((255, 255, 255), mode, kind)], prompt=["x"])
    image = read_samples(file).samples[0].pictures[0]
    assert image.mode == "RGB"
    assert np.asarray(image).min() > 250


def test_answers_and_images_are_optional(tmp_path):
    file = write_lines(
        tmp_path / "x.jsonl", {"image": None, "prompt": "how many", "answer": 0}, {"prompt": "", "answer": None}
    )
    assert [(e.images, e.prompt, e.answer) for e in read_samples(file).samples] == [
        ((), "how many", "0"),
        ((), "", ""),
    ]


def test_texts_in_any_language_stay_whole(tmp_path):
    texts = ["où est\u2028le carré\u0085?", "тест", "図形\nは", "𝔘🟥"]
    file = write_lines(tmp_path / "x.jsonl", *[{"image": None, "prompt": text} for text in texts])
    assert [e.prompt for e in read_samples(file).samples] == texts


# ---------------------------------------------------------------------------------------------- subsets


def test_a_subset_is_fixed_by_its_seed_and_keeps_the_order(lines):
    def rows(n, seed=0):
        return [e.row for e in read_samples(lines, n, seed).samples]

    assert all(rows(3, seed) == rows(3, seed) == sorted(rows(3, seed)) for seed in range(9))
    assert len({tuple(rows(2, seed)) for seed in range(9)}) > 2
    assert rows(4) == rows(99) == rows(None) == [0, 1, 2, 3]


def test_images_outside_the_subset_are_not_read(lines):
    chosen = {e.row for e in read_samples(lines, 2).samples}
    for row in set(range(4)) - chosen:
        (lines.parent / "images" / f"{row}.png").unlink()
    assert {e.row for e in read_samples(lines, 2).samples} == chosen


# ------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_is_of_what_calibration_reads(tmp_path, lines):
    same = write_parquet(tmp_path / "other.parquet", image=PICTURES, prompt=[f"p{i}" for i in range(4)])
    found = read_samples(lines)
    assert read_samples(same).fingerprint == found.fingerprint
    assert len(found.fingerprint) == 16
    first, second, *_ = found.samples
    others = [
        [replace(first, prompt="p"), second],
        [replace(first, images=(PICTURES[3],)), second],
        [replace(first, images=()), second],
        [replace(first, row=7), second],  # random selectors draw by it
        [replace(first, row=1, prompt="0p"), second],
        [replace(first, row=10, prompt="p"), second],
        [second, first],
        [first],
        [first, second, second],
    ]
    prints = {Samples("", tuple(items)).fingerprint for items in [[first, second], *others]}
    assert len(prints) == 1 + len(others)
    assert Samples("elsewhere", (replace(first, answer="a"), second)).fingerprint in prints


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png", "prompt": "x"}, "cannot read the picture 'none.png' of {row}: .*No such file"),
        ({"image": "data.jsonl", "prompt": "x"}, "cannot read the picture 'data.jsonl' of {row}: it is none of PNG"),
        ({"image": "", "prompt": "x"}, "cannot read the picture '' of {row}: .*no regular file"),
        ({"image": "a\0b", "prompt": "x"}, "{row} cannot be read: .*null"),
        ({"image": 5, "prompt": "x"}, "cannot read the picture of {row}: it is neither"),
        ({"image": [["a.png"]], "prompt": "x"}, "cannot read the picture of {row}: it is neither"),
        ({"image": None, "prompt": 5}, "{row} cannot be read: prompt is not text"),
        ({"image": None}, "{row} cannot be read: there is no column .prompt."),
        ({"image": None, "prompt": "\ud800"}, "{row} cannot be read: .*surrogates"),
    ],
)
def test_a_wrong_row_is_named(row, message, tmp_path):
    file = write_lines(tmp_path / "data.jsonl", {"image": None, "prompt": "good"}, row)
    with pytest.raises(SvlError, match=message.replace("{row}", r"row 1 of '.*/data\.jsonl'")):
        read_samples(file)


def test_a_truncated_image_is_found_at_once(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "png")
    file = write_parquet(tmp_path / "x.parquet", image=[PICTURES[0], noise.getvalue()[:-4000]], prompt=["a", "b"])
    with pytest.raises(SvlError, match=r"cannot read the picture of row 1 of .*x\.parquet.*truncated"):
        read_samples(file)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": 1, "prompt": "x"}, r"no column 'image' \(did you mean 'img'\?\); there are: img, prompt"),
        ({"image": None, "prmpt": "x"}, r"no column 'prompt' \(did you mean 'prmpt'\?\)"),
        ({"image": None, "zzz": "x"}, "no column 'prompt'; there are: image, zzz"),
    ],
)
def test_missing_columns_come_with_a_suggestion(columns, message, tmp_path):
    with pytest.raises(SvlError, match=message):
        read_samples(write_lines(tmp_path / "x.jsonl", columns))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", b"a", r"'x.tsv' is not one of .parquet, .jsonl, .json"),
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n\n", "is empty"),
        ("x.jsonl", b'{"image": null, "prompt": "a"}\n{"image"', "line 2: "),
        ("x.json", b"[1]", "item 0: not an object"),
        ("x.jsonl", b"\xff\xfe", "cannot be read as UTF-8"),
        ("x.parquet", b"PAR1", "no readable parquet file"),
    ],
)
def test_unreadable_files_are_plain_errors(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SvlError, match=message):
        read_samples(tmp_path / name)


def test_a_corrupt_parquet_file_is_a_plain_error(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=PICTURES, prompt=list("abcd"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + content[len(content) // 2 + 20 :])
    with pytest.raises(SvlError, match="no readable parquet file"):
        read_samples(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SvlError, match=r"calibration.path: there is no file '.*nope.parquet'"):
        read_samples(tmp_path / "nope.parquet")
    with pytest.raises(SvlError, match=r"no image and no metadata.jsonl in the folder"):
        read_samples(tmp_path)


# --------------------------------------------------------------------------------------- folders of images


def test_a_folder_of_images_needs_no_file(tmp_path):
    (tmp_path / "more").mkdir()
    for i, content in enumerate(PICTURES):
        (tmp_path / ("more" if i % 2 else "") / f"{i}.png").write_bytes(content)
    (tmp_path / "notes.txt").write_text("no image")
    found = read_samples(tmp_path, options=RowOptions(prompt="What is it?"))
    assert [e.pictures[0].getpixel((0, 0)) for e in found.samples] == [COLORS[i] for i in (0, 2, 1, 3)]  # by path
    assert {e.prompt for e in found.samples} == {"What is it?"}
    assert {e.prompt for e in read_samples(tmp_path, 2).samples} == {DESCRIBE}
    rows = [{"file_name": f"more/{i}.png", "prompt": f"p{i}", "answer": i} for i in (3, 1)]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    found = read_samples(tmp_path)
    assert [(e.prompt, e.answer, e.pictures[0].getpixel((0, 0))) for e in found.samples] == [
        ("p3", "3", COLORS[3]),
        ("p1", "1", COLORS[1]),
    ]


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".tif", "tiff"), (".TIFF", "tiff"), (".gif", "gif"), (".webp", "webp"), (".avif", "avif")]
)
def test_pictures_of_less_common_formats_are_read(suffix, kind, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(picture((255, 255, 255), kind=kind))
    (sample,) = read_samples(tmp_path)
    assert np.asarray(sample.pictures[0]).min() > 250


def test_hidden_files_of_a_folder_are_no_pictures(tmp_path):
    """Such as the second file that macOS writes beside every file on a foreign disk."""
    (tmp_path / "a.jpg").write_bytes(picture(COLORS[0], kind="jpeg"))
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "b.png").write_bytes(PICTURES[1])
    assert len(read_samples(tmp_path)) == 1


@pytest.mark.parametrize("name", ["b.jfif", "b.JPE", "b.ppm", "b.pgm", "b.dib", "b.apng"])
def test_pictures_under_less_common_names_are_read(name, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / name).write_bytes(PICTURES[0])
    assert len(read_samples(tmp_path)) == 2


@pytest.mark.parametrize("name", ["b.heic", "more/B.HEIF", "b.svg", "b.jxl", "b.eps", "b.exr", "b.arw", "b.j2k"])
def test_pictures_that_are_not_read_are_named(name, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / name).write_bytes(b"...")
    with pytest.raises(SvlError, match=rf"1 pictures in .* not read, '{name}' for one; convert"):
        read_samples(tmp_path)


def test_a_picture_of_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "b.png").write_bytes(PICTURES[1][:40])
    with pytest.raises(SvlError, match=r"cannot read the picture 'b\.png' of row 1 of '.*'"):
        read_samples(tmp_path)


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    """Above white, below black, stored upside down."""
    image, exif = Image.new("L", (8, 8)), Image.Exif()
    image.paste(255, (0, 4, 8, 8))
    exif[0x0112] = 3  # orientation: turned by 180 degrees
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = np.asarray(read_samples(tmp_path).samples[0].pictures[0])
    assert pixels[0].min() > 200
    assert pixels[-1].max() < 50


def test_a_picture_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(SvlError, match=r"'a\.png' of row 0 .* no regular file"):
        read_samples(tmp_path)


# ---------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": ' + "[" * 10**5,
        '{"a":' * 10**5,
        '{"prompt": ' + "1" * 10**5 + "}",
        '{"image": null, "prompt": "\\ud800"}',
        "NaN",
        '"text"',
        "{'prompt': 1}",
    ],
)
def test_lines_that_no_one_writes_are_refused_in_one_line(line, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"image": null, "prompt": "good"}}\n{line}\n')
    with pytest.raises(SvlError, match=r"line 2|row 1") as caught:
        read_samples(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LONGEST_RECORD", 1000)
    file = tmp_path / "x.jsonl"
    file.write_text('{"image": null, "prompt": "' + "x" * 1000 + '"}\n')
    with pytest.raises(SvlError, match=r"line 1: it is longer than 1,000 characters"):
        read_samples(file)
    file.write_text('{"image": null, "prompt": "' + "x" * 900 + '"}\n')
    assert len(read_samples(file)) == 1


ROW = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.none() | st.text() | st.integers() | st.lists(st.text()),
        "text": st.none() | st.text() | st.floats(),
        "image": st.none() | st.text() | st.integers() | st.dictionaries(st.sampled_from(["bytes", "path"]), st.text()),
        "answer": st.none() | st.text() | st.floats() | st.recursive(st.integers(), st.lists),
    },
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(ROW, max_size=4))
def test_any_json_lines_are_samples_or_one_line(rows, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = ""
    try:
        found = read_samples(file)
    except SvlError as error:
        found, refused = Samples("", ()), str(error)
    assert str(file) in refused if refused else len(found) == len(rows)
    assert all(isinstance(s.prompt, str) and isinstance(s.answer, str) for s in found)
    assert len(found.fingerprint) == len(found.answers) == 16


@pytest.mark.parametrize("name", ["shard-000.tar", "pictures.tar.gz", "pictures.zip"])
def test_archives_in_a_folder_of_pictures_are_named(name, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / name).write_bytes(b"an archive")
    with pytest.raises(SvlError, match=rf"has (a WebDataset, )?1 archives, which are not read, '{name}' for one"):
        read_samples(tmp_path)
