"""Questions about a drawn scene, each with its one exact answer.

Prompts are PaliGemma's where it has them ("caption en", "detect red circle", "segment red circle"); questions
are in plain English. A question must have exactly one answer: it asks about "the star" only if there is one
star. `detect` and `segment` answer "none" if there is nothing to point at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from minivlm.processing.boxes import Box, boxes_to_text
from minivlm.processing.masks import codes_to_text, crop_mask, load_codebook
from minivlm.world.scenes import ALL_PAIRS, COLORS, SEEN_PAIRS, SHAPES, SIZES, WORLD, Scene, Thing

TASKS = ("color", "shape", "size", "count", "existence", "relation", "caption", "detect", "segment")
QUESTION_TASKS = TASKS[:6]  # answered by a word
Shown = TypeVar("Shown")  # what questions are about: a scene, or a clip of many
Ask = Callable[[Shown, np.random.Generator], "Example | None"]  # a prompt of one kind, if there is one
RELATIONS = ("left of", "right of", "above", "below")

_RELATION_GAP = 5.0  # units; questions ask only about relations that are easy to see


@dataclass(frozen=True)
class Example:
    """One prompt about a scene with its exact answer."""

    task: str
    prefix: str
    suffix: str
    things: tuple[Thing, ...] = ()  # what `detect` and `segment` should find


def with_article(name: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def detection_text(things: Sequence[Thing], width: float = WORLD, height: float = WORLD) -> str:
    """The answer to `detect`: boxes with names from left to right, or "none"."""
    boxes = [Box(*thing.box, thing.name) for thing in things]
    return boxes_to_text(boxes, width, height) if boxes else "none"


def segmentation_text(things: Sequence[Thing], width: float = WORLD, height: float = WORLD) -> str:
    """The answer to `segment`: boxes, outlines and names from left to right, or "none"."""
    parts = []
    for thing in things:
        box = boxes_to_text([Box(*thing.box)], width, height)
        # At the size at which a model sees the thing, less than five degrees makes no difference.
        parts.append(f"{box}{_outline_text(thing.shape, 5 * round(thing.angle / 5))} {thing.name}")
    return " ; ".join(parts) if parts else "none"


@cache
def _outline_text(shape: str, angle: int) -> str:
    """Sixteen `<seg>` tokens. They describe what fills the box, so position, size and color do not matter."""
    thing = Thing(shape, "red", "large", WORLD / 2, WORLD / 2, WORLD / 4, (0, 0, 0), angle)
    mask = thing.mask(4 * int(WORLD))
    box = [4 * edge for edge in thing.box]
    return codes_to_text(load_codebook().encode(torch.from_numpy(crop_mask(mask, box))[None])[0])


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Example | None:
    """A random prompt for a task, or None if the scene allows none."""
    return _ASK[task](scene, rng)


def examples(
    scene: Scene, rng: np.random.Generator, relations: int = 2, more: Sequence[Ask[Scene]] = ()
) -> Iterator[Example]:
    """Endless prompts with answers for training, in rounds of all tasks in random order.

    Relations come twice per round, since they are the slowest to learn. If several things have the same name,
    an extra `detect` asks for them: a model that has found one of them has to go on. A task that the scene
    allows no question for is skipped. In each round, the questions `more` are asked, too.
    """
    round_of_tasks = [_ASK[task] for task in (*TASKS, *["relation"] * (relations - 1))]
    round_of_tasks += more
    if len({thing.name for thing in scene.things}) < len(scene.things):
        round_of_tasks.append(_ask_detect_several)
    return in_rounds(round_of_tasks, scene, rng)


def in_rounds(
    questions: Sequence[Ask[Shown]],
    shown: Shown,
    rng: np.random.Generator,
) -> Iterator[Example]:
    """Endless answers of all `questions` about what is shown, each round in another random order.

    A question that has no answer there is skipped; one of them must always have one.
    """
    while True:
        for index in rng.permutation(len(questions)):
            example = questions[index](shown, rng)
            if example is not None:
                yield example


# ---- questions ---------------------------------------------------------------------------------------------
# Each function makes a random prompt for its task, or None if the scene allows none.


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
    # Mostly about what is in the scene: otherwise the answer would nearly always be 0.
    thing = scene.things[rng.integers(len(scene.things))]
    if kind == 1:
        color = thing.color if rng.random() < 0.75 else list(COLORS)[rng.integers(len(COLORS))]
        number = sum(t.color == color for t in scene.things)
        return Example("count", f"how many {color} objects are there?", str(number))
    shape = thing.shape if rng.random() < 0.75 else SHAPES[rng.integers(len(SHAPES))]
    number = sum(t.shape == shape for t in scene.things)
    return Example("count", f"how many {shape}s are there?", str(number))


def _ask_existence(scene: Scene, rng: np.random.Generator) -> Example | None:
    name = _present_or_missing_name(scene, rng)
    return Example("existence", f"is there {with_article(name)}?", "yes" if scene.find(name) else "no")


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Example | None:
    unique = distinct_things(scene)
    if len(unique) < 2:
        return None
    first, second = (unique[i] for i in rng.choice(len(unique), size=2, replace=False))
    distances = relations_between(first, second)
    if not distances:
        return None
    relation = list(distances)[rng.integers(len(distances))]
    answer = "yes" if distances[relation] > 0 else "no"
    return Example("relation", f"is the {first.name} {relation} the {second.name}?", answer)


def _ask_caption(scene: Scene, rng: np.random.Generator) -> Example | None:
    return Example("caption", "caption en", scene.caption())


def _ask_detect(scene: Scene, rng: np.random.Generator) -> Example | None:
    name = _name_to_find(scene, rng)
    things = scene.find(name)
    return Example("detect", f"detect {name}", detection_text(things, scene.width, scene.height), things)


def _ask_detect_several(scene: Scene, rng: np.random.Generator) -> Example | None:
    names = sorted({thing.name for thing in scene.things if len(scene.find(thing.name)) > 1})
    things = scene.find(names[rng.integers(len(names))])
    return Example(
        "detect", f"detect {things[0].name}", detection_text(things, scene.width, scene.height), things
    )


def _ask_segment(scene: Scene, rng: np.random.Generator) -> Example | None:
    name = _name_to_find(scene, rng)
    things = scene.find(name)
    return Example("segment", f"segment {name}", segmentation_text(things, scene.width, scene.height), things)


_ASK: dict[str, Ask[Scene]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
    "caption": _ask_caption,
    "detect": _ask_detect,
    "segment": _ask_segment,
}


def distinct_things(scene: Scene) -> list[Thing]:
    """The things whose name no other thing shares."""
    return _only_ones(scene.things, [thing.name for thing in scene.things])


def relations_between(first: Thing, second: Thing) -> dict[str, float]:
    """The relations that are easy to see, with how far they hold, in units; below 0, they do not hold."""
    dx, dy = first.x - second.x, first.y - second.y
    distances = dict(zip(RELATIONS, (-dx, dx, -dy, dy), strict=True))
    return {relation: far for relation, far in distances.items() if abs(far) > _RELATION_GAP}


def _one_of(scene: Scene, rng: np.random.Generator, describe: Callable[[Thing], str]) -> Thing | None:
    """A random thing that `describe` distinguishes from all others."""
    unique = _only_ones(scene.things, [describe(thing) for thing in scene.things])
    return unique[rng.integers(len(unique))] if unique else None


def _only_ones(things: Sequence[Thing], words: Sequence[str]) -> list[Thing]:
    """The things whose word no other thing shares."""
    return [thing for thing, word in zip(things, words, strict=True) if words.count(word) == 1]


def _name_to_find(scene: Scene, rng: np.random.Generator) -> str:
    """Mostly the name of a thing in the scene: "none" is learned quickly."""
    if rng.random() < 0.9:
        return scene.things[rng.integers(len(scene.things))].name
    return _present_or_missing_name(scene, rng)


def _present_or_missing_name(scene: Scene, rng: np.random.Generator) -> str:
    """Half of the time the name of a thing, otherwise a name that is missing. Half of these combine a color
    and a shape that both occur, but not together."""
    if rng.random() < 0.5:
        return scene.things[rng.integers(len(scene.things))].name
    # A training question about a held-out pair would always have the answer "no", and would teach that.
    pairs = ALL_PAIRS if scene.unseen_pairs else SEEN_PAIRS
    present = {(t.color, t.shape) for t in scene.things}
    missing = [pair for pair in pairs if pair not in present]
    colors, shapes = {t.color for t in scene.things}, {t.shape for t in scene.things}
    mixed = [(color, shape) for color, shape in missing if color in colors and shape in shapes]
    chosen = mixed if mixed and rng.random() < 0.5 else missing
    color, shape = chosen[rng.integers(len(chosen))]
    return f"{color} {shape}"


def vocabulary() -> Iterator[str]:
    """Texts that contain every word of this world, for building a tokenizer."""
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
            yield f"detect {color} {shape}\nsegment {color} {shape}\n"
            yield from (f"is the {color} {shape} {relation} the {color} {shape}?\n" for relation in RELATIONS)
    yield from SIZES
    yield from (str(number) for number in range(10))
    yield from ("yes", "no", "none", "caption en\n", "<loc0000> red circle ; <loc0000> red circle")
