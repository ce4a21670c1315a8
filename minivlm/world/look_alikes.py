"""Scenes whose things share a color, and questions about pairs of them, for the last stages of training.

A model finds a thing by what tells it apart soonest, and in most scenes that is its color. "Is the red circle
above the red star?" needs both words of a name at once, and in scenes of eight colors few questions do. So
here many things of a scene are given one color, and most questions are about two of them. Each says where its
two things lie: `PointHead` in training/pointing.py learns from that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.processing import Tokenizer
from minivlm.world.batches import Batch, SceneBatches
from minivlm.world.questions import Example, distinct_things, examples, relations_between
from minivlm.world.rows import encode_example
from minivlm.world.scenes import COLORS, SEEN_PAIRS, WORLD, Scene, Thing, shade

EACH = 0.9  # chance that a thing takes the color that its scene shares
ALIKE, SHARED, VERTICAL = 10.0, 5.0, 2.0  # how much more often such a pair is asked about


def in_one_color(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with most of its things in one color, as far as training shows such pairs."""
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    things = [
        replace(thing, color=color, rgb=shade(color, rng))
        if (color, thing.shape) in SEEN_PAIRS and rng.random() < EACH
        else thing
        for thing in scene.things
    ]
    return replace(scene, things=tuple(things))


def ask_pair(scene: Scene, rng: np.random.Generator) -> Example | None:
    """A relation of two things, more often of one color, above or below, and near; None without a pair."""
    named = distinct_things(scene)
    pairs = [
        (first, second, relation, distance)
        for first in named
        for second in named
        if first is not second
        for relation, distance in relations_between(first, second).items()
    ]
    if not pairs:
        return None
    weights = np.array([_weight(scene, *pair) for pair in pairs])
    first, second, relation, distance = pairs[rng.choice(len(pairs), p=weights / weights.sum())]
    prefix = f"is the {first.name} {relation} the {second.name}?"
    return Example("relation", prefix, "yes" if distance > 0 else "no", (first, second))


def _weight(scene: Scene, first: Thing, second: Thing, relation: str, distance: float) -> float:
    weight = abs(distance) ** -0.5
    if first.color == second.color:
        weight *= ALIKE
    elif sum(thing.color in (first.color, second.color) for thing in scene.things) > 2:
        weight *= SHARED
    return weight * (VERTICAL if relation in ("above", "below") else 1.0)


@dataclass
class PointedBatch(Batch):
    """And where the things lie that relations are asked of."""

    points: Tensor  # [R, T, 2], at the word for a thing's color its x and y from -1 to 1, elsewhere NaN


class LookAlikes(SceneBatches):
    """Batches in which many scenes have one color, and many questions are about pairs.

    Both go from a first number, at step 0, to a last one along a straight line.

    Args:
        alike: share of scenes in one color.
        pairs: questions of `ask_pair` in a round of all.
    """

    def __init__(self, *given: Any, alike: tuple[float, float], pairs: tuple[int, int], **more: Any) -> None:
        super().__init__(*given, **more)
        self.alike, self.pairs = alike, pairs

    def scene(self, rng: np.random.Generator, step: int, easy: bool) -> Scene:
        scene = super().scene(rng, step, easy)
        return in_one_color(scene, rng) if rng.random() < self._at(step, *self.alike) else scene

    def examples(self, scene: Scene, rng: np.random.Generator, step: int) -> Iterator[Example]:
        pairs = round(self._at(step, *self.pairs))
        return examples(scene, rng, self.relations, [ask_pair] * pairs)

    def _at(self, step: int, first: float, last: float) -> float:
        return first + (last - first) * step / self.steps

    def _batch(self, scenes: list[Scene], pictures: list[Image.Image], chosen: list[list[Example]]) -> Batch:
        batch = super()._batch(scenes, pictures, chosen)
        points = torch.full((*batch.input_ids.shape, 2), torch.nan)
        words = color_words(self.processor.tokenizer)
        for row, asked in enumerate(self.rows(chosen)):
            start = 0
            for example in asked:
                prompt, answer = encode_example(self.processor.tokenizer, example)
                if example.task == "relation" and example.things:
                    places = [start + place for place, word in enumerate(prompt) if word in words]
                    for place, thing in zip(places, example.things, strict=True):
                        points[row, place] = 2 * torch.tensor([thing.x, thing.y]) / WORLD - 1
                start += len(prompt) + len(answer)
        return PointedBatch(**vars(batch), points=points)


@lru_cache
def color_words(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens of the colors' names, as they stand inside of a sentence."""
    return frozenset(index for color in COLORS for index in tokenizer.encode(f" {color}"))
