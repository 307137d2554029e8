"""Write the benchmark and calibration questions of smol_lvlm: svl/demo/data/smol_*.parquet, from one seed.

    python scripts/make_smol_data.py

The rules of make_demo_data.py hold: test, validation and calibration scenes were never trained on, one question per
scene, answers that could be guessed are balanced, rows are shuffled.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import datasets
from make_demo_data import DATA, Pair, table, take

from svl.demo import scenes, smol

EACH = 75  # questions of every kind
QUOTA = {kind: EACH for kind in smol.ASKED if kind not in ("existence", "compare", "count", "choice", "describe")}
QUOTA |= {"existence yes": 38, "existence no": 37, "compare yes": 37, "compare no": 38}
QUOTA |= {"count 0": 14, "count 1": 19, "count 2": 19, "count 3": 15, "count 4": 8}
QUOTA |= {"choice A": 19, "choice B": 19, "choice C": 19, "choice D": 18}
VALIDATION = {kind: 30 for kind in smol.ASKED if kind != "describe"}
GUESSABLE = {name.split()[0] for name in QUOTA if " " in name}


def category(question: scenes.Question) -> str:
    """The kind, with the answer where answers are balanced."""
    return f"{question.kind} {question.answer}" if question.kind in GUESSABLE else question.kind


def draw(seed: int) -> dict[str, list[Pair]]:
    """The questions of each file with their scenes, in the order of its rows."""

    def fill(split: str, kinds: dict[str, int], quota: dict[str, int], by: Callable[[scenes.Question], str]):
        return take(smol.plain_questions(seed, split, kinds), quota, by)

    every = dict.fromkeys(smol.ASKED, 1)
    short = fill("test", {k: 1 for k in every if k != "describe"}, QUOTA, category)
    seen = {scene for scene, _ in short}
    fresh = (pair for pair in smol.plain_questions(f"{seed}/describe", "test", {"describe": 1}) if pair[0] not in seen)
    lines = {"describe shapes": EACH - 8, "describe nothing": 8}
    drawn = {
        "smol_short": short,
        "smol_describe": take(fresh, lines, lambda q: f"describe {'nothing' if q.answer == smol.EMPTY else 'shapes'}"),
        "smol_validation": fill("validation", {k: 1 for k in every if k != "describe"}, VALIDATION, lambda q: q.kind),
        "smol_calibration": fill("calibration", every, dict.fromkeys(every, 24), lambda q: q.kind),
    }
    for name, pairs in drawn.items():
        random.Random(f"{seed}/{name}").shuffle(pairs)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    for name, pairs in draw(args.seed).items():
        path = args.out / f"{name}.parquet"
        table(name, pairs).to_parquet(path)
        print(f"{path}: {len(pairs)} questions, {path.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
