"""Checkpoint folders at the level of files: safetensors headers, byte ranges, shards. No model, no pickles.

A tensor that does not change is a range of bytes, and stays one: it goes from file to file without entering this
process. Only headers are held in memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svl.core import SvlError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
BLOCK = 16 * 2**20  # bytes that are copied, or computed, at a time
HEADER_LIMIT = 100 * 2**20  # bytes; of the format


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the bytes [begin, begin + size) hold `shape` elements of `dtype` (a name in DTYPES)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, or its rows [start, stop), in memory of its own."""
        shape = self.shape
        begin, size = self.begin, self.size
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


def row_blocks(tensor: Stored) -> Iterator[tuple[int, int | None]]:
    """Ranges of rows of at most BLOCK bytes (but one row at least), as `Stored.read` takes them."""
    if not tensor.size or not tensor.shape:
        yield 0, None
        return
    height = max(1, BLOCK * tensor.shape[0] // tensor.size)
    for start in range(0, tensor.shape[0], height):
        yield start, start + height


@dataclass(frozen=True)
class Piece:
    """A tensor to write: the bytes of a stored one, or blocks that are computed when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored | Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder by name, in the order in which they lie on disk, from the headers alone.

    Raises:
        SvlError: if the weights are pickles, quantised, damaged, incomplete, or laid out in a way that is not known.
    """
    config = read_json(folder / "config.json")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise SvlError(f"the weights in '{folder}' are quantised ({method}); export the model they were made from")
    index = folder / INDEX
    if index.is_file():
        weights: Any = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
            raise SvlError(f"'{index}' has no map of weights to files")
        names = sorted(set(weights.values()))
    elif (folder / WEIGHTS).is_file():
        weights, names = None, [WEIGHTS]
    else:
        raise SvlError(_no_weights(folder))
    found: dict[str, Stored] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise SvlError(f"'{folder}' lacks '{name}', which its index names")
        tensors = header(folder / name)
        if twice := found.keys() & tensors.keys():
            raise SvlError(f"'{folder}' has tensor '{min(twice)}' in two files")
        found |= tensors
    if weights is not None and (missing := weights.keys() - found.keys()):
        raise SvlError(f"'{folder}' lacks tensor '{min(missing)}', which its index names")
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise SvlError(f"the weights in '{folder}' are quantised ('{name}' is stored as {tensor.dtype})")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SvlError: if there is no such file, or it holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SvlError(f"'{file.parent}' has no {file.name}, so it is no checkpoint") from error
    except (OSError, ValueError) as error:
        raise SvlError(f"cannot read '{file}': {error}") from error
    if not isinstance(value, dict):
        raise SvlError(f"'{file}' holds no JSON object")
    return value


def _no_weights(folder: Path) -> str:
    files = sorted(p.name for p in folder.iterdir())
    if pickles := [n for n in files if n.endswith(PICKLES)]:
        return (
            f"the weights in '{folder}' are pickles ({pickles[0]}), which may run code when they are read; convert them"
            " to safetensors first"
        )
    if packed := [n for n in files if n.endswith(".gguf")]:
        return f"the weights in '{folder}' are quantised ({packed[0]}); export the model they were made from"
    if other := [n for n in files if n.endswith(".safetensors")]:
        return f"the layout of '{folder}' is not known: it has {other[0]}, but neither {WEIGHTS} nor {INDEX}"
    return f"'{folder}' has no weights: neither {WEIGHTS} nor {INDEX}"


def header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        SvlError: if the file is damaged or incomplete.
    """
    try:
        total = file.stat().st_size
        with open(file, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > min(total, HEADER_LIMIT):
                raise ValueError("header longer than the file")
            entries = json.loads(source.read(length))
        entries.pop("__metadata__", None)
        start, found = 8 + length, []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(map(int, entry["shape"]))
            dtype = DTYPES.get(entry["dtype"])
            if start + end > total or (dtype and math.prod(shape) * dtype.itemsize != end - begin):
                raise ValueError(f"no room for '{name}'")
            found.append((name, Stored(file, entry["dtype"], shape, start + begin, end - begin)))
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SvlError(f"'{file}' is damaged or incomplete: {error}") from error
    return dict(sorted(found, key=lambda pair: pair[1].begin))


def shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """`pieces` in order, divided so that no shard is larger than `limit` bytes (a larger piece has one of its own)."""
    result: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if result[-1] and filled + piece.size > limit:
            result.append([])
            filled = 0
        result[-1].append(piece)
        filled += piece.size
    return result


def write(folder: Path, pieces: Sequence[Piece], limit: int, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write `pieces` as the weights of a checkpoint folder: one file, or shards of `limit` bytes and their index.

    `advance` is told of every number of bytes written.
    """
    parts = shards(pieces, limit)
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names if len(parts) > 1 else [WEIGHTS], parts, strict=True):
        _write_shard(folder / name, part, advance)
    if len(parts) > 1:
        sizes = {"total_parameters": sum(math.prod(p.shape) for p in pieces), "total_size": sum(p.size for p in pieces)}
        where = {piece.name: name for name, part in zip(names, parts, strict=True) for piece in part}
        index = {"metadata": sizes, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, pieces: Sequence[Piece], advance: Callable[[int], None]) -> None:
    # Wider elements first, so that every tensor is aligned; otherwise as they lie at the source, so that neighbours
    # are copied as one range.
    pieces = sorted(pieces, key=lambda p: -DTYPES[p.dtype].itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.size
        entries[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [begin, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with ExitStack() as stack:
        target = stack.enter_context(open(path, "xb", buffering=0))
        opened: dict[Path, Any] = {}
        _write(target, struct.pack("<Q", len(head)) + head)
        for source in _ranges(pieces):
            if isinstance(source, Stored):
                if source.file not in opened:
                    opened[source.file] = stack.enter_context(open(source.file, "rb", buffering=0))
                _copy(opened[source.file], target, source.begin, source.size, advance)
            else:
                left = source.size
                for block in source.source():  # type: ignore[operator]
                    data = block.contiguous().view(-1).view(torch.uint8).numpy()
                    _write(target, data)
                    left -= len(data)
                    advance(len(data))
                    del block, data  # before the next one is computed
                if left:
                    raise RuntimeError(f"{source.name} was computed with {-left} bytes too many")


def _ranges(pieces: Iterable[Piece]) -> Iterator[Stored | Piece]:
    """What to write, one after the other; stored tensors that are neighbours at the source as one range."""
    run: Stored | None = None
    for piece in pieces:
        source = piece.source
        if run and isinstance(source, Stored) and source.file == run.file and source.begin == run.begin + run.size:
            run = Stored(run.file, run.dtype, (), run.begin, run.size + source.size)
            continue
        if run:
            yield run
        run = source if isinstance(source, Stored) else None
        if run is None:
            yield piece
    if run:
        yield run


def _write(target: Any, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[target.write(view) :]


def _copy(source: Any, target: Any, begin: int, size: int, advance: Callable[[int], None]) -> None:
    """Append `size` bytes of one open file, from `begin`, to another; within the kernel where it can do that."""
    kernel = getattr(os, "copy_file_range", None)
    buffer: bytearray | None = None
    while size:
        done = 0
        if kernel:
            try:
                done = kernel(source.fileno(), target.fileno(), min(size, BLOCK), begin)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                    raise
                kernel = None
                continue
        else:
            buffer = buffer or bytearray(BLOCK)
            source.seek(begin)
            done = source.readinto(memoryview(buffer)[: min(size, BLOCK)])
            _write(target, memoryview(buffer)[:done])
        if not done:
            raise SvlError(f"'{source.name}' became shorter while it was read")
        begin, size = begin + done, size - done
        advance(done)
