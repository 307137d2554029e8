"""Write the bundled benchmarks and calibration questions: svl/demo/data/*.parquet, from one seed.

    python scripts/make_demo_data.py

Design decisions:

* Benchmarks use test scenes, calibration uses calibration scenes (`Scene.split`): none was trained on. A third file has
  questions of all kinds on validation scenes: for choosing settings, which must not be done on what is reported.
* One question per scene: rows are independent, which is what their standard errors assume.
* Answers that could be guessed are balanced: yes and no, and the four letters, are equally frequent.
* Rows are shuffled, so that `limit=n` takes a fair sample.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from svl.demo import scenes

Pair = tuple[scenes.Scene, scenes.Question]
OPEN = ("attribute", "count", "compare", "relation1", "relation2", "relation3")
KINDS = ("existence", "choice", *OPEN)
TEXT = datasets.Value("string")
FEATURES = {"image": datasets.Image(), "question_id": TEXT, "kind": TEXT, "prompt": TEXT, "answer": TEXT}
DATA = Path(scenes.__file__).parent / "data"


def take(
    stream: Iterator[tuple[scenes.Scene, list[scenes.Question]]],
    quota: dict[str, int],
    category: Callable[[scenes.Question], str],
) -> list[Pair]:
    """Scenes of the stream with one question each, until every category of question has its quota."""
    left, pairs = dict(quota), []
    while any(left.values()):
        scene, questions = next(stream)
        wanted = next((q for q in questions if left.get(category(q))), None)
        if wanted is not None:
            left[category(wanted)] -= 1
            pairs.append((scene, wanted))
    return pairs


def draw(seed: int) -> dict[str, list[Pair]]:
    """The questions of each file with their scenes, in the order of its rows."""

    def kind(question: scenes.Question) -> str:
        return question.kind

    def answered(question: scenes.Question) -> str:
        guessable = question.kind in ("existence", "choice", "compare")
        return f"{question.kind} {question.answer}" if guessable else question.kind

    test = scenes.stream(seed, "test", dict.fromkeys(KINDS, 1))  # one stream: no scene is in two files
    letters = {f"choice {letter}": 100 for letter in scenes.LETTERS}
    short = {k: 80 for k in OPEN if k != "compare"} | {"compare yes": 40, "compare no": 40}
    balanced = {f"choice {letter}": 10 for letter in scenes.LETTERS} | {k: 40 for k in OPEN if k != "compare"}
    balanced |= {f"{k} {answer}": 20 for k in ("existence", "compare") for answer in ("yes", "no")}
    drawn = {
        "existence": take(test, {"existence yes": 200, "existence no": 200}, answered),
        "choice": take(test, letters, answered),
        "open": take(test, short, answered),
        "validation": take(scenes.stream(seed, "validation", dict.fromkeys(KINDS, 1)), balanced, answered),
        "calibration": take(scenes.stream(seed, "calibration", dict.fromkeys(KINDS, 1)), dict.fromkeys(KINDS, 8), kind),
    }
    for name, pairs in drawn.items():
        random.Random(f"{seed}/{name}").shuffle(pairs)
    return drawn


def png(scene: scenes.Scene) -> bytes:
    """The scene as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(scenes.render(scene)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def table(name: str, pairs: list[Pair]) -> datasets.Dataset:
    """The rows of one file."""
    rows: list[dict[str, Any]] = [
        {
            "image": {"bytes": png(scene), "path": None},
            "question_id": f"{name}-{i:03d}",
            "kind": question.kind,
            "prompt": question.prompt,
            "answer": question.answer,
            "options": list(question.options),
        }
        for i, (scene, question) in enumerate(pairs)
    ]
    features = {**FEATURES, "options": datasets.List(TEXT)} if name == "choice" else dict(FEATURES)
    if name == "calibration":
        del features["question_id"]
    columns = {key: [row[key] for row in rows] for key in features}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


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
