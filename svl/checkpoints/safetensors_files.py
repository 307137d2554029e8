"""Reading checkpoint folders at the level of files: safetensors headers and byte ranges. No model, no pickles.

Only headers are held in memory, after the safetensors library has found them valid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svl.core.errors import SvlError
from svl.models.weight_files import CONVERT, check_header_length, find_weight_files, read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
BLOCK = 16 * 2**20  # bytes that are copied, or computed, at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the bytes [begin, begin + size) hold `shape` elements of `dtype` (a name in DTYPES)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its rows [start, stop), in memory of its own.

        Raises:
            SvlError: if the file has become shorter.
        """
        shape, begin, size = self.shape, self.begin, self.size
        if stop is not None:
            row = self.size // shape[0]
            stop = min(stop, shape[0])
            shape, begin, size = (stop - start, *shape[1:]), self.begin + start * row, (stop - start) * row
        data = bytearray(size)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(begin)
            view = memoryview(data)
            while view and (done := file.readinto(view)):
                view = view[done:]
        if view:
            raise SvlError(f"'{self.file}' is incomplete")
        dtype = DTYPES[self.dtype]
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def row_blocks(tensor: StoredTensor) -> Iterator[tuple[int, int | None]]:
    """Ranges of rows of at most BLOCK bytes (but one row at least), as `StoredTensor.read` takes them."""
    if not tensor.size or not tensor.shape:
        yield 0, None
        return
    height = max(1, BLOCK * tensor.shape[0] // tensor.size)
    for start in range(0, tensor.shape[0], height):
        yield start, start + height


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder by name, in the order in which they lie on disk, from the headers alone.

    As transformers reads them: all that are in the files, whatever an index says of them; of a name in several files,
    the tensor in the last.

    Raises:
        SvlError: if the weights are pickles, quantised, damaged, incomplete, or laid out in a way that is not known.
    """
    settings = read_json(folder / "config.json").get("quantization_config")
    if isinstance(settings, dict) and (method := settings.get("quant_method")):
        raise SvlError(f"the weights in '{folder}' are quantised ({method}); export the model they were made from")
    weights = find_weight_files(folder)
    if weights.pickled:
        raise SvlError(
            f"the weights in '{folder}' are pickles ({weights.files[0].name}), which may run code when they are read: "
            + CONVERT.format(folder)
        )
    found: dict[str, StoredTensor] = {}
    for file in weights.files:
        found |= read_header(file)
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise SvlError(f"the weights in '{folder}' are quantised ('{name}' is stored as {tensor.dtype})")
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        SvlError: if the file is damaged or incomplete, the safetensors library refuses it, or names occur twice.
    """
    length = check_header_length(file)
    try:
        with safe_open(file, "pt"):
            pass  # all that the format asks for is checked: types, sizes, no overlap, no holes, nothing behind
        with open(file, "rb") as source:
            source.seek(8)
            entries = json.loads(source.read(length), object_pairs_hook=_without_duplicates)
    except (OSError, SafetensorError, ValueError) as error:
        raise SvlError(f"'{file}' is damaged or incomplete: {str(error).splitlines()[0]}") from error
    entries.pop("__metadata__", None)
    found = []
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        found.append((name, StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)))
    return dict(sorted(found, key=lambda pair: pair[1].begin))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; ValueError if a name occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return result
