"""Writing the weights of a checkpoint folder: byte ranges of other files, and tensors that are computed on the way.

A tensor that does not change is a range of bytes, and stays one: it goes from file to file without entering this
process.
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
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svl.checkpoints import safetensors_files
from svl.checkpoints.safetensors_files import DTYPES, StoredTensor, read_header
from svl.core.errors import SvlError
from svl.models.weight_files import INDEX, WEIGHTS

Blocks = Callable[[], Iterable[Tensor]]  # a tensor as blocks, one after the other, computed when its turn comes


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: the bytes of a stored one, or blocks that are computed when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor | Blocks

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def split_into_shards(tensors: Sequence[NewTensor], limit: int) -> list[list[NewTensor]]:
    """`tensors` in order, divided into shards of at most `limit` bytes (a larger tensor has one of its own)."""
    result: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if result[-1] and filled + tensor.size > limit:
            result.append([])
            filled = 0
        result[-1].append(tensor)
        filled += tensor.size
    return result


def write_weights(folder: Path, tensors: Sequence[NewTensor], limit: int) -> None:
    """Write the weights of a checkpoint folder: one file, or shards of `limit` bytes and their index.

    Every file is read back by the safetensors library.

    Raises:
        SvlError: if names occur twice, or a source becomes shorter on the way.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise SvlError(f"the tensor '{next(name for name in names if names.count(name) > 1)}' would be written twice")
    shards = split_into_shards(tensors, limit)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS]
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, shard)
        _check_written(folder / file, shard)
    if len(shards) > 1:
        parameters, size = sum(math.prod(t.shape) for t in tensors), sum(t.size for t in tensors)
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _check_written(file: Path, tensors: Sequence[NewTensor]) -> None:
    """Raise RuntimeError unless a file, read back by the safetensors library, has these tensors."""
    found = {name: (stored.dtype, stored.shape) for name, stored in read_header(file).items()}
    if found != {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors}:
        raise RuntimeError(f"'{file}' does not hold what was written to it")


def _write_shard(path: Path, tensors: Sequence[NewTensor]) -> None:
    # Wider elements first, so that every tensor is aligned; otherwise as they lie at the source, so that neighbours
    # are copied as one range.
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with ExitStack() as stack:
        target = stack.enter_context(open(path, "xb", buffering=0))
        opened: dict[Path, RawIOBase] = {}
        write_all(target, struct.pack("<Q", len(header)) + header)
        for source in byte_ranges(tensors):
            if isinstance(source, NewTensor):
                _write_computed(target, source)
                continue
            if source.file not in opened:
                opened[source.file] = stack.enter_context(open(source.file, "rb", buffering=0))
            copy_bytes(opened[source.file], target, source.begin, source.size)


def byte_ranges(tensors: Iterable[NewTensor]) -> Iterator[StoredTensor | NewTensor]:
    """What to write, one after the other; stored tensors that are neighbours at the source as one range."""
    run: StoredTensor | None = None
    for tensor in tensors:
        source = tensor.source
        if not isinstance(source, StoredTensor):
            if run:
                yield run
            run = None
            yield tensor
        elif run and source.file == run.file and source.begin == run.begin + run.size:
            run = StoredTensor(run.file, run.dtype, (), run.begin, run.size + source.size)
        else:
            if run:
                yield run
            run = source
    if run:
        yield run


def _write_computed(target: RawIOBase, tensor: NewTensor) -> None:
    """Append a tensor's blocks, each computed when the last one is written and gone."""
    written = 0
    for block in tensor.source():  # type: ignore[operator]
        data = block.contiguous().view(-1).view(torch.uint8).numpy()
        write_all(target, data)
        written += len(data)
        del block, data
    if written != tensor.size:
        raise RuntimeError(f"what was computed of {tensor.name} has {written} bytes, not {tensor.size}")


def write_all(target: RawIOBase, data: Any) -> None:
    """Write all of a buffer, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[target.write(view) or 0 :]


def copy_bytes(source: RawIOBase, target: RawIOBase, begin: int, size: int) -> None:
    """Append `size` bytes of one open file, from `begin`, to another; within the kernel where it can do that.

    Raises:
        SvlError: if the source ends before.
    """
    kernel = getattr(os, "copy_file_range", None)
    buffer = bytearray()
    while size:
        block = min(size, safetensors_files.BLOCK)
        if kernel:
            try:
                done = kernel(source.fileno(), target.fileno(), block, begin)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                    raise
                kernel = None
                continue
        else:
            buffer = buffer or bytearray(safetensors_files.BLOCK)
            source.seek(begin)
            done = source.readinto(memoryview(buffer)[:block]) or 0
            write_all(target, memoryview(buffer)[:done])
        if not done:
            raise SvlError(f"'{getattr(source, 'name', '')}' became shorter while it was read")
        begin, size = begin + done, size - done
