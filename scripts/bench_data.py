"""Drawing 64 calibration samples of a large file: svl beside reading the whole file with pandas.

    python scripts/bench_data.py [--rows 1000000] [--samples 64] [--bytes 1500]

Writes, into a temporary folder, the same rows (a picture of `--bytes` bytes, a question, an answer) as parquet, and
without pictures as JSON lines and as one JSON array. Each case runs in a process of its own: seconds, and the peak of
its memory above what it had after its imports.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from tabulate import tabulate

from svl.data.sample_files import read_samples

GROUP = 1000  # rows of a row group, as `datasets` writes pictures


def png_of(size: int, seed: int) -> bytes:
    """A small picture with noise behind it, so many bytes long."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())).save(file, "png")
    return file.getvalue().ljust(size, b"\0")


def write_files(folder: Path, rows: int, size: int) -> dict[str, Path]:
    """The files, by kind."""
    schema = pyarrow.schema({"image": pyarrow.binary(), "prompt": pyarrow.string(), "answer": pyarrow.string()})
    pictures = [png_of(size, seed) for seed in range(GROUP)]
    files = {"parquet": folder / "x.parquet", "lines": folder / "x.jsonl", "array": folder / "x.json"}
    with (
        pyarrow.parquet.ParquetWriter(files["parquet"], schema, compression="none", use_dictionary=False) as parquet,
        files["lines"].open("w") as lines,
        files["array"].open("w") as array,
    ):
        array.write("[\n")
        for begin in range(0, rows, GROUP):
            numbers = range(begin, min(begin + GROUP, rows))
            texts = [{"image": None, "prompt": f"What is in picture {i}?", "answer": f"thing {i}"} for i in numbers]
            columns = {name: [text[name] for text in texts] for name in ("prompt", "answer")}
            parquet.write_table(pyarrow.table({"image": pictures[: len(texts)], **columns}, schema=schema))
            written = [json.dumps(text) for text in texts]
            lines.write("\n".join(written) + "\n")
            array.write((",\n" if begin else "") + ",\n".join(written))
        array.write("\n]\n")
    return files


def measured(work: Callable[[], int]) -> tuple[float, float]:
    """Seconds and peak MB of `work`, in a process of its own."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[float, float]] = context.Queue()

    def run() -> None:
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        results.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = context.Process(target=run)
    process.start()
    found = results.get()
    process.join()
    return found


def main() -> None:
    """Write the files, read them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=1500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name), arguments.rows, arguments.bytes)
        rows = []
        for kind, file in files.items():

            def ours(file: Path = file) -> int:
                return len(read_samples(file, arguments.samples))

            def whole(file: Path = file, kind: str = kind) -> int:
                import pandas

                if kind == "parquet":
                    return len(pandas.read_parquet(file).sample(arguments.samples, random_state=0))
                return len(pandas.read_json(file, lines=kind == "lines").sample(arguments.samples, random_state=0))

            own, other = measured(ours), measured(whole)
            size = f"{file.stat().st_size / 1e9:.2f} GB"
            rows.append([file.name, size, f"{own[0]:.1f}", f"{own[1]:.0f}", f"{other[0]:.1f}", f"{other[1]:.0f}"])
    heads = ["file", "size", "svl, s", "svl, MB", "pandas, s", "pandas, MB"]
    print(f"{arguments.samples} of {arguments.rows:,} rows\n")
    print(tabulate(rows, heads, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
