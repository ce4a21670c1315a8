"""Composed questions have one answer, which is derived again here, and boxes that lead to it."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from minivlm.processing.boxes import Box
from minivlm.world.composed_questions import COMPOSED_TASKS, LEAST_GAP, LEAST_RATIO, ask_composed
from minivlm.world.questions import Example, ask, examples, vocabulary
from minivlm.world.scenes import SIZES, Scene, Thing, make_scene
from minivlm.world.thinking import END, boxes_of, conclude, conclusion, evidence, think


def asked(task: str, scenes: int = 400) -> list[tuple[Scene, Example]]:
    found = []
    for number in range(scenes):
        rng = np.random.default_rng([5, number])
        scene = make_scene(rng)
        example = ask_composed(scene, task, rng)
        if example is not None:
            found.append((scene, example))
    return found


def the(scene: Scene, name: str) -> Thing:
    (thing,) = (thing for thing in scene.things if f"{thing.color} {thing.shape}" == name)
    return thing


def names_in(prompt: str) -> list[str]:
    return re.findall(r"(?<=the )\w+ (?:circle|square|triangle|star)", prompt)


@pytest.mark.parametrize("task", COMPOSED_TASKS)
def test_the_answer_again(task: str) -> None:
    for scene, example in asked(task):
        assert example.task == task
        things = [the(scene, name) for name in names_in(example.prefix)]
        assert things == list(example.things[: len(things)])
        if task == "larger":
            sizes = [list(SIZES).index(thing.size) for thing in things]
            areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in things]
            assert (sizes[0] > sizes[1]) == (areas[0] > areas[1])
            assert sizes[0] != sizes[1]
            assert max(areas) > LEAST_RATIO * min(areas)
            assert example.suffix == ("yes" if sizes[0] > sizes[1] else "no")
        elif task == "nearer":
            near, far = sorted(things[1:], key=lambda t: (t.x - things[0].x) ** 2 + (t.y - things[0].y) ** 2)
            assert example.suffix == near.name
            distances = [math.dist((t.x, t.y), (things[0].x, things[0].y)) for t in (near, far)]
            assert distances[1] - distances[0] > LEAST_GAP
        elif task == "left_count":
            left = [t for t in scene.things if t.x < things[0].x]
            assert example.suffix == str(len(left))
            assert list(example.things[1:]) == left
        else:
            higher = things[0].y < things[1].y
            assert abs(things[0].y - things[1].y) > LEAST_GAP
            assert example.suffix == ("yes" if higher == (" above " in example.prefix) else "no")


@pytest.mark.parametrize("task", COMPOSED_TASKS)
def test_no_answer_is_most_of_all(task: str) -> None:
    counts = Counter(example.suffix for _, example in asked(task, 800))
    assert counts.most_common(1)[0][1] < 0.56 * counts.total()


def test_vertical_asks_more_about_what_is_harder() -> None:
    """Within a scene of three heights, the pair that differs least is asked about most."""

    def thing(color: str, y: float) -> Thing:
        return Thing("star", color, "small", 10 + y, y, 7.0, (0, 0, 0))

    things = tuple(thing(color, y) for color, y in (("red", 10.0), ("pink", 20.0), ("cyan", 50.0)))
    scene = Scene(things, 200, 0.0, 0)
    rng = np.random.default_rng(0)
    gaps = Counter(
        abs(example.things[0].y - example.things[1].y)
        for example in (ask_composed(scene, "vertical", rng) for _ in range(600))
        if example is not None
    )
    wanted = {gap: 1 / gap for gap in (10.0, 30.0, 40.0)}
    for gap, weight in wanted.items():
        assert gaps[gap] / 600 == pytest.approx(weight / sum(wanted.values()), abs=0.06)


def test_older_rows_and_words_are_untouched() -> None:
    """No composed question comes among those that the shipped models were trained on."""
    scene = make_scene(np.random.default_rng(3))
    drawn = examples(scene, np.random.default_rng(4))
    texts = " ".join([*(next(drawn).prefix for _ in range(60)), *vocabulary()])
    assert not re.search(r"larger|nearer|think|objects are left", texts)


# Thinking


@pytest.mark.parametrize("task", COMPOSED_TASKS)
def test_the_conclusion_follows_from_the_evidence(task: str) -> None:
    for _, example in asked(task):
        thought = think(example)
        boxes = evidence(thought.suffix)
        assert [box.name for box in boxes] == [thing.name for thing in example.things]
        for box, thing in zip(boxes, example.things, strict=True):
            assert box[:4] == pytest.approx(thing.box, abs=64 / 1023)
        assert conclusion(thought.suffix) == example.suffix
        assert conclude(thought.prefix, boxes) == conclude(example.prefix, boxes) == example.suffix


@pytest.mark.parametrize("task", ["relation", "existence", *COMPOSED_TASKS])
def test_a_whole_scene_is_evidence(task: str) -> None:
    for number in range(200):
        rng = np.random.default_rng([6, number])
        scene = make_scene(rng)
        example = (
            ask(scene, task, rng) if task in ("relation", "existence") else ask_composed(scene, task, rng)
        )
        if example is not None:
            assert conclude(example.prefix, boxes_of(scene)) == example.suffix


def test_boxes_that_do_not_say() -> None:
    box = Box(0, 0, 10, 10, "red circle")
    question = "is the red circle above the blue star?"
    assert conclude(question, [box]) is None
    assert conclude(question, [box, box, box._replace(name="blue star")]) is None
    assert conclude("caption en", [box]) is None
    with pytest.raises(ValueError, match="nothing to point at"):
        think(Example("relation", question, "yes"))


def test_the_conclusion_of_any_text() -> None:
    assert conclusion("yes") == "yes"
    assert conclusion(f"a red circle{END}b{END}no") == "no"
    assert conclusion("<loc0001><loc0001><loc0009><loc0009> red circle ;") != "yes"
