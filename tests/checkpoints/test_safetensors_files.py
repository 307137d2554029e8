"""Headers are read as strictly as the format has them, and bytes are copied as they are."""

from __future__ import annotations

import errno
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svl.checkpoints import safetensors_files, safetensors_writing
from svl.checkpoints.export import parse_size
from svl.checkpoints.safetensors_files import DTYPES, read_header, read_tensors
from svl.checkpoints.safetensors_writing import NewTensor, write_weights
from svl.core import SvlError
from svl.models.weight_files import WEIGHTS


@pytest.fixture
def stored(tmp_path):
    """Tensors of several types in one file, as the safetensors library writes them."""
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5).to(torch.bfloat16), "c": torch.tensor(3),
        "d": torch.arange(7).to(torch.uint8), "e": torch.empty(0, 4), "f": torch.arange(40.0).reshape(10, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "all.safetensors")
    return tensors, read_header(tmp_path / "all.safetensors")


@pytest.mark.parametrize("how", ["kernel", "missing", "refused"])
def test_bytes_are_copied_with_and_without_help_of_the_kernel(how, stored, tmp_path, monkeypatch):
    def refused(*_: Any) -> int:
        raise OSError(errno.EXDEV, "across file systems")

    if how == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif how == "refused":
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    monkeypatch.setattr(safetensors_files, "BLOCK", 16)
    tensors, entries = stored
    pieces = [NewTensor(f"new.{k}", s.dtype, s.shape, s) for k, s in entries.items()]
    pieces.append(NewTensor("computed", "BF16", (3, 2), lambda: iter([torch.ones(1, 2).bfloat16()] * 3)))
    write_weights(tmp_path, pieces, 10**9)
    again = load_file(tmp_path / WEIGHTS)
    assert torch.equal(again.pop("computed"), torch.ones(3, 2).bfloat16())
    assert again.keys() == {f"new.{k}" for k in tensors}
    assert all(torch.equal(again[f"new.{k}"], t) and again[f"new.{k}"].dtype == t.dtype for k, t in tensors.items())
    for entry in read_header(tmp_path / WEIGHTS).values():
        assert entry.begin % safetensors_files.DTYPES[entry.dtype].itemsize == 0  # aligned


def test_rows_are_read_alone(stored):
    tensors, entries = stored
    assert all(torch.equal(entries[k].read(), t) for k, t in tensors.items())
    assert torch.equal(entries["f"].read(3, 7), tensors["f"][3:7])
    assert torch.equal(entries["f"].read(8, 99), tensors["f"][8:])


@pytest.mark.parametrize(("limit", "expected"), [(1, [1] * 4), (160, [4]), (90, [2, 2]), (45, [1] * 4)])
def test_shards_are_no_larger_than_asked(limit, expected, stored):
    pieces = [NewTensor(str(i), "F32", (10,), stored[1]["f"]) for i in range(4)]
    assert [len(part) for part in safetensors_writing.split_into_shards(pieces, limit)] == expected


# ----------------------------------------------------------------------------------------- headers of strangers


def write_file(path: Path, header: Any, size: int) -> Path:
    """A safetensors file of a header (JSON, or as it is) and so many bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


FLOAT = json.dumps(entry(0, 4)).encode()
BAD: dict[str, tuple[Any, int]] = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12),
    "the same bytes": ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "begins later": ({"a": entry(4, 8)}, 8),
    "trailing bytes": ({"a": entry(0, 4)}, 12),
    "too few bytes": ({"a": entry(0, 8, [2])}, 4),
    "negative begin": ({"a": entry(-4, 0)}, 4),
    "end before begin": ({"a": entry(4, 0)}, 4),
    "fractional begin": ({"a": entry(0.0, 4)}, 4),
    "fractional shape": ({"a": entry(0, 4, [1.0])}, 4),
    "text as shape": ({"a": entry(0, 4, ["1"])}, 4),
    "truth as shape": ({"a": entry(0, 4, [True])}, 4),
    "negative shape": ({"a": entry(0, 4, [-1, -1])}, 4),
    "no list as shape": ({"a": entry(0, 4, 1)}, 4),
    "other size": ({"a": entry(0, 4, [2])}, 4),
    "shape beyond all numbers": ({"a": entry(0, 4, [2**62, 2**62])}, 4),
    "unknown dtype": ({"a": entry(0, 4, dtype="Q4")}, 4),
    "number as dtype": ({"a": entry(0, 4, dtype=4)}, 4),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, 4),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "list": ([], 0),
    "number": (3, 0),
    "nothing": (b"", 0),
    "NaN": (b'{"a": NaN}', 0),
    "deep": (b'{"a":' * 10**5, 0),
    "numbers as metadata": ({"__metadata__": {"a": 1}, "a": entry(0, 4)}, 4),
    "twice": (b'{"a":' + FLOAT + b',"a":' + FLOAT + b"}", 4),
    "dtype twice": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', 4),
    "no text": (b"\xff\xfe{}", 0),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_headers_are_read_as_strictly_as_the_format_has_them(case, tmp_path):
    file = write_file(tmp_path / "x.safetensors", *BAD[case])
    with pytest.raises(SvlError, match="is damaged or incomplete: ") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_too_short_files_are_damaged(tmp_path):
    for size in range(8):
        (tmp_path / "x.safetensors").write_bytes(bytes(size))
        with pytest.raises(SvlError, match="is damaged or incomplete"):
            read_header(tmp_path / "x.safetensors")
    assert read_header(write_file(tmp_path / "y.safetensors", {}, 0)) == {}


NUMBERS = st.integers(-2, 12) | st.floats(allow_nan=False) | st.text(max_size=2) | st.none() | st.booleans()
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "X"]) | NUMBERS,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.tuples(st.integers(0, 12), st.integers(0, 12)) | st.lists(NUMBERS, max_size=3),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3) | st.recursive(NUMBERS, st.lists, max_leaves=3),
    size=st.integers(0, 24),
)
def test_any_header_is_read_as_the_library_reads_it_or_refused(tmp_path_factory, header, size):
    file = write_file(tmp_path_factory.mktemp("header") / "x.safetensors", header, size)
    try:
        found = read_header(file)
    except SvlError:
        return
    with safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == found.keys()
        for name, tensor in found.items():
            part = theirs.get_slice(name)
            assert (tuple(part.get_shape()), part.get_dtype()) == (tensor.shape, tensor.dtype)
            if tensor.dtype in DTYPES:
                assert torch.equal(theirs.get_tensor(name), tensor.read())


DTYPE_NAMES = [name for name in DTYPES if name != "C64"]


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPE_NAMES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    limit=st.integers(1, 200),
    data=st.data(),
)
def test_what_is_written_is_read_back_whole(tmp_path_factory, shapes, limit, data):
    """Stored tensors under new names, in shards of any size."""
    folder = tmp_path_factory.mktemp("written")
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(DTYPES[dtype])
        for name, (dtype, shape) in shapes.items()
    }
    save_file(tensors, folder / "all.safetensors")
    stored = read_header(folder / "all.safetensors")
    names = data.draw(st.permutations(list(stored)))
    new = [NewTensor(f"new.{name}", stored[name].dtype, stored[name].shape, stored[name]) for name in names]
    (folder / "out").mkdir()
    write_weights(folder / "out", new, limit)
    (folder / "out" / "config.json").write_text("{}")
    again = read_tensors(folder / "out")
    assert again.keys() == {f"new.{name}" for name in tensors}
    assert all(torch.equal(again[f"new.{name}"].read(), tensor) for name, tensor in tensors.items())
    files = {tensor.file for tensor in again.values()}
    sizes = [sum(t.size for t in again.values() if t.file == file) for file in files]
    counts = [sum(t.file == file for t in again.values()) for file in files]
    assert all(size <= limit or count == 1 or size == 0 for size, count in zip(sizes, counts, strict=True))


def test_names_are_never_written_twice(stored, tmp_path):
    twice = [NewTensor("x", "F32", (10, 4), stored[1]["f"])] * 2
    with pytest.raises(SvlError, match="'x' would be written twice"):
        write_weights(tmp_path, twice, 10**9)


def test_a_source_that_becomes_shorter_is_noticed(stored, tmp_path):
    new = [NewTensor(name, tensor.dtype, tensor.shape, tensor) for name, tensor in stored[1].items()]
    os.truncate(tmp_path / "all.safetensors", (tmp_path / "all.safetensors").stat().st_size - 9)
    with pytest.raises(SvlError, match="became shorter while it was read"):
        write_weights(tmp_path, new, 10**9)


@settings(max_examples=200)
@given(
    number=st.integers(1, 10**6),
    unit=st.sampled_from(["", "B", "KB", "MB", "GB", "TB"]),
    gap=st.sampled_from(["", " "]),
)
def test_sizes_with_units(number, unit, gap):
    exponent = ["", "KB", "MB", "GB", "TB"].index("" if unit == "B" else unit)
    for text in (f"{number}{gap}{unit}", f" {number}{gap}{unit.lower()} "):
        assert parse_size(text) == number * 1000**exponent


@settings(max_examples=300)
@given(st.text(max_size=8) | st.floats() | st.integers(max_value=0))
def test_any_size_is_a_number_or_refused(given):
    with suppress(SvlError):
        assert parse_size(given) >= 1
