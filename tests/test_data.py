"""Calibration files: what they may hold, and how their mistakes are reported."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image, ImageFile

from svl import benchmarks, config, data
from svl.core import SvlError
from svl.data import Examples, read_samples

config.register()
ROOT = Path(__file__).parents[1]
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
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
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
        examples = read_samples(file)
        assert [(e.row, e.prompt, e.answer) for e in examples.items] == [(i, f"p{i}", "") for i in range(4)]
        assert [e.image.getpixel((0, 0)) for e in examples.items] == COLORS
        assert (len(examples), examples.source) == (4, str(file))


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpeg"), ("1", "bmp")]
)
def test_images_are_decoded_to_rgb(mode, kind, tmp_path):
    file = write_parquet(tmp_path / "x.parquet", image=[picture((255, 255, 255), mode, kind)], prompt=["x"])
    image = read_samples(file).items[0].image
    assert image.mode == "RGB"
    assert np.asarray(image).min() > 250


def test_answers_and_images_are_optional(tmp_path):
    file = write_lines(
        tmp_path / "x.jsonl", {"image": None, "prompt": "how many", "answer": 0}, {"prompt": "", "answer": None}
    )
    assert [(e.image_bytes, e.prompt, e.answer) for e in read_samples(file).items] == [
        (None, "how many", "0"),
        (None, "", ""),
    ]


def test_texts_in_any_language_stay_whole(tmp_path):
    texts = ["où est\u2028le carré\u0085?", "тест", "図形\nは", "𝔘🟥"]
    file = write_lines(tmp_path / "x.jsonl", *[{"image": None, "prompt": text} for text in texts])
    assert [e.prompt for e in read_samples(file).items] == texts


# ---------------------------------------------------------------------------------------------- subsets


def test_a_subset_is_fixed_by_its_seed_and_keeps_the_order(lines):
    def rows(n, seed=0):
        return [e.row for e in read_samples(lines, n, seed).items]

    assert all(rows(3, seed) == rows(3, seed) == sorted(rows(3, seed)) for seed in range(9))
    assert len({tuple(rows(2, seed)) for seed in range(9)}) > 2
    assert rows(4) == rows(99) == rows(None) == [0, 1, 2, 3]


def test_images_outside_the_subset_are_not_read(lines):
    chosen = {e.row for e in read_samples(lines, 2).items}
    for row in set(range(4)) - chosen:
        (lines.parent / "images" / f"{row}.png").unlink()
    assert {e.row for e in read_samples(lines, 2).items} == chosen


# ------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_is_of_what_calibration_reads(tmp_path, lines):
    same = write_parquet(tmp_path / "other.parquet", image=PICTURES, prompt=[f"p{i}" for i in range(4)])
    examples = read_samples(lines)
    assert read_samples(same).fingerprint == examples.fingerprint
    assert len(examples.fingerprint) == 16
    first, second, *_ = examples.items
    others = [
        [replace(first, prompt="p"), second],
        [replace(first, image_bytes=PICTURES[3]), second],
        [replace(first, image_bytes=None), second],
        [replace(first, row=7), second],  # random selectors draw by it
        [replace(first, row=1, prompt="0p"), second],
        [replace(first, row=10, prompt="p"), second],
        [second, first],
        [first],
        [first, second, second],
    ]
    prints = {Examples("", tuple(items)).fingerprint for items in [[first, second], *others]}
    assert len(prints) == 1 + len(others)
    assert Examples("elsewhere", (replace(first, answer="a"), second)).fingerprint in prints


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png", "prompt": "x"}, r"row 1: cannot read the image \(.*none.png"),
        ({"image": "data.jsonl", "prompt": "x"}, r"row 1: cannot read the image \(cannot identify"),
        ({"image": "", "prompt": "x"}, "row 1: cannot read the image"),
        ({"image": 5, "prompt": "x"}, "row 1: cannot read the image"),
        ({"image": ["a.png"], "prompt": "x"}, "row 1: cannot read the image"),
        ({"image": None, "prompt": 5}, "row 1: prompt is not text"),
        ({"image": None}, "row 1: prompt is not text"),
    ],
)
def test_a_wrong_row_is_named(row, message, tmp_path):
    file = write_lines(tmp_path / "data.jsonl", {"image": None, "prompt": "good"}, row)
    with pytest.raises(SvlError, match=message):
        read_samples(file)


def test_a_truncated_image_is_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it on import, for all
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise, "png")
    file = write_parquet(tmp_path / "x.parquet", image=[PICTURES[0], noise.getvalue()[:-4000]], prompt=["a", "b"])
    with pytest.raises(SvlError, match="row 1: cannot read the image"):
        read_samples(file)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": 1, "prompt": "x"}, r"no column 'image' \(did you mean 'img'\?\); it has: img, prompt"),
        ({"image": None, "prmpt": "x"}, r"no column 'prompt' \(did you mean 'prmpt'\?\)"),
        ({"image": None, "zzz": "x"}, "no column 'prompt'; it has: image, zzz"),
    ],
)
def test_missing_columns_come_with_a_suggestion(columns, message, tmp_path):
    with pytest.raises(SvlError, match=message):
        read_samples(write_lines(tmp_path / "x.jsonl", columns))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"a", r"'x.csv' is not one of .parquet, .jsonl, .json"),
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b"\n\n", "is empty"),
        ("x.jsonl", b'{"image": null, "prompt": "a"}\n{"image"', "line 2: "),
        ("x.json", b"[1]", "line 1: not an object"),
        ("x.jsonl", b"\xff\xfe", "not UTF-8"),
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
    examples = read_samples(tmp_path, prompt="What is it?")
    assert [e.image.getpixel((0, 0)) for e in examples.items] == [COLORS[i] for i in (0, 2, 1, 3)]  # by path
    assert {e.prompt for e in examples.items} == {"What is it?"}
    assert {e.prompt for e in read_samples(tmp_path, 2).items} == {data.DESCRIBE}
    rows = [{"file_name": f"more/{i}.png", "prompt": f"p{i}", "answer": i} for i in (3, 1)]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    examples = read_samples(tmp_path)
    assert [(e.prompt, e.answer, e.image.getpixel((0, 0))) for e in examples.items] == [
        ("p3", "3", COLORS[3]),
        ("p1", "1", COLORS[1]),
    ]


# ---------------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def standins(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("make_standins", ROOT / "scripts" / "make_standins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ["llava-instruct-mix-vsft", "coco_captions", "GQA", "ScienceQA", "A-OKVQA", "FineVision", "wikitext"]
    return module.write(tmp_path_factory.mktemp("standins"), names)


def chosen(choice, standins, **changes):
    """What conf/calibration/<choice>.yaml draws, from the copy of its data set."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        c = compose("config", overrides=[f"calibration={choice}"]).calibration
    options = {"format": c.format, "n": 5, "seed": 0, "name": c.name, "split": c.split, "prompt": c.prompt}
    options |= {"images": dict(c.images) or None, **changes}
    return data.draw(str(standins / c.path.split("/")[1]), **options)


WANTED = {  # part of the first turn, part of its answer
    "llava_instruct": ("What is in scene", "thing."),
    "coco_captions": ("one-sentence caption", "thing, number"),
    "gqa": ("Which colour does shape", ""),
    "scienceqa": ("\nAnswer with the option's letter", ""),
    "aokvqa": ("\nA. ", ""),
    "finevision": ("Describe", "It is"),
    "wikitext": ("is known for", ""),
}


@pytest.mark.parametrize("choice", WANTED)
def test_every_data_set_gives_samples(choice, standins, tmp_path):
    examples = chosen(choice, standins)
    asked, said = WANTED[choice]
    for example in examples.items:
        assert asked in example.prompt
        assert said in example.answer
        assert example.plain == (choice == "wikitext")
        assert example.plain or example.image.size == (32, 24)
        assert example.plain or "<image>" not in example.prompt
    assert len({e.image_bytes for e in examples.items}) > 1 or choice == "wikitext"
    if choice in ("scienceqa", "aokvqa"):
        assert {e.answer for e in examples.items} <= set("ABCD")
    if choice == "wikitext":
        assert all(len(e.prompt) >= data.CHARACTERS and "=" not in e.prompt for e in examples.items)
    assert chosen(choice, standins).fingerprint == examples.fingerprint
    assert chosen(choice, standins, seed=1).fingerprint != examples.fingerprint
    data.save(examples, tmp_path / "kept.parquet")
    kept = read_samples(tmp_path / "kept.parquet")
    assert (kept.fingerprint, kept.answers) == (examples.fingerprint, examples.answers)


def test_images_of_gqa_belong_to_their_questions(standins):
    def rows(name):
        (file,) = (standins / "GQA" / name).iterdir()
        return pyarrow.parquet.read_table(file).to_pylist()

    images = {row["id"]: row["image"]["bytes"] for row in rows("train_balanced_images")}
    of = {row["question"]: images[row["imageId"]] for row in rows("train_balanced_instructions")}
    assert all(of[e.prompt] == e.image_bytes for e in chosen("gqa", standins).items)


def test_mistakes_with_data_sets_are_named(standins):
    with pytest.raises(SvlError, match=r"calibration.format is 'choice'.*did you mean 'choices'"):
        chosen("scienceqa", standins, format="choice")
    with pytest.raises(SvlError, match=r"calibration\.samples is not set"):
        chosen("scienceqa", standins, n=None)
    with pytest.raises(SvlError, match=r"has \d+ samples in 'train', but calibration.samples is 500"):
        chosen("scienceqa", standins, n=500)
    with pytest.raises(SvlError, match="has no column 'caption'"):
        chosen("scienceqa", standins, format="caption")
    for wrong in ({"split": "tran"}, {"name": "ScienceQA-IMGS"}):
        with pytest.raises(SvlError, match=r"calibration\.path: cannot read"):
            chosen("scienceqa", standins, **wrong)


@pytest.mark.parametrize(
    ("path", "split", "task"),
    [
        ("lmms-lab/ScienceQA", "test", "svl_scienceqa"),
        ("/copies/ScienceQA", "test[:10]", "svl_scienceqa"),
        ("HuggingFaceM4/A-OKVQA", "validation", "svl_aokvqa"),
        ("other/AOKVQA", "val", "svl_aokvqa"),
        ("Lin-Chen/MMStar", "val", "svl_mmstar"),
        ("lmms-lab/MMBench", "dev", "svl_mmbench"),
    ],
)
def test_nothing_is_calibrated_on_what_is_scored(path, split, task):
    with pytest.raises(SvlError, match=f"'{re.escape(split)}' of .* is what benchmark task '{task}' is scored on"):
        benchmarks.check_apart(path, split, [], None)
    benchmarks.check_apart(path, "train", [], None)


def test_no_file_is_both_calibration_set_and_benchmark(tmp_path):
    tasks = str(ROOT / "svl" / "demo" / "tasks")
    copied = shutil.copy(ROOT / "svl" / "demo" / "data" / "open.parquet", tmp_path / "mine.parquet")
    with pytest.raises(SvlError, match=r"mine\.parquet' is what benchmark task 'svl_demo_open' is scored on"):
        benchmarks.check_apart(str(copied), None, ["svl_demo_choice", "svl_demo_open"], tasks)
    benchmarks.check_apart(str(copied), None, ["svl_demo_choice"], tasks)
    benchmarks.check_apart(str(ROOT / "svl" / "demo" / "data" / "calibration.parquet"), None, ["svl_demo_open"], tasks)
