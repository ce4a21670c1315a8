"""Scenes of one color, questions about pairs in them, and where the batch says that the two things lie."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from minivlm.models.load import load
from minivlm.processing import Processor
from minivlm.world.batches import SceneBatches
from minivlm.world.look_alikes import LookAlikes, PointedBatch, ask_pair, color_words, in_one_color
from minivlm.world.scenes import COLORS, SEEN_PAIRS, Scene, make_scene


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load()[1]


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [make_scene(rng, "train") for _ in range(count)]


def test_one_color_changes_nothing_but_colors() -> None:
    rng = np.random.default_rng(1)
    kept = shared = count = 0
    for scene in scenes(200):
        other = in_one_color(scene, rng)
        assert [replace(thing, color="", rgb=(0, 0, 0)) for thing in other.things] == [
            replace(thing, color="", rgb=(0, 0, 0)) for thing in scene.things
        ]
        assert replace(other, things=()) == replace(scene, things=())
        for thing in other.things:
            assert (thing.color, thing.shape) in SEEN_PAIRS
            assert max(abs(a - b) for a, b in zip(thing.rgb, COLORS[thing.color], strict=True)) <= 12
        shared += max(Counter(thing.color for thing in other.things).values())
        kept += max(Counter(thing.color for thing in scene.things).values())
        count += len(scene.things)
    assert shared > 0.7 * count > 1.3 * kept


def test_the_answer_is_what_the_picture_shows() -> None:
    rng, seen = np.random.default_rng(2), Counter[str]()
    for scene in scenes(300, seed=3):
        example = ask_pair(in_one_color(scene, rng), rng)
        if example is None:
            continue
        first, second = example.things
        found = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", example.prefix)
        assert found is not None
        assert (found[1], found[3]) == (first.name, second.name)
        assert first.name != second.name
        dx, dy = first.x - second.x, first.y - second.y
        holds = {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[found[2]]
        assert example.suffix == ("yes" if holds else "no")
        seen[found[2]] += 1
        seen[example.suffix] += 1
        seen["one color"] += first.color == second.color
    assert min(seen[answer] for answer in ("yes", "no")) > 70
    assert seen["above"] + seen["below"] > 1.3 * (seen["left of"] + seen["right of"]) > 0
    assert seen["one color"] > 0.3 * (seen["yes"] + seen["no"])


def test_no_pair_no_question() -> None:
    scene = next(scene for scene in scenes(50) if len(scene.things) == 1)
    assert ask_pair(scene, np.random.default_rng(0)) is None


def test_each_color_is_one_word(processor: Processor) -> None:
    assert len(color_words(processor.tokenizer)) == len(COLORS)
    said = {processor.tokenizer.decode([index]).strip() for index in color_words(processor.tokenizer)}
    assert said == set(COLORS)


@pytest.mark.parametrize("packed", [True, False])
def test_points_lie_where_things_are_shown(processor: Processor, packed: bool) -> None:
    """At the words for colors of questions about pairs, and nowhere else; the place is the thing's patch."""
    drawn = LookAlikes(
        processor, 8, seed=0, steps=3, pictures=8, questions=8, packed=packed, alike=(0.5, 0.5), pairs=(4, 4)
    )
    words, checked = color_words(processor.tokenizer), 0
    for step in range(3):
        batch = drawn[step]
        assert isinstance(batch, PointedBatch)
        known = ~batch.points.isnan()
        assert torch.equal(known[..., 0], known[..., 1])
        assert batch.points[known].abs().max() < 1
        for row, place in known[..., 0].nonzero().tolist():
            assert int(batch.input_ids[row, place]) in words
            assert batch.labels[row, place] == -100
            color, shape = (
                processor.tokenizer.decode([int(index)]).strip()
                for index in batch.input_ids[row, place : place + 2]
            )
            x, y = ((batch.points[row, place] + 1) * 4).long().tolist()
            picture = int(batch.pictures[row])
            at = batch.patch_color[picture].view(8, 8)[y, x], batch.patch_shape[picture].view(8, 8)[y, x]
            assert at == (1 + list(COLORS).index(color), 1 + SHAPE_NAMES.index(shape))
            checked += 1
    assert checked > 60


SHAPE_NAMES = ["circle", "square", "triangle", "star"]


def test_parts_and_copies_keep_their_points(processor: Processor) -> None:
    drawn = LookAlikes(processor, 8, seed=1, steps=1, pictures=6, questions=6, alike=(1.0, 1.0), pairs=(6, 6))
    batch = drawn[0]
    assert isinstance(batch, PointedBatch)
    parts = [batch.to("cpu").part(range(0, 2)), batch.part(range(2, 6))]
    assert torch.equal(torch.cat([part.points for part in parts]).nan_to_num(9), batch.points.nan_to_num(9))
    assert [part.pictures.tolist() for part in parts] == [[0, 1], [0, 1, 2, 3]]


def test_scenes_of_one_color_become_fewer_step_by_step(processor: Processor) -> None:
    drawn = LookAlikes(
        processor, 8, seed=0, steps=10, pictures=64, questions=1, alike=(1.0, 0.0), pairs=(1, 1)
    )

    def commonest(step: int) -> float:
        rng = np.random.default_rng(5)
        counts = [Counter(thing.color for thing in drawn.scene(rng, step, False).things) for _ in range(200)]
        return sum(max(count.values()) for count in counts) / sum(sum(count.values()) for count in counts)

    assert commonest(0) > 0.68 > commonest(5) > commonest(10) + 0.1


def test_questions_about_pairs_become_fewer_step_by_step(processor: Processor) -> None:
    """Of a scene's endless questions, those that no round without pairs would have asked."""
    drawn = LookAlikes(
        processor, 8, seed=0, steps=10, pictures=1, questions=1, alike=(1.0, 1.0), pairs=(9, 0)
    )
    scene = next(scene for scene in scenes(50) if len(scene.things) == 5)

    def relations(step: int) -> float:
        asked = islice(drawn.examples(scene, np.random.default_rng(3), step), 400)
        return sum(example.task == "relation" for example in asked) / 400

    usual = SceneBatches(processor, 8, seed=0, steps=10, pictures=1, questions=1)
    asked = islice(usual.examples(scene, np.random.default_rng(3), 0), 400)
    assert relations(10) == sum(example.task == "relation" for example in asked) / 400
    assert relations(0) > relations(3) + 0.05 > relations(6) + 0.1 > relations(10) + 0.15


def test_usual_batches_have_no_points(processor: Processor) -> None:
    batch = SceneBatches(processor, 8, seed=0, steps=1, pictures=2, questions=4)[0]
    assert not isinstance(batch, PointedBatch)
