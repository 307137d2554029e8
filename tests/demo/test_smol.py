"""The world of smol_lvlm: its questions have the answers that a reader of the image would give, its data are disjoint
from training and from each other, and answers are scored as they should be."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from itertools import pairwise

import pyarrow.parquet
import pytest
from helpers.paths import ROOT

from svl.demo import scenes, smol
from svl.demo.tasks import utils

FILES = ("smol_short", "smol_describe", "smol_validation", "smol_calibration")
PLACES = {f"{row} {column}": (x, y) for y, row in enumerate(smol.ROWS) for x, column in enumerate(smol.COLUMNS)}
WAYS = {phrase: scenes.DIRECTIONS[way] for way, phrase in smol.BESIDE.items()}
ATTRIBUTES = {"color": set(scenes.COLORS), "shape": set(scenes.SHAPES), "size": set(scenes.SIZES)}


# ------------------------------------------------------- a reader of questions, written apart from what asks them


def fits(thing: scenes.Thing, phrase: str) -> bool:
    """Whether "large red circles in the top row", "shape in the bottom left", ... is said of `thing`."""
    words, _, where = phrase.partition(" in the ")
    if where in PLACES and (thing.x, thing.y) != PLACES[where]:
        return False
    if where and where not in PLACES:
        name, line = where.split()
        lines = {"row": smol.ROWS[thing.y], "column": smol.COLUMNS[thing.x]}
        if lines[line] != name:
            return False
    own = {thing.color, thing.shape, thing.size, "shape"}
    return all(w in own or w.removesuffix("s") in own or w.removesuffix("es") in own for w in words.split())


def only(things: list[scenes.Thing]) -> scenes.Thing:
    (thing,) = things  # references must be unambiguous
    return thing


def referred(scene: scenes.Scene, phrase: str) -> scenes.Thing:
    """The shape that "the shape above the shape left of the red circle" means."""
    for words, (dx, dy) in WAYS.items():
        if phrase.startswith(f"the shape {words} "):
            start = referred(scene, phrase.removeprefix(f"the shape {words} "))
            x, y = start.x + dx, start.y + dy
            while 0 <= x < 3 and 0 <= y < 3:
                if found := [t for t in scene.things if (t.x, t.y) == (x, y)]:
                    return only(found)
                x, y = x + dx, y + dy
            raise AssertionError(f"nothing is {words} {start}")
    return only([t for t in scene.things if fits(t, phrase.removeprefix("the "))])


def read(scene: scenes.Scene, question: scenes.Question) -> str:
    """The answer, from the question's words alone."""
    text, _, options = question.prompt.partition("\n")
    if match := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if any(fits(t, match[1]) for t in scene.things) else "no"
    if match := re.fullmatch(r"How many (.+) are there\?", text):
        return str(sum(fits(t, match[1]) for t in scene.things))
    if match := re.fullmatch(r"Are there more (.+) than (.+)\?", text):
        first, second = (sum(fits(t, phrase) for t in scene.things) for phrase in match.groups())
        return "yes" if first > second else "no"
    if match := re.fullmatch(r"What (color|shape|size) is (.+)\?", text):
        value = getattr(referred(scene, match[2]), match[1])
        return next(o[0] for o in options.split("\n") if o[3:] == value) if options else value
    lettered = dict(line.split(". ") for line in options.split("\n")) if options else {}
    if match := re.fullmatch(r"What is option (.)\?", text):
        return lettered[match[1]]
    if match := re.fullmatch(r"Which option is (.+)\?", text):
        return next(letter for letter, value in lettered.items() if value == match[1])
    order = sorted(scene.things, key=lambda t: 3 * t.y + t.x)
    if match := re.fullmatch(r"Describe the (.+)\.", text):
        return ", ".join(f"{t.size} {t.color} {t.shape}" for t in order if fits(t, f" in the {match[1]}")) or "nothing"
    if match := re.fullmatch(r"What is in the (.+)\?", text):
        return "".join(f"{t.size} {t.color} {t.shape}" for t in order if (t.x, t.y) == PLACES[match[1]]) or "nothing"
    if match := re.fullmatch(r"Where is (.+)\?", text):
        thing = referred(scene, match[1])
        return next(name for name, cell in PLACES.items() if cell == (thing.x, thing.y))
    assert text == "List all shapes."
    names = {cell: name for name, cell in PLACES.items()}
    return "; ".join(f"{names[t.x, t.y]}: {t.size} {t.color} {t.shape}" for t in order)


@pytest.mark.parametrize("kind", smol.KINDS)
def test_answers_follow_from_the_scene(kind):
    asked = [
        (scene, question)
        for _, (scene, questions) in zip(range(300), smol.plain_questions(1, "train", {kind: 2}), strict=False)
        for question in questions
    ]
    assert len(asked) >= 250
    for scene, question in asked:
        assert question.kind == kind
        assert read(scene, question) == question.answer, question.prompt


def test_two_steps_are_not_one():
    """Second steps are asked from where the first ends: often not where the two displacements lead from the start."""
    for _, (_, questions) in zip(range(50), smol.plain_questions(2, "train", {"relation2": 2}), strict=False):
        for question in questions:
            ways = re.findall("|".join(WAYS), question.text)
            assert len(ways) == 2
            assert all(tuple(-d for d in WAYS[a]) != WAYS[b] for a, b in pairwise(ways))


def test_guessing_does_not_pay():
    """Over many scenes no answer of a yes-or-no or lettered question is much more frequent than the others."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("existence", "compare", "choice")}
    for _, (_, questions) in zip(range(1000), smol.plain_questions(3, "train", dict.fromkeys(counts, 1)), strict=False):
        for question in questions:
            counts[question.kind][question.answer] += 1
    for kind, share in {"existence": 1 / 2, "compare": 1 / 2, "choice": 1 / 4}.items():
        assert max(counts[kind].values()) < (share + 0.06) * counts[kind].total()


def test_scenes_are_small_and_drawn_at_their_size():
    for _, (scene, _) in zip(range(50), smol.plain_questions(0, "train", {}), strict=False):
        assert scene.split == "train"
        assert smol.COUNT[0] <= len(scene.things) <= smol.COUNT[1]
        image = scenes.render(scene)
        assert image.shape == (48, 48, 3)
        labels = scenes.patch_labels(scene, 8)
        assert labels.shape == (6, 6, 3)
        taken = {(t.y, t.x) for t in scene.things}
        assert {(y // 2, x // 2) for y, x in zip(*labels[..., 0].nonzero(), strict=True)} == taken


# ------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict]]:
    return {n: pyarrow.parquet.read_table(ROOT / "svl" / "demo" / "data" / f"{n}.parquet").to_pylist() for n in FILES}


def test_data_are_what_the_script_makes(data, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    make, demo = (importlib.import_module(f"make_{name}_data") for name in ("smol", "demo"))
    for name, pairs in make.draw(0).items():
        split = name.removeprefix("smol_")
        assert {scene.split for scene, _ in pairs} == {split if split in ("calibration", "validation") else "test"}
        assert make.table(name, pairs).data.column("prompt").to_pylist() == [row["prompt"] for row in data[name]]
        assert [demo.png(scene) for scene, _ in pairs] == [row["image"]["bytes"] for row in data[name]]
        assert [read(*pair) for pair in pairs] == [row["answer"] for row in data[name]]


def test_no_scene_is_shared(data):
    images = [row["image"]["bytes"] for rows in data.values() for row in rows]
    assert len(set(images)) == len(images)


def test_kinds_and_answers_are_balanced(data):
    held_out = data["smol_short"] + data["smol_describe"]
    assert Counter(row["kind"] for row in held_out) == dict.fromkeys(smol.ASKED, 75)
    assert Counter(row["kind"] for row in data["smol_calibration"]) == dict.fromkeys(smol.ASKED, 24)
    assert set(Counter(row["kind"] for row in data["smol_validation"]).values()) == {30}
    for kind, most in {"existence": 38, "compare": 38, "choice": 19, "count": 19}.items():
        assert max(Counter(row["answer"] for row in held_out if row["kind"] == kind).values()) == most


# ---------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("kind", "answer", "right", "wrong"),
    [
        ("existence", "yes", ["yes", "Yes, there is."], ["no", "", "yesterday", "a red one"]),
        ("compare", "no", ["no", "No."], ["yes", "none"]),
        ("choice", "B", ["B", "b", "B. red", "(B)", "red"], ["A", "blue", "", "Both"]),
        ("count", "2", ["2", " 2."], ["3", "22", "two", ""]),
        ("relation2", "red", ["red", "Red.", "red circle"], ["circle red", "blue", ""]),
    ],
)
def test_short_answers_by_hand(kind, answer, right, wrong):
    doc = {"kind": kind, "answer": answer, "prompt": "What color is it?\nA. blue\nB. red"}
    for text in right + wrong:
        items = utils.read_answer(doc, [text])
        assert items.keys() >= {"accuracy", f"accuracy_{kind}", "off_format"}
        assert {items[name]["score"] for name in ("accuracy", f"accuracy_{kind}")} == {float(text in right)}, text


def test_descriptions_match_as_a_whole():
    doc = {"kind": "describe", "answer": "small red circle, large blue cross"}
    said = ["Small red circle, large blue cross.", "large blue cross, small red circle", "small red circle", "nothing"]
    assert [utils.description(doc, [text])["accuracy"]["score"] for text in said] == [1, 0, 0, 0]
