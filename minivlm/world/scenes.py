"""The drawn world: pictures of colored shapes, about which everything is known.

A scene is one to five things on a plain, slightly noisy background, gray unless it is tinted. Because we drew
it, we know everything about it: an exact caption, the boxes and outlines of its things, and what lies under
each patch. Scenes are generated on the fly from a random generator, so a seed is a data set, and nothing has
to be stored. Questions about scenes are in questions.py, other ways to draw them in augmentations.py.

Some pairs of color and shape (`HELD_OUT_PAIRS`) never occur in training scenes or training questions. A
model that knows red circles and blue squares should recognize a red square: the split "unseen" tests this.

The world is 64 units wide and high unless a scene says otherwise, however many pixels it is drawn with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from minivlm.errors import InputError

WORLD = 64.0  # units from left to right and from top to bottom, where a scene says nothing else
LEAST_SIDE = 32.0
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
HELD_OUT_PAIRS = frozenset(  # every color once and every shape twice, so that neither gives the other away
    {
        ("yellow", "circle"),
        ("cyan", "circle"),
        ("red", "square"),
        ("purple", "square"),
        ("green", "triangle"),
        ("pink", "triangle"),
        ("orange", "star"),
        ("blue", "star"),
    }
)

Split = Literal["train", "test", "unseen"]

_COLOR_NAMES, _SIZE_NAMES = tuple(COLORS), tuple(SIZES)
ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_GAP = 1.5  # units between things
ROOM = 800.0  # square units for each thing, so that all of them can be placed
_COVERED = 1.0  # units that a thing reaches into a cell before it counts as lying there
_ORDER_GAP = 3.0  # centers differ by at least this much from left to right, so that the order is clear


@dataclass(frozen=True)
class Thing:
    """One shape. Center and radius (of the circle around it) are in units of the world; y points down."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]
    angle: int = 0  # clockwise rotation in degrees

    @cached_property
    def name(self) -> str:
        """What questions call it, such as "red circle"."""
        return f"{self.color} {self.shape}"

    @cached_property
    def outline(self) -> list[tuple[float, float]]:
        """Corners in units; a circle is given by the two corners of its box."""
        if self.shape == "circle":
            r = self.radius
            return [(self.x - r, self.y - r), (self.x + r, self.y + r)]
        corners = {"square": 4, "triangle": 3, "star": 10}[self.shape]
        start = math.pi / 4 if self.shape == "square" else -math.pi / 2
        start += math.radians(self.angle)
        points = []
        for i in range(corners):
            radius = self.radius * (0.45 if self.shape == "star" and i % 2 else 1.0)
            angle = start + 2 * math.pi * i / corners
            points.append((self.x + radius * math.cos(angle), self.y + radius * math.sin(angle)))
        return points

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in units: the smallest box around the drawn shape."""
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def paint(
        self, picture: Image.Image, fill: int | tuple[int, int, int], world_width: float = WORLD
    ) -> None:
        """Draw the shape into a picture of the whole world, without antialiasing."""
        scale = picture.width / world_width
        outline = [(x * scale, y * scale) for x, y in self.outline]
        pen = ImageDraw.Draw(picture)
        if self.shape == "circle":
            pen.ellipse(outline, fill=fill)
        else:
            pen.polygon(outline, fill=fill)

    def mask(self, pixels: int = 64) -> np.ndarray:
        """[pixels, pixels], True where the thing is, in a picture of the whole world."""
        picture = Image.new("L", (4 * pixels, 4 * pixels))
        self.paint(picture, 255)
        return np.asarray(picture.reduce(4)) >= 128


@dataclass(frozen=True)
class Scene:
    """Things from left to right on a plain background."""

    things: tuple[Thing, ...]
    background: int  # gray level
    noise: float  # standard deviation in gray levels
    noise_seed: int
    unseen_pairs: bool = False  # whether questions may name pairs that are held out from training
    width: float = WORLD  # of the picture, in units
    height: float = WORLD
    tint: tuple[int, int, int] = (0, 0, 0)  # added to red, green and blue of the background

    @property
    def ground(self) -> tuple[int, int, int]:
        """The color of the background."""
        red, green, blue = (min(max(self.background + more, 0), 255) for more in self.tint)
        return red, green, blue

    def draw(
        self, pixels: int = 64, reducing: Image.Resampling = Image.Resampling.BOX, supersampling: int = 4
    ) -> Image.Image:
        """The picture, `pixels` wide, RGB; the height follows from the shape of the scene.

        Drawn `supersampling` times as large, then reduced by a filter; BOX averages the pixels that merge.
        """
        rows = round(pixels * self.height / self.width)
        big = (pixels * supersampling, rows * supersampling)
        picture = Image.new("RGB", big, self.ground)
        for thing in self.things:
            thing.paint(picture, thing.rgb, self.width)
        picture = picture.resize((pixels, rows), reducing)
        if self.noise == 0:
            return picture
        noisy = np.random.default_rng(self.noise_seed).standard_normal((rows, pixels, 3), dtype=np.float32)
        noisy *= self.noise
        noisy += np.asarray(picture)
        return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))

    def caption(self) -> str:
        """Every thing from left to right: "a small red circle, a large blue star"."""
        return ", ".join(f"a {thing.size} {thing.name}" for thing in self.things)

    def find(self, name: str) -> tuple[Thing, ...]:
        """The things with a name such as "red circle", from left to right."""
        return tuple([thing for thing in self.things if thing.name == name])

    def patch_labels(self, rows: int, columns: int | None = None) -> dict[str, np.ndarray]:
        """What lies on each of N patches, rows x columns of them; None: as many columns as rows.

        Returns:
            color, shape, size: [N] class numbers, 0 for the background; box: [N, 4], x0, y0, x1, y1 of the
            thing in units relative to the middle of the patch (0 on the background).
        """
        middles = patch_middles(rows, columns or rows, self.width, self.height)
        labels = {name: np.zeros(len(middles), dtype=np.int64) for name in ("color", "shape", "size")}
        labels["box"] = np.zeros((len(middles), 4), dtype=np.float32)
        nearest = np.full(len(middles), np.inf)
        for thing in self.things:
            # The distance from the thing's rim.
            outside = np.hypot(middles[:, 0] - thing.x, middles[:, 1] - thing.y) - thing.radius
            mine = np.flatnonzero((outside < 2.0) & (outside < nearest))
            nearest[mine] = outside[mine]
            labels["color"][mine] = 1 + _COLOR_NAMES.index(thing.color)
            labels["shape"][mine] = 1 + SHAPES.index(thing.shape)
            labels["size"][mine] = 1 + _SIZE_NAMES.index(thing.size)
            labels["box"][mine] = np.array(thing.box) - middles[mine]
        return labels


@cache
def patch_middles(rows: int, columns: int, width: float, height: float) -> np.ndarray:
    """[rows * columns, 4]: x, y, x, y of the middle of each patch of a picture, in units."""
    x = np.tile((np.arange(columns) + 0.5) * width / columns, rows)
    y = np.repeat((np.arange(rows) + 0.5) * height / rows, columns)
    return np.stack([x, y, x, y], axis=1)


def cell_depths(
    x: float, y: float, radius: float, rows: int, columns: int, width: float, height: float
) -> np.ndarray:
    """How far a disk reaches into each cell of a grid, in units beyond the one that counts: [rows * columns].

    Above 0 it lies there, see `Clip.motion_labels`. Unlike the middle of a patch in `Scene.patch_labels`, a
    cell is not missed by a thing that lies in its corner.
    """
    middles = patch_middles(rows, columns, width, height)[:, :2]
    half = np.array([width / columns, height / rows]) / 2
    beyond = (np.abs(middles - (x, y)) - half).clip(min=0)  # the edges of each cell
    return radius - np.linalg.norm(beyond, axis=1) - _COVERED


def make_scene(
    rng: np.random.Generator,
    split: Split = "train",
    easy: bool = False,
    width: float = WORLD,
    height: float = WORLD,
) -> Scene:
    """A random scene.

    Args:
        split: "train" and "test" have no held-out pair (they differ only in the seed); each scene of
            "unseen" has at least one.
        easy: one or two things, for the start of training.
        width, height: of the picture, in units. Small pictures have fewer things.

    Raises InputError: a side under LEAST_SIDE.
    """
    check_sides(width, height)
    count = min(int(rng.integers(1, 3 if easy else 6)), int(width * height / ROOM))
    while True:
        pairs = _choose_pairs(rng, count, split)
        things = _place(rng, pairs, width, height)
        if things is not None:
            break
    return Scene(
        things=tuple(sorted(things, key=lambda thing: thing.x)),
        background=int(rng.integers(165, 251)),
        noise=float(rng.uniform(0.0, 6.0)),
        noise_seed=int(rng.integers(2**31)),
        unseen_pairs=split == "unseen",
        width=width,
        height=height,
    )


def check_sides(width: float, height: float) -> None:
    """Raises InputError: a world in which large things have no place."""
    if min(width, height) < LEAST_SIDE:
        raise InputError(
            f"a world of {width:g} x {height:g} units is too small: give each side at least {LEAST_SIDE:g}"
        )


def _choose_pairs(rng: np.random.Generator, count: int, split: Split) -> list[tuple[str, str]]:
    allowed = ALL_PAIRS if split == "unseen" else SEEN_PAIRS
    pairs = [allowed[i] for i in rng.choice(len(allowed), size=count, replace=False)]
    # Sometimes twins, and a few triplets, so that counting and detecting take more than naming.
    if count > 1:
        alike = rng.random()
        if alike < 0.25:
            pairs[-1] = pairs[0]
        if alike < 0.05 and count > 3:
            pairs[-2] = pairs[0]
    if split == "unseen" and not HELD_OUT_PAIRS.intersection(pairs):
        held_out = sorted(HELD_OUT_PAIRS)
        pairs[0] = held_out[rng.integers(len(held_out))]
    return pairs


def _place(
    rng: np.random.Generator, pairs: list[tuple[str, str]], width: float, height: float
) -> list[Thing] | None:
    """Place a thing of each pair in free space, or give up (None) after 20 tries for one of them."""
    things: list[Thing] = []
    for color, shape in pairs:
        for _ in range(20):
            # One call for all four numbers: many small calls would take most of the time.
            which, how_large, how_far, how_deep = rng.random(4).tolist()
            size = _SIZE_NAMES[int(3 * which)]
            least, most = SIZES[size]
            radius = least + (most - least) * how_large
            wide, high = width - 2 * radius - 1.0, height - 2 * radius - 1.0
            x, y = radius + 0.5 + wide * how_far, radius + 0.5 + high * how_deep
            clear = all(
                abs(x - other.x) > _ORDER_GAP
                and math.hypot(x - other.x, y - other.y) > radius + other.radius + _GAP
                for other in things
            )
            if clear:
                break
        else:
            return None
        things.append(Thing(shape, color, size, x, y, radius, shade(color, rng)))
    return things


def shade(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A color a little lighter, darker or tinted than its name says."""
    red, green, blue = (min(max(v + int(rng.integers(-12, 13)), 0), 255) for v in COLORS[color])
    return red, green, blue
