"""The measures measure: hand-made answers get the scores that can be worked out with a pencil."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
from PIL import Image

from minivlm.evaluation import make_questions
from minivlm.evaluation.detection import box_iou
from minivlm.evaluation.scoring import MASK_SIDE, Question, score
from minivlm.evaluation.tables import Metric
from minivlm.processing import Box, boxes_to_text, mask_iou, text_to_boxes, text_to_masks
from minivlm.world.questions import QUESTION_TASKS, Example, segmentation_text
from minivlm.world.scenes import COLORS, WORLD, Scene, Thing

ROWS = [
    *QUESTION_TASKS,
    "all questions",
    "exact caption",
    "box mean IoU",
    "box recall at 0.5",
    "box precision at 0.5",
    "average precision at 0.5",
    "average precision 0.5:0.95",
    "nothing to detect",
    "mask mean IoU",
]


def thing(color: str, shape: str, x: float) -> Thing:
    return Thing(shape, color, "small", x, 20.0, 7.0, COLORS[color])


CIRCLE, SQUARE, TWIN = thing("red", "circle", 10), thing("blue", "square", 30), thing("red", "circle", 50)
SCENE = Scene((CIRCLE, SQUARE, TWIN), 200, 0.0, 0)


def question(task: str, suffix: str, *things: Thing, name: str = "red circle") -> Question:
    return Question(SCENE, Image.new("RGB", (8, 8)), Example(task, f"{task} {name}", suffix, things))


def box_text(*boxes: tuple[float, float, float, float]) -> str:
    return boxes_to_text([Box(*box, "red circle") for box in boxes], WORLD, WORLD)


# Words


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


def test_majority_is_what_always_the_same_answer_reaches() -> None:
    asked = make_questions(60, 2, "test", 16)
    metrics = score(asked, ["yes"] * len(asked))
    for task in ("existence", "relation"):
        yes = metrics[task].value
        assert metrics[task].baseline == pytest.approx(max(yes, 1 - yes))


# Boxes


def test_scores_of_boxes() -> None:
    x0, y0, x1, y1 = CIRCLE.box
    half = (x0, y0, x1, (y0 + y1) / 2)
    most = (x0, y0, x1, y0 + 0.7 * (y1 - y0))
    asked = [
        question("detect", "", CIRCLE, TWIN),
        question("detect", "", CIRCLE, TWIN),
        question("detect", "", SQUARE),
        question("detect", "none"),
        question("detect", "none"),
    ]
    answers = [
        box_text(TWIN.box, CIRCLE.box),  # 1, 1
        box_text(most, half),  # .7, 0; the second box is one too many
        "red",  # 0
        "none",
        box_text(CIRCLE.box),  # one too many
    ]
    metrics = score(asked, answers)
    assert metrics["box mean IoU"].value == pytest.approx(2.7 / 5, abs=0.01)
    assert metrics["box mean IoU"].cases == 5
    assert (metrics["box recall at 0.5"].value, metrics["box recall at 0.5"].cases) == (3 / 5, 5)
    assert (metrics["box precision at 0.5"].value, metrics["box precision at 0.5"].cases) == (3 / 5, 5)
    assert metrics["nothing to detect"] == Metric(0.5, 0.0, 2)
    fewer = score(asked, ["none", *answers[1:]])
    assert (fewer["box recall at 0.5"].value, fewer["box recall at 0.5"].cases) == (1 / 5, 5)
    assert (fewer["box precision at 0.5"].value, fewer["box precision at 0.5"].cases) == (1 / 3, 3)
    nothing = score(asked, ["none"] * 5)
    assert (nothing["box precision at 0.5"].value, nothing["box precision at 0.5"].cases) == (0, 0)


def test_half_a_box_is_enough() -> None:
    x0, y0, x1, y1 = CIRCLE.box
    for share, hit in ((0.48, 0), (0.52, 1)):
        answer = box_text((x0, y0, x1, y0 + share * (y1 - y0)))
        metrics = score([question("detect", "", CIRCLE)], [answer])
        assert metrics["box recall at 0.5"].value == metrics["box precision at 0.5"].value == hit
        assert metrics["average precision at 0.5"].value == pytest.approx(hit)


def test_average_precision_asks_the_surest_first() -> None:
    """A right and a wrong box: which is surer decides. Words of other tasks have no scores."""
    asked = [question("color", "red"), question("detect", "", CIRCLE)]
    answers = ["red", box_text(TWIN.box, CIRCLE.box)]
    for sureness, wanted in (([0.3, 0.9], 1.0), ([0.9, 0.3], 0.5)):
        metrics = score(asked, answers, [[], sureness])
        assert metrics["average precision at 0.5"].value == pytest.approx(wanted)
        assert metrics["average precision 0.5:0.95"].value == pytest.approx(wanted)
    assert score(asked, answers)["average precision at 0.5"].value == pytest.approx(0.5)  # as they stand


def test_average_precision_is_a_mean_of_names() -> None:
    asked = [question("detect", "", CIRCLE) for _ in range(3)]
    asked.append(question("detect", "", SQUARE, name="blue square"))
    metrics = score(asked, [box_text(CIRCLE.box)] * 3 + ["none"])
    assert metrics["average precision at 0.5"].value == pytest.approx(1 / 2)
    assert metrics["average precision at 0.5"].cases == 4
    assert metrics["box recall at 0.5"].value == pytest.approx(3 / 4)


def test_the_majority_baseline_of_boxes_is_the_mean_box() -> None:
    asked = [
        question("detect", "", CIRCLE),
        question("detect", "", TWIN),
        question("detect", "", CIRCLE, TWIN),
    ]
    metrics = score(asked, ["none"] * 3)
    mean = tuple(np.mean([CIRCLE.box, TWIN.box], axis=0))  # two of each
    first = box_iou(CIRCLE.box, mean)
    # One box for each prompt: of the two things that the last one asks for, it can match only one.
    assert metrics["box mean IoU"].baseline == pytest.approx(3 * first / 4, abs=0.002)
    assert metrics["box mean IoU"].value == 0
    alike = score(asked[:1] * 3, ["none"] * 3)
    assert alike["box mean IoU"].baseline > 0.99
    for row in ("box recall at 0.5", "box precision at 0.5", "average precision at 0.5"):
        assert alike[row].baseline == pytest.approx(1)
    twice = score([asked[2]] * 3, ["none"] * 3)
    assert twice["box recall at 0.5"].baseline == 0


# Masks


def test_scores_of_masks() -> None:
    asked = [
        question("segment", "", CIRCLE, TWIN),
        question("segment", "", SQUARE),
        question("segment", "none"),
    ]
    right = [segmentation_text([TWIN, CIRCLE]), segmentation_text([SQUARE]), "none"]
    ious = [
        mask_iou(text_to_masks(segmentation_text([one]), MASK_SIDE, MASK_SIDE)[0].mask, one.mask(MASK_SIDE))
        for one in (CIRCLE, TWIN, SQUARE)
    ]
    assert min(ious) > 0.85
    metrics = score(asked, right)
    assert metrics["mask mean IoU"].value == pytest.approx(np.mean(ious))
    assert metrics["mask mean IoU"].cases == 3
    for answer, left in (
        (segmentation_text([CIRCLE]), [ious[0], ious[2]]),  # one of two
        (segmentation_text([CIRCLE, CIRCLE]), [ious[0], ious[2]]),  # one of two, twice
        (box_text(CIRCLE.box, TWIN.box), [ious[2]]),  # boxes are no masks
        ("none", [ious[2]]),
    ):
        assert score(asked, [answer, *right[1:]])["mask mean IoU"].value == pytest.approx(sum(left) / 3)


def test_a_mask_of_another_shape_overlaps_less() -> None:
    asked = [question("segment", "", CIRCLE)]
    as_star = segmentation_text([replace(CIRCLE, shape="star")])
    values = [score(asked, [text])["mask mean IoU"].value for text in (segmentation_text([CIRCLE]), as_star)]
    assert values[0] > 0.85
    assert 0.2 < values[1] < 0.6


def test_the_majority_baseline_of_masks_is_the_mean_box_filled() -> None:
    """A square fills its box, a circle of the same box .785 of it."""
    squares = score([question("segment", "", SQUARE)], ["none"])
    assert squares["mask mean IoU"].baseline > 0.9
    circles = score([question("segment", "", CIRCLE)], ["none"])
    assert circles["mask mean IoU"].baseline == pytest.approx(np.pi / 4, abs=0.05)


# All rows


def test_nothing_to_detect_counts_both_tasks() -> None:
    asked = [question("detect", "none"), question("segment", "none"), question("segment", "", CIRCLE)]
    for answers, wanted in (
        (["none", "none", "none"], 1),
        (["", "red", "none"], 1),  # no box is no box
        (["none", segmentation_text([CIRCLE]), "none"], 0.5),
        ([box_text(CIRCLE.box), box_text(CIRCLE.box), "none"], 0),
    ):
        metric = score(asked, answers)["nothing to detect"]
        assert (metric.value, metric.cases) == (wanted, 2)


def test_the_right_answers_have_full_marks_and_no_answers_none() -> None:
    asked = make_questions(40, 1, "test", 16)
    right = score(asked, [q.example.suffix for q in asked])
    assert list(right) == ROWS
    nearly = {"box mean IoU": 0.97, "average precision 0.5:0.95": 0.99, "mask mean IoU": 0.9}
    assert all(metric.value == pytest.approx(1) for name, metric in right.items() if name not in nearly)
    assert all(least < right[name].value <= 1 for name, least in nearly.items())
    wrong = score(asked, [""] * len(asked))
    assert all(metric.value == 0 for name, metric in wrong.items() if name != "nothing to detect")
    assert all(metric.baseline == wrong[name].baseline for name, metric in right.items())
    assert all(0 <= metric.baseline < 0.75 for metric in right.values())
    assert right["nothing to detect"].cases > 0


def test_every_row_falls_when_an_answer_is_spoiled() -> None:
    """From all right to all wrong, one answer after the other, no number ever rises."""
    asked = make_questions(6, 3, "test", 16)
    answers = [q.example.suffix for q in asked]
    spoiled = accumulate(range(len(asked)), lambda some, i: [*some[:i], "?", *some[i + 1 :]], initial=answers)
    tables = [score(asked, some) for some in spoiled]
    for name in ROWS:
        values = [table[name].value for table in tables]
        if name == "nothing to detect":
            continue
        if name != "box precision at 0.5":  # which has fewer and fewer boxes to be right about
            assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values)), name
        assert values[0] > 0.9
        assert values[-1] == 0


def test_answers_and_questions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score([question("color", "red")], [])


def test_boxes_are_read_in_units_of_the_world() -> None:
    (box,) = text_to_boxes(box_text(SQUARE.box), WORLD, WORLD)
    assert box[:4] == pytest.approx(SQUARE.box, abs=0.05)
    assert score([question("detect", "", SQUARE)], [box_text(SQUARE.box)])["box mean IoU"].value > 0.98
