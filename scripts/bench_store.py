"""What svl costs beside its stages: lookups in stores of 100 and of 10,000 artifacts, and a sweep of 200 jobs.

    python scripts/bench_store.py [--entries 100 10000] [--no-sweep] [SETTINGS ...]

The sweep runs twice: first with all there is to compute, then with all of it stored. Of the first, the share of the
wall time that lies outside stages (what the manifests of the store do not account for); of the second, seconds per job.
`SETTINGS` are the sweep's, instead of ten strategies, five selections of tokens and four ratios on the bundled LVLM.
Seconds of the processor are there for machines that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from svl.store.artifacts import Store

SWEEP = (
    "strategy=short_lvlm,bridge,shortgpt,runs,spaced,streamline,angular,replaceme,tail,random",
    "selector=tis,all,visual,text,last",
    "ratio=0.1,0.2,0.3,0.4",
)


def each(work: Callable[[int], object], numbers: range) -> str:
    """Milliseconds of the processor that `work` takes for a number, on average."""
    began = time.process_time()
    for number in numbers:
        work(number)
    return f"{1000 * (time.process_time() - began) / len(numbers):.2f}"


def lookups(entries: int, folder: Path) -> list[str]:
    """A row on a store of so many scores, of 20 kB each, one in a hundred of which is looked up."""
    text, some = "x" * 20_000, range(0, entries, max(1, entries // 100))
    store = Store(folder)
    made = each(
        lambda i: store.make("score", {"i": i}, lambda to: {"n": (to / "samples").write_text(text)}), range(entries)
    )
    time.sleep(2)  # then files count as settled, as they are in a store of yesterday
    found = [each(lambda i: Store(folder).get("score", {"i": i}), some) for _ in range(2)]
    missed = each(lambda i: store.get("score", {"i": -1 - i}), some)
    began = time.process_time()
    listed = len(list(store.entries("score")))
    assert listed == entries, f"{listed} of {entries} are there"
    return [f"{entries:,}", *found, missed, made, f"{time.process_time() - began:.2f}"]


def sweep(folder: Path, settings: list[str]) -> tuple[float, float, int, float]:
    """One `svl -m`: seconds by the clock, of the processor, number of jobs, and seconds of stages that it computed."""
    command = [sys.executable, "-m", "svl", "-m", *settings, f"paths.outputs={folder / 'out'}", "tracker=none"]
    command += [f"paths.store={folder / 'store'}"]
    known = set(folder.glob("store/*/*/manifest.json"))
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    last = max((folder / "out" / "run").iterdir())
    new = [json.loads(file.read_text()) for file in set(folder.glob("store/*/*/manifest.json")) - known]
    stages = sum(manifest["seconds"] for manifest in new if manifest["stage"] != "probe")  # part of plans
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return clock, processor, len(list(last.glob("*/result.json"))), stages


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="*", default=[100, 10_000])
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    print("| artifacts | found, ms | found again | not there | made | all listed, s |\n|---:|---:|---:|---:|---:|---:|")
    for entries in given.entries:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(lookups(entries, Path(folder)))} |", flush=True)
    if given.no_sweep:
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = given.settings or list(SWEEP)
        clock, processor, jobs, stages = sweep(Path(folder), settings)
        outside = clock - stages
        print(
            f"\n{jobs} jobs: {clock:.0f} s by the clock, {processor:.0f} s of the processor; in stages {stages:.0f} s;"
        )
        print(f"outside {outside:.1f} s, {100 * outside / clock:.1f} % (goal: at most 3)")
        clock, processor, jobs, _ = sweep(Path(folder), settings)
        print(f"again, all stored: {clock:.0f} s, {processor:.0f} s of the processor, {processor / jobs:.2f} per job")


if __name__ == "__main__":
    main()
