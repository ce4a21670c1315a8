"""The drawn world says the truth about itself: pictures, boxes, labels, and every answer.

The answers are derived a second time here, from the things of a scene and from nothing else: each question is
taken apart by a regular expression, and must then have exactly the one answer that the scene gives.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import combinations, islice, pairwise

import numpy as np
import pytest

from minivlm.processing import Tokenizer, build_tokenizer
from minivlm.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    WORLD,
    Example,
    Scene,
    Split,
    Thing,
    make_scene,
    vocabulary,
    with_article,
)

SPLITS: tuple[Split, ...] = ("train", "test", "unseen")
GRAY = 200
COLOR, SHAPE, SIZE = ("|".join(names) for names in (COLORS, SHAPES, SIZES))


def scenes(number: int, split: Split = "train", first_seed: int = 0, easy: bool = False) -> list[Scene]:
    return [
        make_scene(np.random.default_rng(seed), split, easy)
        for seed in range(first_seed, first_seed + number)
    ]


def asked(scene: Scene, seed: int, number: int = 8) -> list[Example]:
    return list(islice(scene.examples(np.random.default_rng([seed, 99])), number))


def pixels(scene: Scene, side: int = 64, smooth: bool = False) -> np.ndarray:
    return np.asarray(scene.draw(side, smooth)).astype(int)


def lone(shape: str, color: str, rng: np.random.Generator) -> Thing:
    radius = float(rng.uniform(6.5, 15))
    x, y = (float(v) for v in rng.uniform(radius + 0.5, WORLD - radius - 0.5, size=2))
    return Thing(shape, color, "medium", x, y, radius, COLORS[color])


# Pictures


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_is_a_scene_and_a_picture(split: Split) -> None:
    first, again, other = scenes(30, split), scenes(30, split), scenes(30, split, first_seed=1000)
    assert first == again
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, other, strict=True))
    assert [asked(scene, 3) for scene in first] == [asked(scene, 3) for scene in again]
    assert [asked(scene, 3) for scene in first] != [asked(scene, 4) for scene in first]


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_fit_what_is_drawn(shape: str, smooth: bool) -> None:
    rng = np.random.default_rng(0)
    for color in COLORS:
        thing = lone(shape, color, rng)
        drawn = np.abs(pixels(Scene((thing,), GRAY, 0.0, 0), 256, smooth) - GRAY).max(axis=2) > 8
        rows, columns = np.nonzero(drawn)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        # 4 pixels a unit; the drawing library rounds edges to a quarter of a pixel, and fills both ends.
        assert np.abs(found - 4 * np.array(thing.box)).max() <= 1.5, (shape, color)


def test_a_shape_has_its_form() -> None:
    """The share of the box that is filled tells the four apart."""
    shares = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "star": 0.384}
    rng = np.random.default_rng(1)
    for shape, share in shares.items():
        thing = lone(shape, "blue", rng)
        drawn = np.abs(pixels(Scene((thing,), GRAY, 0.0, 0), 256) - GRAY).max(axis=2) > 60
        x0, y0, x1, y1 = (4 * edge for edge in thing.box)
        assert drawn.sum() / ((x1 - x0) * (y1 - y0)) == pytest.approx(share, abs=0.06), shape


def test_everything_is_inside_and_apart() -> None:
    for scene in scenes(300) + scenes(100, "unseen"):
        assert 1 <= len(scene.things) <= 5
        for thing in scene.things:
            assert min(thing.box) >= 0
            assert max(thing.box) <= WORLD
            low, high = SIZES[thing.size]
            assert low <= thing.radius <= high
            assert max(abs(a - b) for a, b in zip(thing.rgb, COLORS[thing.color], strict=True)) <= 12
        for a, b in combinations(scene.things, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_sizes_and_colors_cannot_be_confused() -> None:
    ranges = sorted(SIZES.values())
    assert all(smaller[1] + 1 < larger[0] for smaller, larger in pairwise(ranges))
    grays = [(level,) * 3 for level in (165, 250)]
    for a, b in combinations([*COLORS.values(), *grays], 2):
        if a in grays and b in grays:
            continue
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 3 * 12, (
            a,
            b,
        )  # 12: what a color varies by


def test_easy_scenes_have_one_or_two_things() -> None:
    assert {len(scene.things) for scene in scenes(100, easy=True)} == {1, 2}
    assert {len(scene.things) for scene in scenes(100)} == {1, 2, 3, 4, 5}


def test_the_two_ways_of_drawing_differ_little() -> None:
    for scene in scenes(40):
        difference = np.abs(pixels(scene) - pixels(scene, smooth=True))
        assert 0 < difference.mean() < 2
        assert difference.max() < 50  # at an edge


def test_noise_is_as_strong_as_it_says() -> None:
    noisy = Scene((), 128, 4.0, 7)
    assert pixels(noisy).std() == pytest.approx(4, rel=0.05)
    assert pixels(Scene((), 128, 0.0, 7)).std() == 0


# What training never sees


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_held_out_pair_in_scenes_questions_and_answers(split: Split) -> None:
    named: Counter[tuple[str, str]] = Counter()
    for seed, scene in enumerate(scenes(700, split)):
        assert HELD_OUT_PAIRS.isdisjoint((thing.color, thing.shape) for thing in scene.things)
        for example in asked(scene, seed, 16):
            named.update(re.findall(rf"({COLOR}) ({SHAPE})", f"{example.prefix} {example.suffix}"))
    assert len(named) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)  # all others do occur
    assert HELD_OUT_PAIRS.isdisjoint(named)


def test_every_unseen_scene_has_a_held_out_pair() -> None:
    found: set[tuple[str, str]] = set()
    for scene in scenes(300, "unseen"):
        pairs = HELD_OUT_PAIRS.intersection((thing.color, thing.shape) for thing in scene.things)
        assert pairs
        found |= pairs
    assert found == HELD_OUT_PAIRS


def test_held_out_pairs_that_are_missing_are_asked_about_in_unseen_scenes() -> None:
    missing: set[str] = set()
    for seed, scene in enumerate(scenes(300, "unseen")):
        missing |= {e.prefix for e in asked(scene, seed) if e.task == "existence" and e.suffix == "no"}
    assert all(any(f"{color} {shape}" in text for text in missing) for color, shape in HELD_OUT_PAIRS)


def test_every_color_and_every_shape_is_seen_in_training() -> None:
    seen = {(color, shape) for color in COLORS for shape in SHAPES} - HELD_OUT_PAIRS
    assert {color for color, _ in seen} == set(COLORS)
    assert {shape for _, shape in seen} == set(SHAPES)


# Answers, derived a second time


def the(things: list[Thing]) -> Thing:
    """The one thing that a question is about."""
    (thing,) = things  # several: the question has several answers
    return thing


def answer_again(scene: Scene, prefix: str) -> tuple[str, str]:
    """Task and answer, from the words of the prompt. Fails where a prompt has none, or more than one."""
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
        assert abs(amount) > 5  # plain to see
        return form, "yes" if amount > 0 else "no"
    things.sort(key=lambda thing: thing.x)
    if form == "caption":
        return form, ", ".join(f"a {t.size} {t.color} {t.shape}" for t in things)
    named.sort(key=lambda thing: thing.x)
    parts = []
    for thing in named:
        x0, y0, x1, y1 = thing.box
        bins = [round(value / WORLD * 1023) for value in (y0, x0, y1, x1)]
        parts.append("".join(f"<loc{b:04d}>" for b in bins) + f" {thing.color} {thing.shape}")
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
}


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right_and_the_only_one(split: Split) -> None:
    tasks: Counter[str] = Counter()
    for seed, scene in enumerate(scenes(400, split)):
        for example in asked(scene, seed, 16):
            assert (example.task, example.suffix) == answer_again(scene, example.prefix), example
            tasks[example.task] += 1
            if example.task == "detect":
                assert all(thing.name in example.prefix for thing in example.things)
                assert len(example.things) == example.suffix.count(" ; ") + (example.suffix != "none")
    assert set(tasks) == set(TASKS) == set(FORMS)
    relations = tasks.pop("relation")
    assert min(tasks.values()) > 0.75 * max(tasks.values())  # about equally often
    assert relations > max(tasks.values())


def test_a_caption_goes_from_left_to_right() -> None:
    for scene in scenes(200):
        places = [thing.x for thing in scene.things]
        assert all(left + 3 < right for left, right in pairwise(places))
        assert len(scene.caption().split(", ")) == len(scene.things)


def test_the_same_prompt_has_one_answer_in_a_scene() -> None:
    for seed, scene in enumerate(scenes(60)):
        answers: dict[str, str] = {}
        for example in asked(scene, seed, 80):
            assert answers.setdefault(example.prefix, example.suffix) == example.suffix


def test_no_task_comes_twice_before_all_had_their_turn() -> None:
    """But for relations, which come twice a round."""
    for seed, scene in enumerate(scenes(200)):
        rng = np.random.default_rng(seed)
        offered = {task for task in TASKS if all(scene.ask(task, rng) is not None for _ in range(20))}
        round_length = len(offered) + ("relation" in offered)
        first = Counter(example.task for example in asked(scene, seed, round_length))
        assert all(number <= (2 if task == "relation" else 1) for task, number in first.items())


def test_ask_gives_the_task_or_nothing() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(100):
        for task in TASKS:
            example = scene.ask(task, rng)
            assert example is None or example.task == task
    alone = next(scene for scene in scenes(50) if len(scene.things) == 1)
    assert alone.ask("relation", rng) is None


def test_guessing_does_not_help() -> None:
    """Yes and no about equally often, no count and no word most of the time, "none" rare."""
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
    assert most["size"] < 0.55  # small things find a place more easily
    assert 0.02 < answers["detect"]["none"] / answers["detect"].total() < 0.1


def test_missing_things_are_often_almost_there() -> None:
    """Half of the questions about a missing thing name a color and a shape that both occur."""
    almost = possible = 0
    rng = np.random.default_rng(0)
    for scene in scenes(1500):
        example = scene.ask("existence", rng)
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


# Labels of patches


@pytest.mark.parametrize("grid", [4, 8, 16])
def test_patch_labels_agree_with_the_picture(grid: int) -> None:
    colors = np.array(list(COLORS.values()))
    side = 512
    checked = 0
    for seed in range(30):
        made = make_scene(np.random.default_rng(seed))
        scene = Scene(made.things, GRAY, 0.0, 0)
        picture, labels, cell = pixels(scene, side), scene.patch_labels(grid), side // grid
        for number in range(grid * grid):
            row, column = divmod(number, grid)
            middle = picture[
                row * cell + cell // 2 - 2 : row * cell + cell // 2 + 2,
                column * cell + cell // 2 - 2 : column * cell + cell // 2 + 2,
            ]
            is_ground = np.abs(middle - GRAY).max() == 0
            color = labels["color"][number]
            if not is_ground and middle.reshape(-1, 3).std(axis=0).max() < 1:  # wholly inside a thing
                mean = middle.reshape(-1, 3).mean(axis=0)
                assert color == 1 + np.abs(colors - mean).sum(axis=1).argmin(), (seed, number)
                checked += 1
            if color == 0:
                assert is_ground, (seed, number)
                assert labels["shape"][number] == labels["size"][number] == 0
                assert not labels["box"][number].any()
            else:
                origin = (np.array([column, row, column, row]) + 0.5) * WORLD / grid
                box = labels["box"][number] + origin
                (thing,) = [t for t in scene.things if np.abs(np.array(t.box) - box).max() < 1e-4]
                x, y = origin[:2]
                rims = {t: math.hypot(t.x - x, t.y - y) - t.radius for t in scene.things}
                assert rims[thing] == min(rims.values())  # the nearest one
                assert color == 1 + list(COLORS).index(thing.color)
                assert labels["shape"][number] == 1 + SHAPES.index(thing.shape)
                assert labels["size"][number] == 1 + list(SIZES).index(thing.size)
    assert checked > 50


def test_every_thing_lies_on_some_patch() -> None:
    for scene in scenes(100):
        labels = scene.patch_labels(8)
        for thing in scene.things:
            x, y = (int(value / WORLD * 8) for value in (thing.x, thing.y))
            assert labels["color"][8 * y + x] == 1 + list(COLORS).index(thing.color)


# Words


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer(vocabulary()))


WORD = re.compile(r"<loc\d{4}>| ?[a-z]+| ?[0-9]| ?[?,;]|\n| ")


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
        assert [token.replace("▁", " ") for token in tokens] == WORD.findall(text), text  # nothing is cut
        assert tokenizer.decode(ids) == text


def test_every_answer_is_one_token_where_it_is_one_word(tokenizer: Tokenizer) -> None:
    for word in (*COLORS, *SHAPES, *SIZES, "yes", "no", "none", *"0123456789"):
        assert len(tokenizer.encode(word)) == 1
    # Pieces of bytes do appear for words of another world, so that their absence above says something.
    tokens = [tokenizer.backend.id_to_token(index) for index in tokenizer.encode("zебра")]
    assert any(token.startswith("<0x") for token in tokens)
