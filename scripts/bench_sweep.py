"""Time of a sweep over 12 plans of one model: evaluated together, one by one on a shared store, and as separate runs.

    python scripts/bench_sweep.py [--limit N] [--batch-size N] [--removed 2 3 4 5] [--rounds 1] [model=demo_lvlm ...]

Three strategies that differ (`tail`, `shortgpt`, `streamline`) at four numbers of removed layers; the plans must all be
different. Every way starts from nothing and runs the `svl` command; its answers are compared file by file. Prints
seconds by the clock and of the processor (which other programs on the machine disturb less), each with its ratio to
`together`. Further arguments are settings of the runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STRATEGIES = ("tail", "shortgpt", "streamline")


def svl(folder: Path, *settings: str) -> None:
    """One command."""
    command = [sys.executable, "-m", "svl", *settings, f"paths.outputs={folder / 'out'}", "tracker=none"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def separate(folder: Path, common: list[str], removed: list[int]) -> None:
    """As many commands as plans, each with a store of its own."""
    for strategy, n in itertools.product(STRATEGIES, removed):
        own = [f"strategy={strategy}", f"n_remove={n}", f"paths.store={folder / 'stores' / f'{strategy}-{n}'}"]
        svl(folder, *own, *common)


def sweep(folder: Path, common: list[str], removed: list[int], together: int = 1) -> None:
    """One command."""
    numbers = ",".join(map(str, removed))
    store = f"paths.store={folder / 'stores' / 'one'}"
    svl(folder, "-m", f"strategy={','.join(STRATEGIES)}", f"n_remove={numbers}", store, f"together={together}", *common)


def answers(folder: Path) -> dict[str, str]:
    """By task and removed layers."""
    found = {}
    for manifest in folder.glob("stores/*/score/*/manifest.json"):
        inputs = json.loads(manifest.read_text())["inputs"]
        found[f"{inputs['task']} {inputs['removed']}"] = (manifest.parent / "samples.jsonl").read_text()
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--removed", type=int, nargs=4, default=[2, 3, 4, 5])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    common = [f"benchmark.batch_size={given.batch_size}", *given.settings]
    common += [f"benchmark.limit={given.limit}"] if given.limit else []
    ways = {
        "together": lambda f: sweep(f, common, given.removed, together=13),
        "shared store": lambda f: sweep(f, common, given.removed),
        "separate runs": lambda f: separate(f, common, given.removed),
    }
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        said = {}
        for name, run in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                run(Path(folder))
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                clock[name].append(time.perf_counter() - began)
                processor[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
                said[name] = answers(Path(folder))
        if any(said[name] != said["together"] for name in ways):
            sys.exit("the ways do not give the same answers")
    plans = {text.split(" ", 1)[1] for text in said["together"]} - {"[]"}
    if len(plans) < 12:
        sys.exit(f"only {len(plans)} plans are different: choose other numbers of removed layers")
    print(f"{len(plans)} plans and the dense model, the same answers in {len(said['together'])} files")
    print("| | seconds | to together | processor seconds | to together |\n|---|---:|---:|---:|---:|")
    for name in ways:
        cells = []
        for times in (clock, processor):
            ratio = statistics.median(a / b for a, b in zip(times[name], times["together"], strict=True))
            cells += [f"{statistics.median(times[name]):.0f}", f"× {ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
