"""Questions in plain English about scenes of 3 x 3 cells: the world of `smol_lvlm`.

Scenes, their drawing and their splits are those of `svl.demo.scenes`; what is asked is harder, since the decoder is a
pretrained language model: groups named by up to two attributes and a place, counts and comparisons of such groups,
relations of one and two steps in nested clauses, lettered options, and descriptions of a row or a column in a
canonical form, so that they can be scored by exact match.

*Relations skip empty cells*: "left of" is the nearest shape to the left in the same row, however far; two steps can
therefore not be answered by adding up displacements.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from svl.demo.scenes import COLORS, DIRECTIONS, LETTERS, OPPOSITE, SHAPES, SIZES, Question, Scene, Thing, draw_scene

GRID = 3
COUNT = (3, 6)  # shapes of a scene, at least and at most
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BESIDE = {"right": "right of", "left": "left of", "up": "above", "down": "below"}
EMPTY = "nothing"
Group = tuple[str, str, Callable[[Thing], bool]]  # singular, plural, test


def draw(rng: random.Random, split: str) -> Scene:
    """A random scene of `split`."""
    return draw_scene(rng, split, GRID, COUNT)


def label(thing: Thing) -> str:
    """ "small red circle"."""
    return f"{thing.size} {thing.name}"


def _place(x: int, y: int) -> str:
    return f"{ROWS[y]} {COLUMNS[x]}"


def _line(rng: random.Random) -> tuple[str, Callable[[Thing], bool]]:
    """A random row or column: "top row", "left column"."""
    i = rng.randrange(GRID)
    if rng.random() < 0.5:
        return f"{ROWS[i]} row", lambda t: t.y == i
    return f"{COLUMNS[i]} column", lambda t: t.x == i


def _plural(phrase: str) -> str:
    return phrase + ("es" if phrase.endswith("cross") else "s")


def _group(scene: Scene, rng: random.Random) -> Group:
    """Shapes named by one or two attributes, taken from the scene three times out of four, sometimes with a place."""
    model = rng.choice(scene.things)
    if rng.random() < 0.25:
        model = Thing(rng.choice(tuple(COLORS)), rng.choice(SHAPES), rng.choice(tuple(SIZES)), 0, 0)
    used = set(rng.choice((("color",), ("shape",), ("size",), ("size", "color"), ("size", "shape"))))
    words = " ".join(getattr(model, a) for a in ("size", "color") if a in used)
    noun = model.shape if "shape" in used else "shape"
    one = f"{words} {noun}".strip()
    many = _plural(one)
    if rng.random() < 0.25:
        line, within = _line(rng)
        where = f" in the {line}"
    else:
        where, within = "", lambda t: True
    return one + where, many + where, lambda t: within(t) and all(getattr(t, a) == getattr(model, a) for a in used)


def _existence(scene: Scene, rng: random.Random) -> Question:
    """Half present. The absent ones are mostly attributes that are all there, but not together, or not there."""
    wanted = rng.random() < 0.5
    while True:
        if rng.random() < 0.3:
            one, _, test = _group(scene, rng)
        else:
            a, b, c = (rng.choice(scene.things) for _ in range(3))
            size = a.size if rng.random() < 0.4 else ""
            one = f"{size} {b.color} {c.shape}".strip()
            test = _same(size, b.color, c.shape)
        if any(map(test, scene.things)) == wanted:
            article = "an" if one[0] in "aeiou" else "a"
            return Question("existence", f"Is there {article} {one}?", "yes" if wanted else "no")


def _same(size: str, color: str, shape: str) -> Callable[[Thing], bool]:
    return lambda t: t.color == color and t.shape == shape and size in ("", t.size)


def _attribute(scene: Scene, rng: random.Random) -> Question | None:
    """Colour, shape or size of a shape named by its other attributes or by its place."""
    thing, asked = rng.choice(scene.things), rng.choice(("color", "shape", "size"))
    if rng.random() < 0.35:
        return _what("attribute", thing, asked, f"the shape in the {_place(thing.x, thing.y)}")
    if asked == "size":
        return _what("attribute", thing, asked, f"the {thing.name}")
    known = "shape" if asked == "color" else "color"
    noun = thing.shape if asked == "color" else f"{thing.color} shape"
    alike = [t for t in scene.things if getattr(t, known) == getattr(thing, known)]
    if len(alike) == 1:
        return _what("attribute", thing, asked, f"the {noun}")
    if sum(t.size == thing.size for t in alike) == 1:
        return _what("attribute", thing, asked, f"the {thing.size} {noun}")
    return None


def _what(kind: str, thing: Thing, asked: str, reference: str) -> Question:
    return Question(kind, f"What {asked} is {reference}?", getattr(thing, asked))


def _count(scene: Scene, rng: random.Random) -> Question | None:
    _, many, test = _group(scene, rng)
    number = sum(map(test, scene.things))
    if rng.random() < (0.6 if number == 0 else 0.5 if number == 1 else 0):  # small numbers would be most answers
        return None
    return Question("count", f"How many {many} are there?", str(number))


def _compare(scene: Scene, rng: random.Random) -> Question | None:
    """Two groups named alike: where one is broader than the other, the words alone give the answer away."""
    asked = rng.choice(("color", "shape", "size"))
    values = tuple({"color": COLORS, "shape": SHAPES, "size": SIZES}[asked])
    a, b = (getattr(rng.choice(scene.things), asked) if rng.random() < 0.75 else rng.choice(values) for _ in range(2))
    held = [getattr(thing, asked) for thing in scene.things]
    more = held.count(a) > held.count(b)
    if a == b or (not more and rng.random() < 0.4):
        return None
    first, second = (_plural(v) if asked == "shape" else f"{v} shapes" for v in (a, b))
    return Question("compare", f"Are there more {first} than {second}?", "yes" if more else "no")


def _relation(steps: int) -> Callable[[Scene, random.Random], Question | None]:
    def ask(scene: Scene, rng: random.Random) -> Question | None:
        start = thing = rng.choice(scene.things)
        path: list[str] = []
        for _ in range(steps):
            reached = {d: t for d in DIRECTIONS if (t := scene.step(thing, d))}
            ways = [d for d in reached if not path or d != OPPOSITE[path[-1]]]  # never straight back
            if not ways:
                return None
            path.append(rng.choice(ways))
            thing = reached[path[-1]]
        reference = f"the {start.name}"
        for direction in path:
            reference = f"the shape {BESIDE[direction]} {reference}"
        return _what(f"relation{steps}", thing, rng.choice(("color", "shape")), reference)

    return ask


def _choice(scene: Scene, rng: random.Random) -> Question | None:
    """Four lettered options for an attribute or one-step relation question."""
    base = _attribute(scene, rng) if rng.random() < 0.6 else _relation(1)(scene, rng)
    if base is None or base.answer in SIZES:
        return None
    pool = list(COLORS) if base.answer in COLORS else list(SHAPES)
    options = [base.answer, *rng.sample([o for o in pool if o != base.answer], 3)]
    rng.shuffle(options)
    return Question("choice", base.text, LETTERS[options.index(base.answer)], tuple(options))


def _letter(scene: Scene, rng: random.Random) -> Question:
    """What a lettered option says, or which letter says it: read off the question, whatever the image."""
    options = tuple(rng.sample(list(rng.choice((COLORS, SHAPES))), 4))
    i = rng.randrange(4)
    if rng.random() < 0.3:
        return Question("letter", f"What is option {LETTERS[i]}?", options[i], options)
    return Question("letter", f"Which option is {options[i]}?", LETTERS[i], options)


def _describe(scene: Scene, rng: random.Random) -> Question:
    """The shapes of a row or column in reading order, or "nothing"."""
    line, within = _line(rng)
    shown = sorted(filter(within, scene.things), key=lambda t: (t.y, t.x))
    return Question("describe", f"Describe the {line}.", ", ".join(map(label, shown)) or EMPTY)


def _cell(scene: Scene, rng: random.Random) -> Question:
    """What a cell holds; two thirds of the time something."""
    taken = {(t.x, t.y): label(t) for t in scene.things}
    free = [(x, y) for x in range(GRID) for y in range(GRID) if (x, y) not in taken]
    x, y = rng.choice(list(taken) if rng.random() < 0.67 else free)
    return Question("cell", f"What is in the {_place(x, y)}?", taken.get((x, y), EMPTY))


def _where(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    return Question("place", f"Where is the {thing.name}?", _place(thing.x, thing.y))


def _list(scene: Scene, rng: random.Random) -> Question:
    order = sorted(scene.things, key=lambda t: (t.y, t.x))
    return Question("list", "List all shapes.", "; ".join(f"{_place(t.x, t.y)}: {label(t)}" for t in order))


# What is asked of the trained model, and what is asked in training besides.
ASKED: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "existence": _existence,
    "attribute": _attribute,
    "count": _count,
    "compare": _compare,
    "relation1": _relation(1),
    "relation2": _relation(2),
    "choice": _choice,
    "describe": _describe,
}
KINDS = ASKED | {"cell": _cell, "place": _where, "list": _list, "letter": _letter}


def plain_question(scene: Scene, rng: random.Random, kind: str) -> Question | None:
    """A question of `kind` about the scene, or None if the scene offers none (tried a few times)."""
    tries = (KINDS[kind](scene, rng) for _ in range(8))
    return next((question for question in tries if question is not None), None)


def plain_questions(seed: int | str, split: str, kinds: dict[str, int]) -> Iterator[tuple[Scene, list[Question]]]:
    """Endless scenes of a split, each with up to `kinds[kind]` distinct questions of each kind, shuffled."""
    rng = random.Random(f"smol/{seed}/{split}")
    while True:
        scene = draw(rng, split)
        questions: dict[str, Question] = {}
        for kind, number in kinds.items():
            for _ in range(number):
                if (question := plain_question(scene, rng, kind)) is not None:
                    questions.setdefault(question.prompt, question)
        order = list(questions.values())
        rng.shuffle(order)
        yield scene, order
