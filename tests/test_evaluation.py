"""The measures measure: hand-made answers get the scores that can be worked out with a pencil."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minivlm import evaluation
from minivlm.evaluation import (
    EVALUATION_STREAM,
    QUESTION_TASKS,
    SPLITS,
    Metric,
    Question,
    answer_all,
    as_json,
    as_text,
    box_iou,
    evaluate,
    make_questions,
    match_boxes,
    score,
)
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Box, Processor, boxes_to_text
from minivlm.recipe import TrainingConfig, build
from minivlm.scenes import COLORS, HELD_OUT_PAIRS, TASKS, WORLD, Example, Scene, Thing

# Boxes


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (2, 3, 4, 8), 0.1),  # inside
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # side by side
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),  # both distances negative: their product must not count
        ((0, 0, 10, 10), (20, 0, 30, 10), 0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),  # no area at all
        ((0, 0, 2, 4), (0, 0, 4, 2), 4 / 12),  # x and y are not the same
    ],
)
def test_iou(a: tuple[float, ...], b: tuple[float, ...], wanted: float) -> None:
    assert box_iou(a, b) == pytest.approx(wanted)
    assert box_iou(b, a) == pytest.approx(wanted)
    assert box_iou(Box(*a, "cat"), Box(*b, "dog")) == pytest.approx(wanted)


EDGES = st.integers(0, 20)


@given(st.tuples(EDGES, EDGES, EDGES, EDGES), st.tuples(EDGES, EDGES, EDGES, EDGES))
def test_iou_equals_counting_pixels(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    def mask(box: tuple[int, ...]) -> np.ndarray:
        picture = np.zeros((20, 20), dtype=bool)
        picture[box[1] : box[3], box[0] : box[2]] = True
        return picture

    a, b = ((min(x, u), min(y, v), max(x, u), max(y, v)) for x, y, u, v in (a, b))
    both, either = (mask(a) & mask(b)).sum(), (mask(a) | mask(b)).sum()
    assert box_iou(a, b) == pytest.approx(both / either if either else 0)


LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)
NEAR_LEFT = (0.0, 0.0, 10.0, 8.0)  # IoU .8 with LEFT


@pytest.mark.parametrize(
    ("wanted", "found", "ious"),
    [
        ([], [], []),
        ([LEFT], [], [0]),  # missing
        ([], [LEFT], []),  # extra
        ([LEFT, RIGHT], [LEFT, RIGHT], [1, 1]),
        ([LEFT, RIGHT], [RIGHT, LEFT], [1, 1]),  # in another order
        ([LEFT, RIGHT], [RIGHT], [0, 1]),
        ([LEFT], [RIGHT, NEAR_LEFT, LEFT], [1]),  # the best of several
        ([LEFT, LEFT], [LEFT], [1, 0]),  # one box counts once
        ([LEFT, NEAR_LEFT], [LEFT], [1, 0]),  # for the one that it fits best
        ([NEAR_LEFT, LEFT], [LEFT], [0, 1]),
        ([LEFT, NEAR_LEFT], [NEAR_LEFT, LEFT], [1, 1]),
        ([LEFT], [RIGHT], [0]),
    ],
)
def test_matching(wanted: list[Any], found: list[Any], ious: list[float]) -> None:
    matched = match_boxes(wanted, [Box(*box) for box in found])
    if wanted == [LEFT, LEFT]:
        matched.sort(reverse=True)  # which of the two is free to choose
    assert matched == pytest.approx(ious)


# Scores


def thing(color: str, shape: str, x: float) -> Thing:
    return Thing(shape, color, "small", x, 20.0, 7.0, COLORS[color])


CIRCLE, SQUARE, TWIN = thing("red", "circle", 10), thing("blue", "square", 30), thing("red", "circle", 50)
SCENE = Scene((CIRCLE, SQUARE, TWIN), 200, 0.0, 0)


def question(task: str, suffix: str, *things: Thing) -> Question:
    return Question(SCENE, Image.new("RGB", (8, 8)), Example(task, f"{task} ...", suffix, things))


def box_text(*boxes: tuple[float, float, float, float]) -> str:
    return boxes_to_text([Box(*box, "red circle") for box in boxes], WORLD, WORLD)


def test_scores_of_words() -> None:
    asked = [question("color", color) for color in ("red", "red", "red", "blue")]
    asked += [question(task, answer) for task in ("existence", "relation") for answer in ("yes", "no")]
    asked += [question("caption", "a small red circle"), question("caption", "a large blue star")]
    answers = [
        "red",
        "blue",
        "red ",
        "blue",
        "no",
        "no",
        "yes",
        "no",
        "a small red circle",
        "a large blue circle",
    ]
    metrics = score(asked, answers)
    assert metrics["color"] == Metric(2 / 4, 3 / 4, 4)  # "red " is not "red"
    assert metrics["existence"] == Metric(1 / 2, 1 / 2, 2)
    assert metrics["relation"] == Metric(1.0, 1 / 2, 2)
    assert metrics["shape"] == Metric(0.0, 0.0, 0)  # never asked
    assert metrics["all questions"] == Metric(pytest.approx(5 / 8), pytest.approx(5 / 8), 8)  # captions apart
    assert metrics["exact caption"] == Metric(1 / 2, 1 / 2, 2)


def test_scores_of_boxes() -> None:
    x0, y0, x1, y1 = CIRCLE.box
    half = (x0, y0, x1, (y0 + y1) / 2)
    asked = [
        question("detect", box_text(CIRCLE.box, TWIN.box), CIRCLE, TWIN),
        question("detect", box_text(CIRCLE.box, TWIN.box), CIRCLE, TWIN),
        question("detect", box_text(SQUARE.box), SQUARE),
        question("detect", "none"),
        question("detect", "none"),
    ]
    answers = [
        box_text(TWIN.box, CIRCLE.box),  # 1, 1
        box_text(half),  # .5 (a little less, as numbers are rounded), 0
        "red",  # 0
        "none",
        box_text(CIRCLE.box),
    ]
    metrics = score(asked, answers)
    assert metrics["box mean IoU"].value == pytest.approx(2.5 / 5, abs=0.01)
    assert metrics["box mean IoU"].cases == 5
    recall = sum(
        iou >= 0.5
        for iou in (1, 1, box_iou(CIRCLE.box, evaluation.text_to_boxes(answers[1], WORLD, WORLD)[0]), 0, 0)
    )
    assert metrics["box recall at 0.5"] == Metric(recall / 5, metrics["box recall at 0.5"].majority, 5)
    assert metrics["nothing to detect"] == Metric(0.5, 0.0, 2)


def test_the_majority_baseline_of_boxes_is_the_mean_box() -> None:
    asked = [
        question("detect", "", CIRCLE),
        question("detect", "", TWIN),
        question("detect", "", CIRCLE, TWIN),
    ]
    metrics = score(asked, ["none"] * 3)
    mean = tuple(np.mean([CIRCLE.box, TWIN.box], axis=0))  # two of each
    first = box_iou(CIRCLE.box, mean)
    assert metrics["box mean IoU"].majority == pytest.approx(first)
    assert metrics["box mean IoU"].value == 0
    alike = score(asked[:1] * 3, ["none"] * 3)
    assert alike["box mean IoU"].majority == pytest.approx(1)
    assert alike["box recall at 0.5"].majority == 1


def test_the_right_answers_have_full_marks_and_no_answers_none() -> None:
    asked = make_questions(40, 1, "test", 16)
    right = score(asked, [q.example.suffix for q in asked])
    assert all(metric.value == 1 for name, metric in right.items() if name != "box mean IoU")
    assert right["box mean IoU"].value > 0.97  # coordinates are rounded to 1024 steps
    wrong = score(asked, [""] * len(asked))
    assert all(metric.value == 0 for name, metric in wrong.items() if name != "nothing to detect")
    assert all(metric.majority == wrong[name].majority for name, metric in right.items())
    assert set(right) == {
        *QUESTION_TASKS,
        "all questions",
        "exact caption",
        "box mean IoU",
        "box recall at 0.5",
        "nothing to detect",
    }


def test_majority_is_what_always_the_same_answer_reaches() -> None:
    asked = make_questions(60, 2, "test", 16)
    metrics = score(asked, ["yes"] * len(asked))
    for task in ("existence", "relation"):
        yes = metrics[task].value
        assert metrics[task].majority == pytest.approx(max(yes, 1 - yes))


def test_answers_and_questions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score([question("color", "red")], [])


# Questions


def test_questions_are_the_same_for_the_same_seed() -> None:
    first, again = make_questions(5, 1, "test", 32), make_questions(5, 1, "test", 32)
    assert [(q.scene, q.example) for q in first] == [(q.scene, q.example) for q in again]
    assert all(a.picture.tobytes() == b.picture.tobytes() for a, b in zip(first, again, strict=True))
    for other in (make_questions(5, 2, "test", 32), make_questions(5, 1, "unseen", 32)):
        assert not {q.scene for q in first} & {q.scene for q in other}
    # The first scenes stay the same when there are more.
    assert [q.example for q in make_questions(9, 1, "test", 32)][: len(first)] == [q.example for q in first]


def test_questions_ask_each_task_once_about_each_scene() -> None:
    asked = make_questions(50, 1, "test", 32)
    by_scene: dict[Scene, list[str]] = {}
    for q in asked:
        by_scene.setdefault(q.scene, []).append(q.example.task)
    assert len(by_scene) == 50
    assert all(len(set(tasks)) == len(tasks) for tasks in by_scene.values())
    assert {task for tasks in by_scene.values() for task in tasks} == set(TASKS)
    assert all(q.picture.size == (32, 32) for q in asked)
    assert all(q.picture.tobytes() == q.scene.draw(32).tobytes() for q in asked[::20])


def test_splits_are_what_they_say() -> None:
    assert set(SPLITS) == {"held_out", "unseen_pairs"}
    for split in SPLITS.values():
        scenes = {q.scene for q in make_questions(60, 1, split, 8)}
        has_pair = [bool(HELD_OUT_PAIRS & {(t.color, t.shape) for t in scene.things}) for scene in scenes]
        assert any(has_pair) == (split == "unseen")


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_evaluation_never_draws_from_a_stream_of_training(seed: int) -> None:
    """Same seed or not: the numbers that start a generator differ from all that training can use."""

    def start(*numbers: int) -> tuple[int, ...]:
        return tuple(np.random.SeedSequence(numbers).generate_state(4).tolist())

    last = TrainingConfig().total_steps
    training = {start(seed, step) for step in range(last)}
    assert len(training) == last
    for split in range(3):
        for number in range(1000):
            assert start(seed, EVALUATION_STREAM + split, number) not in training
    # Zeros at the end make no difference, so it is the stream's number that keeps them apart.
    assert start(seed, 5, 0) == start(seed, 5)
    assert last < EVALUATION_STREAM


def test_evaluation_scenes_are_no_training_scenes() -> None:
    from minivlm.batches import SceneBatches

    drawn: list[Scene] = []

    class Spy(SceneBatches):
        def _batch(self, scenes: list[Scene], *rest: Any) -> Any:
            drawn.extend(scenes)

    _, processor = build(TrainingConfig())
    batches = Spy(processor, 8, seed=1, steps=40, pictures=50, questions=1)
    for step in range(40):
        batches[step]
    assert len({scene.things for scene in drawn}) == 2000
    evaluated = {q.scene.things for q in make_questions(500, 1, "test", 8)}
    assert evaluated.isdisjoint(scene.things for scene in drawn)


# Answers


class Echo:
    """Stands in for a model: the answer is the number of the picture and the prompt, as it got them."""

    device = torch.device("cpu")

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.rows: list[int] = []

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.rows.append(len(input_ids))
        tokenizer = self.processor.tokenizer
        answers = []
        for ids, pixels in zip(input_ids, pixel_values, strict=True):
            prompt = tokenizer.decode(ids.tolist()).strip()
            gray = round((float(pixels.mean()) + 1) * 127.5)
            answers.append([*tokenizer.encode(f"{gray} {prompt}"), tokenizer.eos_id])
        width = max(map(len, answers))
        return torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in answers])


@pytest.fixture(scope="module")
def untrained() -> tuple[PaliGemma, Processor]:
    config = replace(TrainingConfig(), image_size=16, tower_layers=1, text_layers=1)
    model, processor = build(config)
    randomize(model)  # larger weights, for answers that differ
    return model, processor


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_come_in_the_order_asked(untrained: tuple[PaliGemma, Processor], batch_size: int) -> None:
    _, processor = untrained
    echo: Any = Echo(processor)
    prompts = ["detect red circle", "caption en", "what color is the star?", "caption en"] * 3
    pictures = [Image.new("RGB", (4, 4), (10 * number,) * 3) for number in range(12)]
    answers = answer_all(echo, processor, pictures, prompts, batch_size=batch_size, progress=False)
    assert answers == [f"{10 * number} {prompt}" for number, prompt in enumerate(prompts)]
    assert sum(echo.rows) == 12
    assert max(echo.rows) <= batch_size


def test_answers_in_a_batch_equal_those_one_by_one(untrained: tuple[PaliGemma, Processor]) -> None:
    model, processor = untrained
    asked = make_questions(3, 1, "test", 16)
    pictures, prompts = [q.picture for q in asked], [q.example.prefix for q in asked]
    together = answer_all(model, processor, pictures, prompts, batch_size=7, progress=False)
    alone = [
        processor.decode(model.generate(**processor([picture], [prompt]), max_new_tokens=64))[0]
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    assert together == alone
    assert len(set(alone)) > 1


def test_no_questions_no_answers(untrained: tuple[PaliGemma, Processor]) -> None:
    assert answer_all(*untrained, [], [], progress=False) == []


def test_the_whole_table(untrained: tuple[PaliGemma, Processor], monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers known in advance, for the one split right and for the other wrong."""
    asked: list[list[str]] = []

    def answer(model: Any, processor: Any, pictures: Any, prompts: list[str], progress: Any) -> list[str]:
        asked.append(prompts)
        assert all(picture.size == (16, 16) for picture in pictures)
        questions = make_questions(6, 3, "test", 16) if len(asked) == 1 else []
        return [q.example.suffix for q in questions] or ["?"] * len(prompts)

    monkeypatch.setattr(evaluation, "answer_all", answer)
    table = evaluate(*untrained, scenes=6, seed=3, progress=False)
    assert list(table) == ["held_out", "unseen_pairs"]
    assert table["held_out"]["all questions"].value == 1
    assert table["unseen_pairs"]["all questions"].value == 0
    assert asked[0] == [q.example.prefix for q in make_questions(6, 3, "test", 16)]
    assert asked[1] == [q.example.prefix for q in make_questions(6, 3, "unseen", 16)]

    plain = json.loads(json.dumps(as_json(table)))
    assert plain["held_out"]["exact caption"] == {"value": 1.0, "majority": 0.1667, "cases": 6}
    assert list(plain["held_out"]) == list(table["held_out"])

    lines = as_text(table).splitlines()
    assert lines[0] == "| | held-out scenes | unseen pairs | majority | cases |"
    assert lines[1] == "|---|---|---|---|---|"
    assert len(lines) == 2 + len(table["held_out"])
    assert "| exact caption | 1.000 | 0.000 | 0.167 | 6 |" in lines


def test_an_evaluation_is_deterministic(untrained: tuple[PaliGemma, Processor]) -> None:
    first, again = (evaluate(*untrained, scenes=2, seed=1, progress=False) for _ in range(2))
    assert first == again
