"""Time per question of our evaluation and of lmms-eval's own adapter, and what removed layers make of it.

    python scripts/bench_eval.py [--task svl_demo_open] [--limit 60] [--rounds 5] [--batch-size 8]

The model is the bundled LVLM without 4 of its 16 layers, as an exported checkpoint. lmms-eval's adapter `llava_hf` (its
chat version, from the pinned release, which answers one question at a time only) and ours read the same prompts, and
must give the same answers. Ways alternate within each round; ratios are medians over rounds. Then the speed of models
without 25 and 50 % of their layers against the dense ones (svl.evaluation.efficiency), beside the ideal L / (L - n).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch

import svl
from svl.config import PACKAGE
from svl.core import Plan
from svl.demo import bundled
from svl.evaluation import efficiency
from svl.evaluation.evaluate import evaluate
from svl.evaluation.settings import EfficiencySettings, TaskOptions
from svl.models.lvlm import Lvlm
from svl.store.artifacts import Store

MODEL, TASKS = PACKAGE / "demo" / "demo_lvlm", str(PACKAGE / "demo" / "tasks")


def adapter(path: Path) -> Any:
    """lmms-eval's `llava_hf` on a checkpoint, with the clock that `evaluate` reads."""
    if "decord" not in sys.modules:  # imported for videos, by a package that recent Pythons have no wheel of
        sys.modules["decord"] = types.ModuleType("decord")
        sys.modules["decord"].VideoReader = sys.modules["decord"].cpu = None  # type: ignore[attr-defined]
    from lmms_eval.models.chat.llava_hf import LlavaHf

    class Timed(LlavaHf):
        seconds, first_prompt = 0.0, ""

        def clean(self) -> None:
            """Nothing: lmms-eval would drop the model."""

        def device_facts(self) -> dict[str, Any]:
            """Unknown: its speed is taken here."""
            return {}

        def generate_until(self, requests: list[Any]) -> list[str]:
            super().generate_until(requests[:2])  # kernels and caches warm up, as in ours
            began = time.perf_counter()
            answers = super().generate_until(requests)
            self.seconds = time.perf_counter() - began
            return answers

    return Timed(pretrained=str(path), device="cpu", device_map="cpu", dtype="float32", batch_size=1)


def asked(model: Any, given: argparse.Namespace, batch_size: int) -> tuple[float, list[str]]:
    """Seconds per question, and the answers."""
    with tempfile.TemporaryDirectory() as folder:
        options = TaskOptions(
            "accuracy", limit=given.limit, max_new_tokens=16, batch_size=batch_size, include_path=TASKS
        )
        scores = evaluate(model, given.task, options, Path(folder))
        rows = map(json.loads, (Path(folder) / "samples.jsonl").read_text().splitlines())
        return scores["seconds"] / scores["n"], [row["prediction"].strip() for row in rows]


def compare(given: argparse.Namespace) -> None:
    """Ours against theirs."""
    dense = svl.load(MODEL, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = svl.save(MODEL, Plan(len(dense.layers), (4, 6, 9, 14)), Path(folder) / "pruned")
        theirs, ours = adapter(path), svl.load(path, device="cpu")
        ways = {
            "lmms-eval llava_hf, batch 1": (theirs, 1),
            "svl, batch 1": (ours, 1),
            f"svl, batch {given.batch_size}": (ours, given.batch_size),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(given.rounds):
            answers = {}
            for name in ways if i % 2 else reversed(ways):
                model, batch_size = ways[name]
                seconds, answers[name] = asked(model, given, batch_size)
                times[name].append(seconds)
            first, *others = answers.values()
            if any(other != first for other in others):
                sys.exit("the answers differ")
        threads = torch.get_num_threads()
        print(f"{given.task}, {len(first)} questions, the same answers; {given.rounds} rounds, {threads} threads\n")
        print("| | ms per question | of lmms-eval's time |\n|---|---:|---:|")
        base = next(iter(times.values()))
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
            print(f"| {name} | {1000 * statistics.median(seconds):.1f} | × {ratio:.2f} |")


def speed(dense: Lvlm, repeats: int) -> None:
    """Pruned models against the dense one."""
    n = len(dense.layers)
    example = svl.read_samples(PACKAGE / "demo" / "data" / "calibration.parquet").samples[0]
    for share in (0.25, 0.5):
        gone = tuple(range(n - 1 - int(share * n), n - 1))
        pruned = svl.apply(dense, Plan(n, gone))
        settings = EfficiencySettings(batch_size=8, new_tokens=16, warmup=2, repeats=repeats)
        found = efficiency.measure_efficiency(dense, pruned, example, settings)
        up, ideal = found["speedup"], found["ideal"]
        cells = [f"× {up[p]['value']:.2f} ({up[p]['low']:.2f} to {up[p]['high']:.2f})" for p in ("prefill", "decode")]
        cells += [f"× {ideal:.2f}", *(f"{up[part]['value'] / ideal:.2f}" for part in ("prefill", "decode"))]
        print(f"| {dense.name} | {100 * share:.0f} % | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="svl_demo_open")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=["demo_lvlm", "smol_lvlm"], help="whose speed is measured")
    parser.add_argument("--store", default="outputs/store", help="where smol_lvlm is assembled")
    given = parser.parse_args()
    logging.getLogger("lmms_eval").setLevel(logging.ERROR)
    compare(given)
    print("\n| model | removed | prefill | decode | ideal | prefill / ideal | decode / ideal |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in given.models:
        path = MODEL if name == "demo_lvlm" else bundled.resolve_bundled(f"svl:{name}", Store(given.store))
        speed(svl.load(path, device="cpu", name=name), given.repeats)


if __name__ == "__main__":
    main()
