"""Write questions on training scenes of the bundled LVLMs, for recovery: demo_train.parquet and smol_train.parquet.

    python scripts/make_recovery_data.py --out data/recovery [--questions 4096] [--seed 0]

Scenes of the split `train` (see `Scene.split`): none of them is in a benchmark or a calibration set, whatever the seed.
One question per scene, all kinds equally often, answers as they come.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import datasets
from make_demo_data import KINDS, Pair, table

from svl.demo import scenes, smol


def pairs(stream: Iterator[tuple[scenes.Scene, list[scenes.Question]]], kinds: tuple[str, ...]) -> Iterator[Pair]:
    """Endless scenes with one question each, their kinds in turn."""
    for kind in cycle(kinds):
        yield next((scene, q) for scene, questions in stream for q in questions if q.kind == kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    asked = tuple(smol.ASKED)
    drawn = {
        "demo": pairs(scenes.stream(args.seed, "train", dict.fromkeys(KINDS, 1)), KINDS),
        "smol": pairs(smol.plain_questions(args.seed, "train", dict.fromkeys(asked, 1)), asked),
    }
    for name, found in drawn.items():
        path = args.out / f"{name}_train.parquet"
        table("calibration", list(islice(found, args.questions))).to_parquet(path)
        print(f"{path}: {args.questions} questions, {path.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
