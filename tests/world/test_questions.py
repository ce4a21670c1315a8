"""Every question has one answer, and it is the correct one.

The answers are derived a second time here, from a scene's things alone: a regular expression takes each
question apart, and the scene must then give exactly that one answer.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from minivlm.processing import Tokenizer, build_tokenizer, mask_iou, text_to_boxes, text_to_masks
from minivlm.world.augmentations import turned
from minivlm.world.questions import (
    RELATIONS,
    TASKS,
    Example,
    ask,
    detection_text,
    examples,
    segmentation_text,
    vocabulary,
    with_article,
)
from minivlm.world.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, WORLD, Scene, Split, Thing, make_scene

SPLITS: tuple[Split, ...] = ("train", "test", "unseen")
COLOR, SHAPE, SIZE = ("|".join(names) for names in (COLORS, SHAPES, SIZES))


def scenes(number: int, split: Split = "train") -> list[Scene]:
    return [make_scene(np.random.default_rng(seed), split) for seed in range(number)]


def asked(scene: Scene, seed: int, number: int = 9) -> list[Example]:
    return list(islice(examples(scene, np.random.default_rng([seed, 99])), number))


# What training never sees


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_held_out_pair_in_questions_and_answers(split: Split) -> None:
    named: Counter[tuple[str, str]] = Counter()
    for seed, scene in enumerate(scenes(700, split)):
        for example in asked(scene, seed, 16):
            named.update(re.findall(rf"({COLOR}) ({SHAPE})", f"{example.prefix} {example.suffix}"))
    assert len(named) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)  # all others do occur
    assert HELD_OUT_PAIRS.isdisjoint(named)


def test_held_out_pairs_that_are_missing_are_asked_about_in_unseen_scenes() -> None:
    missing: set[str] = set()
    for seed, scene in enumerate(scenes(300, "unseen")):
        missing |= {e.prefix for e in asked(scene, seed) if e.task == "existence" and e.suffix == "no"}
    assert all(any(f"{color} {shape}" in text for text in missing) for color, shape in HELD_OUT_PAIRS)


# Answers, derived a second time


def the(things: list[Thing]) -> Thing:
    """The one thing that a question is about."""
    (thing,) = things  # several: the question has several answers
    return thing


def answer_again(scene: Scene, prefix: str) -> tuple[str, str]:
    """Task and answer, from the words of the prompt. Fails if a prompt has none, or more than one."""
    things = list(scene.things)
    matches = {name: re.fullmatch(pattern, prefix) for name, pattern in FORMS.items()}
    ((form, match),) = [(name, match) for name, match in matches.items() if match]
    words = match.groupdict()
    named = [
        thing
        for thing in things
        if all(getattr(thing, key) == words[key] for key in ("color", "shape", "size") if words.get(key))
    ]
    if form in ("color", "shape", "size"):
        return form, getattr(the(named), form)
    if form == "count":
        return form, str(len(named))
    if form == "existence":
        assert f"{words['a']} {words['color']}" == with_article(words["color"])
        return form, "yes" if named else "no"
    if form == "relation":
        first = the(named)
        other = the([t for t in things if (t.color, t.shape) == (words["color2"], words["shape2"])])
        assert first is not other
        amount = {
            "left of": other.x - first.x,
            "right of": first.x - other.x,
            "above": other.y - first.y,
            "below": first.y - other.y,
        }[words["relation"]]
        assert abs(amount) > 5  # easy to see
        return form, "yes" if amount > 0 else "no"
    things.sort(key=lambda thing: thing.x)
    if form == "caption":
        return form, ", ".join(f"a {t.size} {t.color} {t.shape}" for t in things)
    named.sort(key=lambda thing: thing.x)
    parts = []
    for thing in named:
        x0, y0, x1, y1 = thing.box
        bins = [round(value / WORLD * 1023) for value in (y0, x0, y1, x1)]
        part = "".join(f"<loc{b:04d}>" for b in bins)
        part += "<seg>" * (16 if form == "segment" else 0)
        parts.append(f"{part} {thing.color} {thing.shape}")
    return form, " ; ".join(parts) or "none"


FORMS = {
    "color": rf"what color is the (?:(?P<size>{SIZE}) )?(?P<shape>{SHAPE})\?",
    "shape": rf"what shape is the (?P<color>{COLOR}) object\?",
    "size": rf"what size is the (?P<color>{COLOR}) (?P<shape>{SHAPE})\?",
    "count": rf"how many (?:(?P<shape>{SHAPE})s|(?:(?P<color>{COLOR}) )?objects) are there\?",
    "existence": rf"is there (?P<a>an?) (?P<color>{COLOR}) (?P<shape>{SHAPE})\?",
    "relation": (
        rf"is the (?P<color>{COLOR}) (?P<shape>{SHAPE}) (?P<relation>{'|'.join(RELATIONS)}) "
        rf"the (?P<color2>{COLOR}) (?P<shape2>{SHAPE})\?"
    ),
    "caption": "caption en",
    "detect": rf"detect (?P<color>{COLOR}) (?P<shape>{SHAPE})",
    "segment": rf"segment (?P<color>{COLOR}) (?P<shape>{SHAPE})",
}


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right_and_the_only_one(split: Split) -> None:
    tasks: Counter[str] = Counter()
    for seed, scene in enumerate(scenes(400, split)):
        for example in asked(scene, seed, 16):
            # Which sixteen codes draw an outline is tested below.
            suffix = re.sub(r"<seg\d{3}>", "<seg>", example.suffix)
            assert (example.task, suffix) == answer_again(scene, example.prefix), example
            tasks[example.task] += 1
            if example.task in ("detect", "segment"):
                assert all(thing.name in example.prefix for thing in example.things)
                assert len(example.things) == example.suffix.count(" ; ") + (example.suffix != "none")
    assert set(tasks) == set(TASKS) == set(FORMS)
    often = tasks.pop("relation"), tasks.pop("detect")
    assert min(tasks.values()) > 0.75 * max(tasks.values())  # about equally often
    assert min(often) > max(tasks.values())  # twice per round, or if things share a name


def test_the_same_prompt_has_one_answer_in_a_scene() -> None:
    for seed, scene in enumerate(scenes(60)):
        answers: dict[str, str] = {}
        for example in asked(scene, seed, 80):
            assert answers.setdefault(example.prefix, example.suffix) == example.suffix


def test_a_seed_is_a_row_of_questions() -> None:
    thirty = scenes(30)
    assert [asked(scene, 3) for scene in thirty] == [asked(scene, 3) for scene in thirty]
    assert [asked(scene, 3) for scene in thirty] != [asked(scene, 4) for scene in thirty]


@pytest.mark.parametrize("relations", [1, 2, 4])
def test_no_task_comes_again_before_all_had_their_turn(relations: int) -> None:
    """Except for relations, and for `detect` if things share a name."""
    for seed, scene in enumerate(scenes(100)):
        rng = np.random.default_rng(seed)
        most = {task: 1 for task in TASKS if all(ask(scene, task, rng) is not None for _ in range(20))}
        if "relation" in most:
            most["relation"] = relations
        if len({thing.name for thing in scene.things}) < len(scene.things):
            most["detect"] = 2
        first = Counter(e.task for e in islice(examples(scene, rng, relations), sum(most.values())))
        assert all(number <= most.get(task, relations) for task, number in first.items())


def test_several_things_of_one_name_are_asked_for_in_every_round() -> None:
    """Twins and triplets: a round has two `detect`, and the answer to one of them has several boxes."""
    found: Counter[int] = Counter()
    for seed, scene in enumerate(scenes(400)):
        rng = np.random.default_rng(seed)
        alike = len({thing.name for thing in scene.things}) < len(scene.things)
        if alike and all(ask(scene, task, rng) is not None for task in TASKS for _ in range(20)):
            a_round = islice(examples(scene, rng), len(TASKS) + 2)
            boxes = [len(example.things) for example in a_round if example.task == "detect"]
            assert len(boxes) == 2
            assert max(boxes) > 1
            found[max(boxes)] += 1
    assert found[2] > 20
    assert found[3] > 0


def test_ask_gives_the_task_or_nothing() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(100):
        for task in TASKS:
            example = ask(scene, task, rng)
            assert example is None or example.task == task
    alone = next(scene for scene in scenes(50) if len(scene.things) == 1)
    assert ask(alone, "relation", rng) is None


def test_guessing_does_not_help() -> None:
    """Yes and no are about equally frequent, no count or word dominates, and "none" is rare."""
    answers: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for seed, scene in enumerate(scenes(1500)):
        for example in asked(scene, seed):
            answers[example.task][example.suffix] += 1
    for task in ("existence", "relation"):
        assert 0.45 < answers[task]["yes"] / answers[task].total() < 0.55, task
    most = {task: count.most_common(1)[0][1] / count.total() for task, count in answers.items()}
    assert most["count"] < 0.5
    assert most["color"] < 0.2
    assert most["shape"] < 0.35
    assert most["size"] < 0.55  # small things are easier to place
    for task in ("detect", "segment"):
        assert 0.02 < answers[task]["none"] / answers[task].total() < 0.1


def test_missing_things_are_often_almost_there() -> None:
    """Half of the questions about a missing thing name a color and a shape that both occur."""
    almost = possible = 0
    rng = np.random.default_rng(0)
    for scene in scenes(1500):
        example = ask(scene, "existence", rng)
        assert example is not None
        pairs = {(thing.color, thing.shape) for thing in scene.things}
        colors, shapes = {color for color, _ in pairs}, {shape for _, shape in pairs}
        mixed = {(c, s) for c in colors for s in shapes} - pairs - HELD_OUT_PAIRS
        match = re.fullmatch(FORMS["existence"], example.prefix)
        assert match
        if example.suffix == "no" and mixed:
            possible += 1
            almost += (match["color"], match["shape"]) in mixed
    assert possible > 300
    assert almost / possible > 0.45


# Boxes and outlines


def test_nothing_is_none() -> None:
    assert detection_text([]) == segmentation_text([]) == "none"


def test_boxes_of_an_answer_are_those_of_the_things() -> None:
    for scene in scenes(50):
        for text in (detection_text(scene.things), segmentation_text(scene.things)):
            boxes = text_to_boxes(text, WORLD, WORLD)
            assert [box.name for box in boxes] == [thing.name for thing in scene.things]
            for box, thing in zip(boxes, scene.things, strict=True):
                assert np.allclose(box[:4], thing.box, atol=WORLD / 1023)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_boxes_of_an_answer_fit_pictures_of_any_shape(task: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        example = ask(make_scene(rng, width=112, height=40), task, rng)
        assert example is not None
        boxes = text_to_boxes(example.suffix, 112, 40)
        assert np.allclose([box[:4] for box in boxes], [t.box for t in example.things], atol=0.06)


@pytest.mark.parametrize("degrees", [0, 20])
def test_outlines_of_an_answer_are_those_of_the_things(degrees: int) -> None:
    """Sixteen codes draw what a thing looks like, wherever it is and however it is rotated."""
    overlaps: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for seed, scene in enumerate(scenes(40)):
        scene = turned(scene, np.random.default_rng(seed), degrees)
        masks = text_to_masks(segmentation_text(scene.things), 256, 256)
        for mask, thing in zip(masks, scene.things, strict=True):
            overlaps[thing.shape].append(mask_iou(mask.mask, thing.mask(256)))
    assert min(min(values) for values in overlaps.values()) > 0.75
    assert all(np.mean(values) > 0.85 for values in overlaps.values())


def test_outlines_tell_shapes_and_angles_apart_and_nothing_else() -> None:
    def outline(thing: Thing) -> str:
        return "".join(re.findall(r"<seg\d{3}>", segmentation_text([thing])))

    def drawn(shape: str, angle: int, x: float = 20.0, radius: float = 10.0) -> Thing:
        return Thing(shape, "red", "medium", x, 30.0, radius, COLORS["red"], angle)

    assert len({outline(drawn(shape, 0)) for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        assert outline(drawn(shape, 0)) == outline(drawn(shape, 0, x=40.0, radius=14.0))
        assert outline(drawn(shape, 10)) == outline(drawn(shape, 12))  # five degrees are one step
        assert (outline(drawn(shape, 0)) == outline(drawn(shape, 15))) == (shape == "circle")


def test_the_answer_to_segment_begins_like_that_to_detect() -> None:
    """Boxes, names and their order are the same."""
    for scene in scenes(30):
        assert re.sub(r"<seg\d{3}>", "", segmentation_text(scene.things)) == detection_text(scene.things)


# Words


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer(vocabulary()))


WORD = re.compile(r"<loc\d{4}>|<seg\d{3}>| ?[a-z]+| ?[0-9]| ?[?,;]|\n| ")


def test_the_tokenizer_knows_every_text(tokenizer: Tokenizer) -> None:
    texts = set(vocabulary())
    for split in SPLITS:
        for seed, scene in enumerate(scenes(250, split)):
            for example in asked(scene, seed, 16):
                texts |= {example.prefix + "\n", example.suffix}
    for text in texts:
        assert "".join(WORD.findall(text)) == text
        ids = tokenizer.encode(text)
        tokens = [tokenizer.backend.id_to_token(index) for index in ids]
        assert [token.replace("▁", " ") for token in tokens] == WORD.findall(text), text  # nothing is split
        assert tokenizer.decode(ids) == text


def test_every_answer_is_one_token_where_it_is_one_word(tokenizer: Tokenizer) -> None:
    for word in (*COLORS, *SHAPES, *SIZES, "yes", "no", "none", *"0123456789"):
        assert len(tokenizer.encode(word)) == 1
    # Byte pieces do appear for words from another world, so their absence above means something.
    tokens = [tokenizer.backend.id_to_token(index) for index in tokenizer.encode("zебра")]
    assert any(token.startswith("<0x") for token in tokens)
