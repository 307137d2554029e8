"""Files as people have them, of which only the rows asked for are read."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.sample_pictures import BASE64, COLORS, PICTURES, colors

from svl.core import SvlError
from svl.data import json_files
from svl.data.own_files import open_table
from svl.data.sample_files import read_samples
from svl.data.tables import ParquetTable

ROWS = [{"image": None, "prompt": f"Is it {i}?", "answer": str(i)} for i in range(7)]
LINES = "\n".join(map(json.dumps, ROWS))
FILES = {
    "lines.jsonl": LINES.encode(),
    "lines.json": LINES.encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "empty-lines.jsonl": LINES.replace("\n", "\n\n  \n").encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "array-mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(),
    "a-row-a-line.json": f"[\n{LINES}\n]".replace("}\n{", "},\n{").encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "object.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "upper.JSONL": LINES.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    found = read_samples(tmp_path / name)
    assert [(s.row, s.prompt, s.answer) for s in found] == [(i, f"Is it {i}?", str(i)) for i in range(7)]
    (tmp_path / "plain.jsonl").write_text(LINES)
    some, plain = read_samples(tmp_path / name, 3, seed=5), read_samples(tmp_path / "plain.jsonl", 3, seed=5)
    assert [s.row for s in some] == [s.row for s in plain]
    assert some.fingerprint == plain.fingerprint


def test_a_csv_file(tmp_path):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "prompt", "answer"])
        writer.writeheader()
        writer.writerows([{"image": BASE64[1], "prompt": 'with "quotes",\nand lines', "answer": "a"}, *ROWS[:1]])
    first, second = read_samples(tmp_path / "x.csv")
    assert (first.prompt, colors(first)) == ('with "quotes",\nand lines', [COLORS[1]])
    assert (second.prompt, second.images) == ("Is it 0?", ())


def test_an_array_is_read_as_its_text_comes_in(tmp_path, monkeypatch):
    """Also when a piece ends within a number, an escape or a letter of several bytes."""
    rows = [{"image": None, "prompt": f'é\\u2028 "{i}" [{{,', "answer": "1.5e3" * i} for i in range(9)]
    (tmp_path / "x.json").write_text(json.dumps(rows, ensure_ascii=False, indent=3), encoding="utf-8")
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(json_files, "CHUNK", size)
        assert list(open_table(tmp_path / "x.json").rows(range(9))) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"image": null, "prompt": "a"}, {"image"', "item 1: "),
        ("x.json", '[{"image": null, "prompt": "a"} {"image": null}]', "item 1: ',' is expected"),
        ("x.json", "[" * 10**5, "item 0: "),
        ("x.json", '{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "not as COCO's captions are"),
        ("x.json", '{"images": [', "line 1: "),
        ("x.json", '{"data": [5]}', "item 0: not an object"),
        ("x.json", "[]", "is empty"),
        ("x.json.gz", "not packed", "cannot be read"),
        ("x.jsonl.gz", "not packed", "cannot be read"),
    ],
)
def test_broken_files_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(SvlError, match=message) as caught:
        read_samples(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


# --------------------------------------------------------------------------------------------------- pictures


def test_captions_of_coco(tmp_path):
    for i, content in enumerate(PICTURES[:2]):
        (tmp_path / f"{i:012}.png").write_bytes(content)
    content = {
        "info": {"year": 2017},
        "images": [{"id": 7 + i, "file_name": f"{i:012}.png"} for i in range(2)],
        "annotations": [{"id": i, "image_id": 7 + i % 2, "caption": f"c{i}"} for i in range(3)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    found = read_samples(tmp_path / "captions.json")
    assert [(s.answer, colors(s)) for s in found] == [("c0", [COLORS[0]]), ("c1", [COLORS[1]]), ("c2", [COLORS[0]])]
    assert {s.prompt for s in found} == {"Describe this image."}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_with_a_file_that_says_more(kind, inside, tmp_path):
    folder = tmp_path / inside
    (folder / "more").mkdir(parents=True)
    for i in range(3):
        (folder / "more" / f"{i}.png").write_bytes(PICTURES[i])
    rows = [{"file_name": f"more/{i}.png", "text": f"t{i}"} for i in (2, 0)]
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        file.write_text("file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = read_samples(tmp_path)
    assert [(s.prompt, s.answer, colors(s)) for s in found] == [
        ("Describe this image.", "t2", [COLORS[2]]),
        ("Describe this image.", "t0", [COLORS[0]]),
    ]


def test_a_metadata_file_may_name_several_pictures(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(PICTURES[i])
    row = {"file_names": ["2.png", "0.png"], "prompt": "Same?", "answer": "no"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (sample,) = read_samples(tmp_path)
    assert (colors(sample), sample.prompt) == ([COLORS[2], COLORS[0]], "Same?")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "json"])
def test_a_folder_of_files_with_rows_is_one_set(kind, tmp_path):
    for i in range(3):
        rows, file = ROWS[2 * i : 2 * i + 2], tmp_path / f"part-{i}.{kind}"
        if kind == "parquet":
            table = pyarrow.table({"image": [PICTURES[0]] * 2, "prompt": [row["prompt"] for row in rows]})
            pyarrow.parquet.write_table(table, file)
        else:
            content = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
            file.write_bytes(gzip.compress(content.encode()) if kind.endswith("gz") else content.encode())
    found = read_samples(tmp_path)
    assert [(s.row, s.prompt) for s in found] == [(i, f"Is it {i}?") for i in range(6)]
    chosen = [s.row for s in read_samples(tmp_path, 3, seed=1)]
    assert chosen == sorted(set(chosen))
    assert [s.prompt for s in read_samples(tmp_path, 3, seed=1)] == [f"Is it {i}?" for i in chosen]


# ---------------------------------------------------------------------------------------------------- only a few rows


def test_only_row_groups_with_wanted_rows_are_read(tmp_path, monkeypatch):
    table = pyarrow.table({"image": [None] * 1000, "prompt": [f"p{i}" for i in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    table = ParquetTable(tmp_path / "x.parquet")
    read, real = [], type(table.file).iter_batches

    def watched(self, *args, **kwargs):
        read.extend(kwargs["row_groups"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(table.file), "iter_batches", watched)
    wanted = [3, 9, 10, 577, 999]
    assert [row["prompt"] for row in table.rows(wanted)] == [f"p{i}" for i in wanted]
    assert read == [0, 1, 57, 99]


def test_lines_that_are_not_drawn_are_not_parsed(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    chosen = {s.row for s in read_samples(tmp_path / "x.jsonl", 3)}
    for i in set(range(7)) - chosen:
        lines[i] = "broken"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert {s.row for s in read_samples(tmp_path / "x.jsonl", 3)} == chosen
