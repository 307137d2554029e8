"""Time to answer a batch with 12 plans of one model: in lock-step, with a shared prompt, and one model after the other.

    python scripts/bench_lock_step.py [--model demo_lvlm] [--device cpu] [--batch-size 8] [--tokens 1 16 64]

Random plans without 2 to 5 layers, no patches. Answers have exactly so many tokens; on the CPU, those of the three
ways must be the same. Ways alternate within each round; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import svl
from svl.config import PACKAGE
from svl.core import Plan
from svl.demo import bundled
from svl.evaluation.lock_step import LockStep
from svl.evaluation.shared_prefill import SharedPrefill
from svl.models.lvlm import Lvlm
from svl.store.artifacts import Store

PLANS = 12


def random_plans(lvlm: Lvlm) -> list[Plan]:
    """Different plans without 2 to 5 of the removable layers."""
    chance, n = random.Random(0), lvlm.anatomy.n_layers
    found: dict[tuple[int, ...], None] = {}
    while len(found) < PLANS:
        found[tuple(sorted(chance.sample(lvlm.anatomy.removable, 2 + len(found) % 4)))] = None
    return [Plan(n, removed) for removed in found]


def batch(lvlm: Lvlm, size: int) -> dict[str, Any]:
    """Questions of the bundled calibration data."""
    samples = svl.read_samples(PACKAGE / "demo" / "data" / "calibration.parquet").samples[:size]
    return lvlm.encode([lvlm.prompt(s.prompt, images=1) for s in samples], [s.pictures for s in samples])


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Of one call, and what it gives: of the processor, which other programs disturb less, or by the clock."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    found = work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - began, found


def agreement(tokens: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Which share of answers is the same."""
    same = [(a == b).all(1) for a, b in zip(tokens, expected, strict=True)]
    return float(torch.cat(same).float().mean())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo_lvlm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", default="outputs/store", help="where smol_lvlm is assembled")
    given = parser.parse_args()
    demo = PACKAGE / "demo" / "demo_lvlm"
    path = demo if given.model == "demo_lvlm" else bundled.resolve_bundled(f"svl:{given.model}", Store(given.store))
    dense = svl.load(path, device=given.device, name=given.model)
    plans = random_plans(dense)
    models = [svl.apply(dense, plan) for plan in plans]
    inputs = batch(dense, given.batch_size)
    lock_step, shared = LockStep(dense, models, plans), SharedPrefill(models)
    print(f"{given.model}, {PLANS} plans, {given.batch_size} rows of {inputs['input_ids'].shape[1]} tokens")
    print("\n| tokens | one by one, s | shared prompt | lock-step | over shared prompt | same answers |")
    print("|---:|---:|---:|---:|---:|---:|")
    for n in given.tokens:
        settings = copy.deepcopy(dense.model.generation_config)
        settings.update(do_sample=False, max_new_tokens=n, min_new_tokens=n, max_length=None, pad_token_id=0)
        ways: dict[str, Callable[[], Any]] = {
            "alone": lambda s=settings: [m.model.generate(**inputs, generation_config=s) for m in models],  # type: ignore
            "shared": lambda s=settings: shared.generate(inputs, s),  # type: ignore
            "lock-step": lambda s=settings: lock_step.generate(inputs, s),  # type: ignore
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(given.rounds + 1):
            answers = {}
            for name in ways if i % 2 else reversed(ways):
                taken, answers[name] = seconds(ways[name], dense.device)
                if i:  # the first round warms up
                    times[name].append(taken)
            agreed = [agreement(tokens, answers["alone"]) for tokens in answers.values()]
            if dense.device.type == "cpu" and min(agreed) < 1:
                sys.exit("the answers differ")
        ratio = {
            (a, b): statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
            for a, b in (("alone", "shared"), ("alone", "lock-step"), ("shared", "lock-step"))
        }
        cells = [f"{statistics.median(times['alone']):.2f}", *(f"× {r:.2f}" for r in ratio.values())]
        cells.append(f"{100 * min(agreed):.0f} %")
        print(f"| {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
