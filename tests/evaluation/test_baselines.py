"""What needs no picture: baselines give the answers that they say, and never look."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from minivlm.evaluation import baselines, make_questions
from minivlm.evaluation.baselines import TRAINING_SCENES, majority_answers, text_only_answers
from minivlm.evaluation.columns import EVALUATION_STREAM
from minivlm.processing import mask_iou, text_to_boxes, text_to_masks
from minivlm.world.questions import QUESTION_TASKS, TASKS, Example, ask
from minivlm.world.scenes import COLORS, WORLD, Thing, make_scene


def thing(x: float, y: float = 20.0, radius: float = 7.0) -> Thing:
    return Thing("circle", "red", "small", x, y, radius, COLORS["red"])


def test_majority_is_the_most_frequent_answer_to_the_task() -> None:
    asked = [Example("color", "?", color) for color in ("red", "blue", "blue", "green")]
    asked += [Example("existence", "?", answer) for answer in ("no", "yes", "no")]
    assert majority_answers(asked) == ["blue"] * 4 + ["no"] * 3
    assert majority_answers([]) == []


def test_majority_points_at_the_mean_box() -> None:
    asked = [
        Example("detect", "?", "", (thing(10), thing(30))),
        Example("detect", "?", "", (thing(50, radius=10),)),
        Example("detect", "?", "none"),
        Example("segment", "?", "", (thing(12),)),
    ]
    answers = majority_answers(asked)
    assert len(set(answers[:3])) == 1  # whether there is something or not
    (box,) = text_to_boxes(answers[0], WORLD, WORLD)
    assert box[:4] == pytest.approx((22, 12, 38, 28), abs=0.05)  # of three things, the third larger
    (mask,) = text_to_masks(answers[3], 256, 256)
    assert mask.box[:4] == pytest.approx((20, 52, 76, 108), abs=0.2)
    filled = np.zeros((256, 256), dtype=bool)
    filled[52:108, 20:76] = True
    assert mask_iou(mask.mask, filled) > 0.9


def test_majority_without_any_box_says_none() -> None:
    assert majority_answers([Example("detect", "?", "none")]) == ["none"]


@pytest.fixture(scope="module")
def training() -> list[Example]:
    """The questions that the text-only answerer has read, drawn a second time."""
    read = []
    for number in range(TRAINING_SCENES):
        rng = np.random.default_rng([0, number])
        scene = make_scene(rng, "train")
        read += [ask(scene, task, rng) for task in TASKS]
    return [example for example in read if example is not None]


def test_text_only_is_the_most_frequent_answer_to_the_prompt(training: list[Example]) -> None:
    prompts = ("how many objects are there?", "what color is the star?", "is there an orange square?")
    for prompt in prompts:
        seen = Counter(example.suffix for example in training if example.prefix == prompt)
        assert seen.total() > 10
        (answer,) = text_only_answers([Example("color", prompt, "")])
        assert seen[answer] == max(seen.values())
    (answer,) = text_only_answers([Example("caption", "caption en", "")])
    seen = Counter(example.suffix for example in training if example.task == "caption")
    assert seen[answer] == max(seen.values())


def test_text_only_answers_unknown_prompts_by_task(training: list[Example]) -> None:
    for task in QUESTION_TASKS:
        seen = Counter(example.suffix for example in training if example.task == task)
        (answer,) = text_only_answers([Example(task, "is the blue star above the red square?!", "")])
        assert seen[answer] == max(seen.values())


def test_text_only_points_at_the_mean_box_of_training(training: list[Example]) -> None:
    for task in ("detect", "segment"):
        boxes = [thing.box for example in training if example.task == task for thing in example.things]
        answers = text_only_answers([Example(task, f"{task} {name}", "") for name in ("red circle", "dog")])
        assert answers[0] == answers[1]
        (box,) = text_to_boxes(answers[0], WORLD, WORLD)
        assert box[:4] == pytest.approx(np.mean(boxes, axis=0), abs=0.05)
    assert len(text_to_masks(answers[0], 64, 64)) == 1


def test_text_only_reads_training_scenes_only_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    baselines._learned.cache_clear()
    drawn = []

    def spy(rng: np.random.Generator, split: str) -> object:
        drawn.append(split)
        return make_scene(rng, "train")

    monkeypatch.setattr(baselines, "make_scene", spy)
    monkeypatch.setattr(baselines, "TRAINING_SCENES", 20)
    asked = [Example("count", "how many objects are there?", "")]
    assert text_only_answers(asked) == text_only_answers(asked)
    assert drawn == ["train"] * 20
    baselines._learned.cache_clear()
    assert TRAINING_SCENES < EVALUATION_STREAM


def test_text_only_never_sees_the_true_answer() -> None:
    asked = [question.example for question in make_questions(20, 1, "test", 8)]
    blind = [Example(example.task, example.prefix, "") for example in asked]
    assert text_only_answers(asked) == text_only_answers(blind)
    right = [answer == e.suffix for answer, e in zip(text_only_answers(asked), asked, strict=True)]
    assert 0.1 < np.mean(right) < 0.5
