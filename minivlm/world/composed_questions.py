"""Questions that take two steps: find some things, then compare them.

What the shipped model was trained on is answered by a look at one or two things. Here two or more have to be
held against each other: which is larger, which is nearer, how many lie to the left, which is higher. Of these
the model has seen the last kind alone, among relations, and is wrong most often about it. So `vertical` asks
only for above and below, and pairs of things more often the less they differ in height.

None of this takes part in `examples` or in `vocabulary` of questions.py: rows that were drawn before come out
as ever, and so do tokenizers. Words that a tokenizer does not know are written in several pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minivlm.world.questions import Example, distinct_things
from minivlm.world.scenes import SIZES, Scene, Thing

COMPOSED_TASKS = ("larger", "nearer", "left_count", "vertical")
LEAST_GAP = 5.0  # units in height, and between two distances; less is hard to see in 64 pixels
LEAST_RATIO = 1.1  # of the areas of two boxes

_SIZE_NAMES = tuple(SIZES)


def ask_composed(scene: Scene, task: str, rng: np.random.Generator) -> Example | None:
    """A random question of a task of COMPOSED_TASKS, or None if the scene allows none.

    `Example.things` are those that the question names, in its order, then those that are counted.
    """
    named = distinct_things(scene)
    return _ASK[task](scene, named, rng)


def _ask_larger(scene: Scene, named: list[Thing], rng: np.random.Generator) -> Example | None:
    """About things of different sizes, so that none is larger by a pixel, where boxes say the same.

    A square whose corners are as far from its middle as a circle's rim takes half of the circle's box: of a
    small circle and a medium square, either may be called the larger one.
    """
    sizes = [(_SIZE_NAMES.index(thing.size), _box_area(thing), thing) for thing in named]
    larger = [
        (a, b) for size, area, a in sizes for other_size, other_area, b in sizes
        if size > other_size and area > LEAST_RATIO * other_area
    ]  # fmt: skip
    if not larger:
        return None
    first, second = larger[rng.integers(len(larger))]
    answer = "yes"
    if rng.random() < 0.5:
        first, second, answer = second, first, "no"
    return Example("larger", f"is the {first.name} larger than the {second.name}?", answer, (first, second))


def _ask_nearer(scene: Scene, named: list[Thing], rng: np.random.Generator) -> Example | None:
    """Which of two things is nearer to a third, from middle to middle."""
    threes = [
        (middle, a, b)
        for middle in named
        for a in named
        for b in named
        if middle is not a and middle is not b and a is not b
        if abs(_distance(middle, a) - _distance(middle, b)) > LEAST_GAP
    ]
    if not threes:
        return None
    middle, first, second = threes[rng.integers(len(threes))]
    nearer = min(first, second, key=lambda thing: _distance(middle, thing))
    question = f"which is nearer to the {middle.name}, the {first.name} or the {second.name}?"
    return Example("nearer", question, nearer.name, (middle, first, second))


def _ask_left_count(scene: Scene, named: list[Thing], rng: np.random.Generator) -> Example | None:
    """How many things have their middle to the left of one thing's. Scenes keep these apart."""
    if not named:
        return None
    thing = named[rng.integers(len(named))]
    others = tuple(other for other in scene.things if other.x < thing.x)
    question = f"how many objects are left of the {thing.name}?"
    return Example("left_count", question, str(len(others)), (thing, *others))


def _ask_vertical(scene: Scene, named: list[Thing], rng: np.random.Generator) -> Example | None:
    """Above or below; a pair is asked about as often as one over its difference in height."""
    pairs = [(a, b) for a in named for b in named if abs(a.y - b.y) > LEAST_GAP]
    if not pairs:
        return None
    weights = np.array([1 / abs(a.y - b.y) for a, b in pairs])
    first, second = pairs[rng.choice(len(pairs), p=weights / weights.sum())]
    relation = ("above", "below")[rng.integers(2)]
    holds = (first.y < second.y) == (relation == "above")  # y points down
    return Example(
        "vertical",
        f"is the {first.name} {relation} the {second.name}?",
        "yes" if holds else "no",
        (first, second),
    )


def _box_area(thing: Thing) -> float:
    x0, y0, x1, y1 = thing.box
    return (x1 - x0) * (y1 - y0)


def _distance(a: Thing, b: Thing) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


_ASK: dict[str, Callable[[Scene, list[Thing], np.random.Generator], Example | None]] = {
    "larger": _ask_larger,
    "nearer": _ask_nearer,
    "left_count": _ask_left_count,
    "vertical": _ask_vertical,
}
