"""The drawn world: pictures of colored shapes, with every true sentence about them.

A scene is one to five things on a gray, slightly noisy ground. Because we drew it, we know all of it: an
exact caption, answers to questions, boxes, and what lies under each patch. Scenes are made on the fly from
a random generator, so that a seed is a data set, and nothing has to be stored.

Some pairs of color and shape (`HELD_OUT_PAIRS`) never occur in training scenes or training questions. A
model that knows red circles and blue squares should recognize a red square: the split "unseen" asks.

The world is 64 units wide and high, whatever the number of pixels it is drawn with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from minivlm.processing.boxes import Box, boxes_to_text

WORLD = 64.0  # units from left to right and from top to bottom
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (246, 222, 50),
    "green": (44, 150, 60),
    "cyan": (50, 200, 215),
    "blue": (35, 75, 210),
    "purple": (135, 55, 180),
    "pink": (248, 140, 195),
}
SIZES = {"small": (6.5, 8.0), "medium": (9.5, 11.0), "large": (13.0, 15.0)}  # radius in units
HELD_OUT_PAIRS = frozenset({("red", "square"), ("blue", "star"), ("yellow", "circle"), ("green", "triangle")})
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("color", "shape", "size", "count", "existence", "relation", "caption", "detect")

Split = Literal["train", "test", "unseen"]

_ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_SEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_SUPERSAMPLING = 4
_GAP = 1.5  # units between things
_ORDER_GAP = 3.0  # centers differ by at least this much from left to right, so that the order is plain to see
_RELATION_GAP = 5.0  # a relation is only asked about where it is plain to see


@dataclass(frozen=True)
class Thing:
    """One shape. Center and radius (of the circle around it) in units of the world, y downwards."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        """As it is asked for, "red circle"."""
        return f"{self.color} {self.shape}"

    @cached_property
    def outline(self) -> list[tuple[float, float]]:
        """Corners in units; a circle is given by the two corners of its box."""
        if self.shape == "circle":
            r = self.radius
            return [(self.x - r, self.y - r), (self.x + r, self.y + r)]
        corners = {"square": 4, "triangle": 3, "star": 10}[self.shape]
        start = math.pi / 4 if self.shape == "square" else -math.pi / 2
        points = []
        for i in range(corners):
            radius = self.radius * (0.45 if self.shape == "star" and i % 2 else 1.0)
            angle = start + 2 * math.pi * i / corners
            points.append((self.x + radius * math.cos(angle), self.y + radius * math.sin(angle)))
        return points

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in units: the smallest box around the drawn shape."""
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Example:
    """One prompt about a scene with its exact answer."""

    task: str
    prefix: str
    suffix: str
    things: tuple[Thing, ...] = ()  # what `detect` has to find


def with_article(name: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def detection_text(things: Sequence[Thing]) -> str:
    """The answer to `detect`: boxes with names from left to right, or "none"."""
    boxes = [Box(*thing.box, thing.name) for thing in things]
    return boxes_to_text(boxes, WORLD, WORLD) if boxes else "none"


@dataclass(frozen=True)
class Scene:
    """Things from left to right on a gray ground."""

    things: tuple[Thing, ...]
    background: int  # gray level
    noise: float  # standard deviation in gray levels
    noise_seed: int
    unseen_pairs: bool = False  # whether questions may name pairs that are kept out of training

    def draw(self, pixels: int = 64, smooth: bool = False) -> Image.Image:
        """The picture, `pixels` wide and high, RGB.

        Drawn four times as large, then averaged, or with `smooth` reduced by the bicubic filter of the
        processor: the small differences between the two should not matter to a model.
        """
        big = pixels * _SUPERSAMPLING
        scale = big / WORLD
        picture = Image.new("RGB", (big, big), (self.background,) * 3)
        pen = ImageDraw.Draw(picture)
        for thing in self.things:
            outline = [(x * scale, y * scale) for x, y in thing.outline]
            if thing.shape == "circle":
                pen.ellipse(outline, fill=thing.rgb)
            else:
                pen.polygon(outline, fill=thing.rgb)
        if smooth:
            picture = picture.resize((pixels, pixels), Image.Resampling.BICUBIC)
        else:
            picture = picture.reduce(_SUPERSAMPLING)
        if self.noise == 0:
            return picture
        noise = np.random.default_rng(self.noise_seed).standard_normal((pixels, pixels, 3), dtype=np.float32)
        noisy = np.asarray(picture, dtype=np.float32) + noise * self.noise
        return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))

    def caption(self) -> str:
        """Every thing from left to right: "a small red circle, a large blue star"."""
        return ", ".join(f"a {thing.size} {thing.name}" for thing in self.things)

    def find(self, name: str) -> tuple[Thing, ...]:
        """The things that "red circle" means, from left to right."""
        return tuple(thing for thing in self.things if thing.name == name)

    def examples(self, rng: np.random.Generator) -> Iterator[Example]:
        """Prompts with answers, without end, in rounds of all tasks in random order.

        Relations come twice a round, as they are the slowest to learn. A task that this scene offers no
        question for is left out.
        """
        round_of_tasks = (*TASKS, "relation")
        while True:
            for index in rng.permutation(len(round_of_tasks)):
                example = _ASK[round_of_tasks[index]](self, rng)
                if example is not None:
                    yield example

    def ask(self, task: str, rng: np.random.Generator) -> Example | None:
        """One random prompt of a task, or None where the scene offers none."""
        return _ASK[task](self, rng)

    def patch_labels(self, grid: int) -> dict[str, np.ndarray]:
        """What lies on each patch of a grid x grid division of the picture.

        Returns:
            color, shape, size: [grid * grid] class numbers, 0 for the ground; box: [grid * grid, 4],
            x0, y0, x1, y1 of the thing in units relative to the middle of the patch (0 on the ground).
        """
        labels = {name: np.zeros(grid * grid, dtype=np.int64) for name in ("color", "shape", "size")}
        labels["box"] = np.zeros((grid * grid, 4), dtype=np.float32)
        middle = (np.arange(grid) + 0.5) * WORLD / grid
        x, y = np.tile(middle, grid), np.repeat(middle, grid)
        nearest = np.full(grid * grid, np.inf)
        for thing in self.things:
            outside = np.hypot(x - thing.x, y - thing.y) - thing.radius  # distance from the thing's rim
            mine = (outside < 2.0) & (outside < nearest)
            nearest[mine] = outside[mine]
            labels["color"][mine] = 1 + list(COLORS).index(thing.color)
            labels["shape"][mine] = 1 + SHAPES.index(thing.shape)
            labels["size"][mine] = 1 + list(SIZES).index(thing.size)
            labels["box"][mine] = np.stack(
                [edge - origin[mine] for edge, origin in zip(thing.box, (x, y, x, y), strict=True)], axis=1
            )
        return labels


def make_scene(rng: np.random.Generator, split: Split = "train", easy: bool = False) -> Scene:
    """A random scene.

    Args:
        split: "train" and "test" have no held-out pair (their difference is the seed); each scene of
            "unseen" has at least one.
        easy: one or two things, for the beginning of training.
    """
    count = int(rng.integers(1, 3 if easy else 6))
    while True:
        pairs = _choose_pairs(rng, count, split)
        things = _place(rng, pairs)
        if things is not None:
            break
    return Scene(
        things=tuple(sorted(things, key=lambda thing: thing.x)),
        background=int(rng.integers(165, 251)),
        noise=float(rng.uniform(0.0, 6.0)),
        noise_seed=int(rng.integers(2**31)),
        unseen_pairs=split == "unseen",
    )


def _choose_pairs(rng: np.random.Generator, count: int, split: Split) -> list[tuple[str, str]]:
    allowed = _ALL_PAIRS if split == "unseen" else _SEEN_PAIRS
    pairs = [allowed[i] for i in rng.choice(len(allowed), size=count, replace=False)]
    # Twins now and then, so that counting and detecting means more than naming.
    if count > 1 and rng.random() < 0.25:
        pairs[-1] = pairs[0]
    if split == "unseen" and not HELD_OUT_PAIRS.intersection(pairs):
        held_out = sorted(HELD_OUT_PAIRS)
        pairs[0] = held_out[rng.integers(len(held_out))]
    return pairs


def _place(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> list[Thing] | None:
    """Put each pair somewhere free, or give up (None) after some tries."""
    things: list[Thing] = []
    for color, shape in pairs:
        for _ in range(20):
            # One call for all four numbers: small calls are what drawing spends its time on.
            which, how_large, how_far, how_deep = rng.random(4).tolist()
            size = tuple(SIZES)[int(3 * which)]
            least, most = SIZES[size]
            radius = least + (most - least) * how_large
            room = WORLD - 2 * radius - 1.0
            x, y = radius + 0.5 + room * how_far, radius + 0.5 + room * how_deep
            clear = all(
                math.hypot(x - other.x, y - other.y) > radius + other.radius + _GAP
                and abs(x - other.x) > _ORDER_GAP
                for other in things
            )
            if clear:
                break
        else:
            return None
        jitter = rng.integers(-12, 13, size=3)
        red, green, blue = (int(v) for v in np.clip(np.array(COLORS[color]) + jitter, 0, 255))
        things.append(Thing(shape, color, size, x, y, radius, (red, green, blue)))
    return things


# ---- questions ---------------------------------------------------------------------------------------------
# Each function makes one random prompt of its task, or None where the scene offers none. A question must
# have one answer: "the star" is asked about only where there is one star.


def _ask_color(scene: Scene, rng: np.random.Generator) -> Example | None:
    thing = _one_of(scene, rng, lambda t: t.shape)
    if thing is not None:
        return Example("color", f"what color is the {thing.shape}?", thing.color)
    thing = _one_of(scene, rng, lambda t: f"{t.size} {t.shape}")
    if thing is not None:
        return Example("color", f"what color is the {thing.size} {thing.shape}?", thing.color)
    return None


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Example | None:
    thing = _one_of(scene, rng, lambda t: t.color)
    if thing is None:
        return None
    return Example("shape", f"what shape is the {thing.color} object?", thing.shape)


def _ask_size(scene: Scene, rng: np.random.Generator) -> Example | None:
    thing = _one_of(scene, rng, lambda t: t.name)
    if thing is None:
        return None
    return Example("size", f"what size is the {thing.name}?", thing.size)


def _ask_count(scene: Scene, rng: np.random.Generator) -> Example | None:
    kind = rng.integers(3)
    if kind == 0:
        return Example("count", "how many objects are there?", str(len(scene.things)))
    # Mostly about what is there: otherwise the answer would nearly always be 0.
    thing = scene.things[rng.integers(len(scene.things))]
    if kind == 1:
        color = thing.color if rng.random() < 0.75 else list(COLORS)[rng.integers(len(COLORS))]
        number = sum(t.color == color for t in scene.things)
        return Example("count", f"how many {color} objects are there?", str(number))
    shape = thing.shape if rng.random() < 0.75 else SHAPES[rng.integers(len(SHAPES))]
    number = sum(t.shape == shape for t in scene.things)
    return Example("count", f"how many {shape}s are there?", str(number))


def _ask_existence(scene: Scene, rng: np.random.Generator) -> Example | None:
    name = _some_name(scene, rng)
    return Example("existence", f"is there {with_article(name)}?", "yes" if scene.find(name) else "no")


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Example | None:
    unique = [t for t in scene.things if len(scene.find(t.name)) == 1]
    if len(unique) < 2:
        return None
    first, second = (unique[i] for i in rng.choice(len(unique), size=2, replace=False))
    dx, dy = first.x - second.x, first.y - second.y
    distances = dict(zip(RELATIONS, (-dx, dx, -dy, dy), strict=True))
    plain = [relation for relation in RELATIONS if abs(distances[relation]) > _RELATION_GAP]
    if not plain:
        return None
    relation = plain[rng.integers(len(plain))]
    answer = "yes" if distances[relation] > 0 else "no"
    return Example("relation", f"is the {first.name} {relation} the {second.name}?", answer)


def _ask_caption(scene: Scene, rng: np.random.Generator) -> Example | None:
    return Example("caption", "caption en", scene.caption())


def _ask_detect(scene: Scene, rng: np.random.Generator) -> Example | None:
    name = (
        scene.things[rng.integers(len(scene.things))].name if rng.random() < 0.9 else _some_name(scene, rng)
    )
    things = scene.find(name)
    return Example("detect", f"detect {name}", detection_text(things), things)


_ASK: dict[str, Callable[[Scene, np.random.Generator], Example | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
    "caption": _ask_caption,
    "detect": _ask_detect,
}


def _one_of(scene: Scene, rng: np.random.Generator, describe: Callable[[Thing], str]) -> Thing | None:
    """A random thing that `describe` tells from all others."""
    words = [describe(thing) for thing in scene.things]
    unique = [thing for thing, word in zip(scene.things, words, strict=True) if words.count(word) == 1]
    return unique[rng.integers(len(unique))] if unique else None


def _some_name(scene: Scene, rng: np.random.Generator) -> str:
    """The name of a thing in half of the cases, else a name that is missing: in half of these, of a color
    and a shape that both occur, but not together."""
    if rng.random() < 0.5:
        return scene.things[rng.integers(len(scene.things))].name
    # A training question about a held-out pair could only be answered "no", and would teach just that.
    pairs = _ALL_PAIRS if scene.unseen_pairs else _SEEN_PAIRS
    missing = [f"{color} {shape}" for color, shape in pairs if not scene.find(f"{color} {shape}")]
    colors, shapes = {t.color for t in scene.things}, {t.shape for t in scene.things}
    mixed = [name for name in missing if name.split()[0] in colors and name.split()[1] in shapes]
    chosen = mixed if mixed and rng.random() < 0.5 else missing
    return chosen[rng.integers(len(chosen))]


def vocabulary() -> Iterator[str]:
    """Texts that hold every word of this world, for building a tokenizer."""
    for color in COLORS:
        for shape in SHAPES:
            for size in SIZES:
                yield f"a {size} {color} {shape}, a {size} {color} {shape}"
                yield f"what color is the {size} {shape}?\n{color}"
            yield f"what size is the {color} {shape}?\n"
            yield f"what shape is the {color} object?\n{shape}"
            yield f"how many {shape}s are there?\n"
            yield f"how many {color} objects are there?\n"
            yield f"is there {with_article(color)} {shape}?\n"
            yield f"detect {color} {shape}\n"
            yield from (f"is the {color} {shape} {relation} the {color} {shape}?\n" for relation in RELATIONS)
    yield from SIZES
    yield from (str(number) for number in range(10))
    yield from ("yes", "no", "none", "caption en\n", "<loc0000> red circle ; <loc0000> red circle")
