"""Scenes of coloured shapes and questions about them: the world of the bundled LVLM.

A scene is a 4 x 4 grid; some cells hold a shape. Everything is drawn and asked from one
`random.Random`, so a seed fixes images, questions and answers. Two decisions matter:

* *Relations skip empty cells*: "go right" leads to the next shape in that row, however far. A path of
  several steps therefore cannot be answered by adding up displacements: every step needs the result of
  the one before, which is what makes a decoder use its depth.
* *Splits by content*: a hash of the scene decides whether it belongs to train, validation, calibration or
  test, so that no scene of one split can occur in another, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

GRID, CELL = 4, 16
SIDE = GRID * CELL  # image side in pixels
COUNT = (4, 8)  # shapes of a scene, at least and at most

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 205, 40),
    "purple": (150, 50, 170),
    "cyan": (50, 200, 210),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 8, "large": 14}  # pixels
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}
LETTERS = "ABCD"
SPLITS = ("test", "validation", "calibration", "train")


@dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y` are grid columns and rows; `dx`, `dy` the offset in pixels from the cell's centre."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    dx: int = 0
    dy: int = 0

    @property
    def name(self) -> str:
        """ "red circle": unique in its scene."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The shapes of an image, its background (two RGB colours and a pattern), and the cells along each side."""

    things: tuple[Thing, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int], str]
    grid: int = GRID

    @property
    def side(self) -> int:
        """Side of the image in pixels."""
        return self.grid * CELL

    @property
    def split(self) -> str:
        """The only split this layout may be used in; `train` gets 61 of 64 layouts."""
        layout = sorted((t.x, t.y, t.color, t.shape, t.size) for t in self.things)
        bucket = hashlib.sha256(repr(layout).encode()).digest()[0] % 64
        return SPLITS[min(bucket, 3)]

    def step(self, thing: Thing, direction: str) -> Thing | None:
        """The next shape from `thing` in `direction` within its row or column, or None."""
        sx, sy = DIRECTIONS[direction]
        ahead = [
            t
            for t in self.things
            if (t.x - thing.x) * sx + (t.y - thing.y) * sy > 0 and (t.x == thing.x if sy else t.y == thing.y)
        ]
        return min(ahead, key=lambda t: abs(t.x - thing.x) + abs(t.y - thing.y), default=None)


@dataclass(frozen=True)
class Question:
    """A question with its short answer. `options` (multiple choice only) are in the order of LETTERS."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = field(default=())

    @property
    def prompt(self) -> str:
        """The user's turn: the question and, for multiple choice, its lettered options."""
        return self.text + "".join(f"\n{letter}. {o}" for letter, o in zip(LETTERS, self.options, strict=False))


# ---------------------------------------------------------------------------------------------- scenes


def _shade(tone: int, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, tone + rng.randint(-18, 18))) for _ in range(3))
    return red, green, blue


def draw_scene(rng: random.Random, split: str, grid: int = GRID, count: tuple[int, int] = COUNT) -> Scene:
    """A random scene of `split`: `count` shapes (at least, at most), no two of the same colour and shape."""
    while True:
        cells = rng.sample([(x, y) for x in range(grid) for y in range(grid)], rng.randint(*count))
        names = rng.sample([(c, s) for c in COLORS for s in SHAPES], len(cells))
        things = []
        for (x, y), (color, shape) in zip(cells, names, strict=True):
            size = rng.choice(tuple(SIZES))
            slack = (CELL - SIZES[size]) // 2
            things.append(Thing(color, shape, size, x, y, rng.randint(-slack, slack), rng.randint(-slack, slack)))
        tone = rng.choice((20, 45, 70, 175, 205, 235))
        first, second = (_shade(tone, rng), _shade(tone, rng))
        scene = Scene(tuple(things), (first, second, rng.choice(("plain", "gradient", "stripes", "checks"))), grid)
        if scene.split == split:
            return scene


@cache
def _sprite(shape: str, size: str) -> np.ndarray:
    """Anti-aliased coverage [side, side] in [0, 1] of a shape, drawn eight times too large and averaged."""
    side, zoom = SIZES[size], 8
    big = side * zoom
    canvas = Image.new("L", (big, big))
    pen = ImageDraw.Draw(canvas)
    if shape == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif shape == "square":
        pen.rectangle((big // 14, big // 14, big - 1 - big // 14, big - 1 - big // 14), fill=255)
    elif shape == "triangle":
        pen.polygon([(big // 2, 0), (big - 1, big - 1), (0, big - 1)], fill=255)
    else:
        third = int(big * 0.33)
        pen.rectangle((third, 0, big - 1 - third, big - 1), fill=255)
        pen.rectangle((0, third, big - 1, big - 1 - third), fill=255)
    return np.asarray(canvas, dtype=np.float32).reshape(side, zoom, side, zoom).mean(axis=(1, 3)) / 255


def _corner(thing: Thing) -> tuple[int, int]:
    half = SIZES[thing.size] // 2
    return thing.y * CELL + CELL // 2 + thing.dy - half, thing.x * CELL + CELL // 2 + thing.dx - half


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 RGB [side, side, 3]."""
    first, second, pattern = scene.background
    rows, columns = np.mgrid[0 : scene.side, 0 : scene.side]
    mix = {
        "plain": np.zeros((scene.side, scene.side)),
        "gradient": (rows + columns) / (2 * scene.side - 2),
        "stripes": (rows // 8 % 2).astype(float),
        "checks": ((rows // 8 + columns // 8) % 2).astype(float),
    }[pattern][..., None]
    image = (1 - mix) * np.array(first) + mix * np.array(second)
    for thing in scene.things:
        top, left = _corner(thing)
        side = SIZES[thing.size]
        alpha = _sprite(thing.shape, thing.size)[..., None]
        patch = image[top : top + side, left : left + side]
        image[top : top + side, left : left + side] = (1 - alpha) * patch + alpha * np.array(COLORS[thing.color])
    return image.round().astype(np.uint8)


def patch_labels(scene: Scene, patch: int) -> np.ndarray:
    """Attributes under every square patch, int64 [n, n, 3]: colour, shape and size number, 0 for background."""
    n = scene.side // patch
    covered = np.zeros((len(scene.things), scene.side, scene.side), dtype=np.float32)
    for i, thing in enumerate(scene.things):
        top, left = _corner(thing)
        side = SIZES[thing.size]
        covered[i, top : top + side, left : left + side] = _sprite(thing.shape, thing.size)
    share = covered.reshape(-1, n, patch, n, patch).mean(axis=(2, 4))
    owner, present = share.argmax(axis=0), share.max(axis=0) > 0.08
    table = np.array(
        [
            (1 + list(COLORS).index(t.color), 1 + SHAPES.index(t.shape), 1 + list(SIZES).index(t.size))
            for t in scene.things
        ]
    )
    return table[owner] * present[..., None]


# ------------------------------------------------------------------------------------------- questions


def _existence(scene: Scene, rng: random.Random) -> Question:
    """Half present; the absent ones are mostly made of a colour and a shape that are there, but not together."""
    sized = rng.random() < 0.3
    if rng.random() < 0.5:
        thing = rng.choice(scene.things)
        size, name, answer = thing.size, thing.name, "yes"
    else:
        names = {t.name for t in scene.things}
        pool = list(COLORS) if rng.random() < 0.3 else [t.color for t in scene.things]
        absent = sorted({f"{c} {t.shape}" for c in pool for t in scene.things} - names)
        if (sized and rng.random() < 0.5) or not absent:
            thing = rng.choice(scene.things)
            sized, name = True, thing.name
            size = next(s for s in SIZES if s != thing.size)
        else:
            size, name = rng.choice(tuple(SIZES)), rng.choice(absent)
        answer = "no"
    return Question("existence", f"Is there a {size + ' ' if sized else ''}{name}?", answer)


def _attribute(scene: Scene, rng: random.Random) -> Question | None:
    asked = rng.choice(("color", "shape", "size"))
    thing = rng.choice(scene.things)
    if asked == "size":
        return Question("attribute", f"What size is the {thing.name}?", thing.size)
    known = thing.shape if asked == "color" else thing.color
    other = "shape" if asked == "color" else "color"
    alike = [t for t in scene.things if getattr(t, other) == known]
    if len(alike) == 1:
        reference = known if asked == "color" else f"{known} one"
    elif sum(t.size == thing.size for t in alike) == 1:
        reference = f"{thing.size} {known}" if asked == "color" else f"{thing.size} {known} one"
    else:
        return None
    return Question("attribute", f"What {asked} is the {reference}?", getattr(thing, asked))


def _group(rng: random.Random) -> tuple[str, Callable[[Thing], bool]]:
    """A random group of shapes, as a plural phrase and a test: "red shapes", "large circles", ..."""
    color, shape, size = rng.choice(tuple(COLORS)), rng.choice(SHAPES), rng.choice(tuple(SIZES))
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return rng.choice(
        [
            (f"{color} shapes", lambda t: t.color == color),
            (plural, lambda t: t.shape == shape),
            (f"{size} shapes", lambda t: t.size == size),
            (f"{size} {plural}", lambda t: t.size == size and t.shape == shape),
            (f"{size} {color} shapes", lambda t: t.size == size and t.color == color),
        ]
    )


def _count(scene: Scene, rng: random.Random) -> Question | None:
    phrase, test = _group(rng)
    number = sum(map(test, scene.things))
    if number > 7 or (number == 0 and rng.random() < 0.7):  # "0" would be the answer to every second question
        return None
    return Question("count", f"How many {phrase} are there?", str(number))


def _compare(scene: Scene, rng: random.Random) -> Question | None:
    (first, test), (second, other) = _group(rng), _group(rng)
    a, b = sum(map(test, scene.things)), sum(map(other, scene.things))
    if first == second or a + b == 0 or (a <= b and rng.random() < 0.35):
        return None
    return Question("compare", f"Are there more {first} than {second}?", "yes" if a > b else "no")


def _walk(scene: Scene, rng: random.Random, steps: int) -> tuple[str, Thing] | None:
    """A path of `steps` without turning straight back: its description and the shape where it ends."""
    start = thing = rng.choice(scene.things)
    path: list[str] = []
    for _ in range(steps):
        reached = {d: t for d in DIRECTIONS if (t := scene.step(thing, d)) and not (path and d == OPPOSITE[path[-1]])}
        if not reached:
            return None
        path.append(rng.choice(list(reached)))
        thing = reached[path[-1]]
    return f"Start at the {start.name}, go {', '.join(path)}", thing


def _relation(steps: int) -> Callable[[Scene, random.Random], Question | None]:
    def ask(scene: Scene, rng: random.Random) -> Question | None:
        walk = _walk(scene, rng, steps)
        if walk is None:
            return None
        asked = rng.choice(("color", "shape"))
        return Question(f"relation{steps}", f"{walk[0]}: what {asked} is it?", getattr(walk[1], asked))

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


def _cell(scene: Scene, rng: random.Random) -> Question:
    """What a cell holds; two thirds of the time something."""
    if rng.random() < 0.67:
        thing = rng.choice(scene.things)
        x, y, answer = thing.x, thing.y, f"{thing.size} {thing.name}"
    else:
        held = {(t.x, t.y) for t in scene.things}
        x, y = rng.choice([(x, y) for x in range(GRID) for y in range(GRID) if (x, y) not in held])
        answer = "nothing"
    return Question("cell", f"What is at row {y + 1} column {x + 1}?", answer)


def _place(scene: Scene, rng: random.Random) -> Question:
    thing = rng.choice(scene.things)
    return Question("place", f"Where is the {thing.name}?", f"row {thing.y + 1} column {thing.x + 1}")


def _list(scene: Scene, rng: random.Random) -> Question:
    order = sorted(scene.things, key=lambda t: (t.y, t.x))
    return Question("list", "List all shapes.", ", ".join(f"{t.size} {t.name}" for t in order))


KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "existence": _existence,
    "attribute": _attribute,
    "count": _count,
    "compare": _compare,
    "relation1": _relation(1),
    "relation2": _relation(2),
    "relation3": _relation(3),
    "choice": _choice,
    "cell": _cell,
    "place": _place,
    "list": _list,
}


def ask(scene: Scene, rng: random.Random, kind: str) -> Question | None:
    """A question of `kind` about the scene, or None if the scene offers none (tried a few times)."""
    for _ in range(8):
        question = KINDS[kind](scene, rng)
        if question is not None:
            return question
    return None


def stream(seed: int, split: str, kinds: dict[str, int]) -> Iterator[tuple[Scene, list[Question]]]:
    """Endless scenes of a split, each with up to `kinds[kind]` distinct questions of each kind, shuffled."""
    rng = random.Random(f"{seed}/{split}")
    while True:
        scene = draw_scene(rng, split)
        questions: dict[str, Question] = {}
        for kind, number in kinds.items():
            for _ in range(number):
                if (question := ask(scene, rng, kind)) is not None:
                    questions.setdefault(question.prompt, question)
        order = list(questions.values())
        rng.shuffle(order)
        yield scene, order
