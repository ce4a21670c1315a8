"""Overlaps, matching and average precision: worked out with a pencil, and equal to COCO's own program."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area, encode

import minivlm
from minivlm.evaluation import make_questions
from minivlm.evaluation.answers import answer_all, box_scores
from minivlm.evaluation.detection import (
    COCO_THRESHOLDS,
    Detection,
    average_precision,
    box_iou,
    match,
    match_boxes,
)
from minivlm.processing import Box, mask_iou, text_to_boxes
from minivlm.world.scenes import WORLD

# Overlap


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


# Matching

LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)
NEAR_LEFT = (0.0, 0.0, 10.0, 8.0)  # IoU .8 with LEFT
FAR_LEFT = (0.0, 0.0, 10.0, 6.0)  # IoU .6 with LEFT


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


def test_matching_takes_any_overlaps() -> None:
    assert match([]) == []
    assert match([[], []]) == [0, 0]
    assert match([[0.9, 0.8], [0.7, 0.1]]) == [0.9, 0.1]  # the best pair first, though .8 + .7 is more


# Average precision, with a pencil


def detection(name: str, wanted: list[Any], *found: tuple[Any, float]) -> Detection:
    return Detection(name, wanted, [box for box, _ in found], [score for _, score in found])


def test_perfect_and_useless() -> None:
    perfect = [detection("a", [LEFT, RIGHT], (RIGHT, 0.2), (LEFT, 0.9)), detection("b", [LEFT], (LEFT, 0.1))]
    assert average_precision(perfect) == pytest.approx(1)
    assert average_precision([detection("a", [LEFT])]) == 0
    assert average_precision([detection("a", [LEFT], (RIGHT, 0.9))]) == 0
    assert average_precision([]) == 0


def test_what_comes_after_a_hit_costs_nothing_and_what_comes_before_does() -> None:
    """One wanted box: recall is 0 or 1, and precision at 1 is all that counts."""
    after = detection("a", [LEFT], (LEFT, 0.9), (RIGHT, 0.8))
    before = detection("a", [LEFT], (LEFT, 0.8), (RIGHT, 0.9))
    assert average_precision([after], [0.5]) == pytest.approx(1)
    assert average_precision([before], [0.5]) == pytest.approx(1 / 2)
    # The same across pictures: sureness is compared there too.
    elsewhere = detection("a", [], (RIGHT, 0.85))
    assert average_precision([detection("a", [LEFT], (LEFT, 0.9)), elsewhere], [0.5]) == pytest.approx(1)
    assert average_precision([detection("a", [LEFT], (LEFT, 0.8)), elsewhere], [0.5]) == pytest.approx(1 / 2)


def test_half_of_the_wanted_boxes_is_half_of_the_recalls() -> None:
    """51 of the 101 recalls, 0 to .50, are reached."""
    assert average_precision([detection("a", [LEFT, RIGHT], (LEFT, 0.9))], [0.5]) == pytest.approx(51 / 101)


def test_a_recall_counts_with_the_best_precision_beyond_it() -> None:
    """Wrong, right, right: at recall .5 precision is 1/2, but at recall 1 it is 2/3."""
    boxes = detection("a", [LEFT, RIGHT], ((50, 50, 60, 60), 0.9), (LEFT, 0.8), (RIGHT, 0.7))
    assert average_precision([boxes], [0.5]) == pytest.approx(2 / 3)


def test_a_thing_is_hit_once() -> None:
    """The second box on the same thing is wrong, however well it fits."""
    twice = detection("a", [LEFT, RIGHT], (NEAR_LEFT, 0.9), (LEFT, 0.8), (RIGHT, 0.7))
    assert average_precision([twice], [0.5]) == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)


def test_thresholds_are_passed_by_overlap() -> None:
    assert pytest.approx(np.arange(0.5, 1.0, 0.05)) == COCO_THRESHOLDS
    near = [detection("a", [LEFT], (NEAR_LEFT, 0.9))]
    assert average_precision(near, [0.8]) == 1  # at the threshold is enough
    assert average_precision(near, [0.81]) == 0
    assert average_precision(near) == pytest.approx(7 / 10)  # .50 to .80


def test_every_name_counts_alike() -> None:
    """However often it is wanted; a name that is wanted nowhere does not count."""
    often = [detection("often", [LEFT], (LEFT, 0.9)) for _ in range(9)]
    seldom, never = detection("seldom", [LEFT]), detection("never", [], (LEFT, 0.9))
    assert average_precision([*often, seldom, never], [0.5]) == pytest.approx(1 / 2)


# Average precision, by COCO's program


def coco_average_precision(
    detections: list[tuple[int, Detection]], kind: str = "bbox"
) -> tuple[float, float]:
    """AP over all thresholds and at .5 of detections with the number of their picture."""
    names = sorted({one.name for _, one in detections})

    def row(picture: int, name: str, thing: Any) -> dict[str, Any]:
        about = {"image_id": picture, "category_id": names.index(name) + 1}
        if kind == "segm":
            return about | {"segmentation": encode(np.asfortranarray(thing, dtype=np.uint8))}
        x0, y0, x1, y1 = (float(edge) for edge in thing[:4])
        return about | {"bbox": [x0, y0, x1 - x0, y1 - y0]}

    truth = [row(picture, one.name, box) for picture, one in detections for box in one.wanted]
    found = [
        row(picture, one.name, box) | {"score": score}
        for picture, one in detections
        for box, score in zip(one.found, one.scores, strict=True)
    ]
    for rows in (truth, found):
        for number, one in enumerate(rows, start=1):
            size = area(one["segmentation"]) if kind == "segm" else one["bbox"][2] * one["bbox"][3]
            one |= {"id": number, "iscrowd": 0, "area": float(size)}
    both = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (truth, found):
            coco = COCO()
            coco.dataset = {
                "images": [
                    {"id": picture, "height": 48, "width": 48}  # of masks
                    for picture in sorted({picture for picture, _ in detections})
                ],
                "categories": [{"id": number} for number, _ in enumerate(names, start=1)],
                "annotations": rows,
            }
            coco.createIndex()
            both.append(coco)
        run = COCOeval(*both, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])


def assert_equals_coco(detections: list[tuple[int, Detection]], kind: str = "bbox") -> None:
    ours = [one for _, one in detections]
    wanted, wanted_at_half = coco_average_precision(detections, kind)
    if not any(one.wanted for one in ours):
        assert (wanted, wanted_at_half) == (-1, -1)  # COCO's way to say that nothing was wanted
        wanted = wanted_at_half = 0.0
    assert average_precision(ours) == pytest.approx(wanted, abs=1e-9)
    assert average_precision(ours, [0.5]) == pytest.approx(wanted_at_half, abs=1e-9)


@st.composite
def some_detections(draw: st.DrawFn) -> list[tuple[int, Detection]]:
    """Some pictures with some names; found boxes are often wanted ones, moved a little; many equal scores."""
    edge, small, step = st.integers(0, 20), st.integers(2, 12), st.integers(-2, 2)
    detections = []
    for picture in range(draw(st.integers(1, 4))):
        for name in "abc"[: draw(st.integers(1, 3))]:
            wanted = [
                (x, y, x + w, y + h)
                for x, y, w, h in draw(st.lists(st.tuples(edge, edge, small, small), max_size=4))
            ]
            found = [
                (x, y, x + w, y + h)
                for x, y, w, h in draw(st.lists(st.tuples(edge, edge, small, small), max_size=2))
            ]
            for x0, y0, x1, y1 in draw(st.lists(st.sampled_from(wanted), max_size=5)) if wanted else []:
                dx, dy = draw(st.tuples(step, step))
                found.append((x0 + dx, y0, x1, y1 + dy))
            found = [(x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)) for x0, y0, x1, y1 in found]
            scores = draw(
                st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.9]), min_size=len(found), max_size=len(found))
            )
            detections.append((picture, Detection(name, wanted, found, scores)))
    return detections


@settings(max_examples=200, deadline=None)
@given(some_detections())
def test_average_precision_is_that_of_coco(detections: list[tuple[int, Detection]]) -> None:
    assert_equals_coco(detections)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_coco_on_many_pictures(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def near(box: tuple[float, ...], distance: float) -> tuple[float, ...]:
        x0, y0, x1, y1 = np.array(box) + rng.normal(0, distance, size=4)
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)

    detections = []
    for picture in range(60):
        for name in rng.choice(list("abcde"), size=2, replace=False):
            wanted = [
                (x, y, x + w, y + h)
                for x, y, w, h in rng.uniform([0, 0, 4, 4], [40, 40, 24, 24], size=(rng.integers(4), 4))
            ]
            found = [near(box, 1.0) for box in wanted if rng.random() < 0.8]
            found += [near(box, 2.5) for box in wanted if rng.random() < 0.4]
            scores = rng.random(len(found)).round(int(rng.integers(1, 5))).tolist()
            detections.append((picture, Detection(str(name), wanted, found, scores)))
    assert 0.2 < average_precision([one for _, one in detections]) < 0.8
    assert_equals_coco(detections)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_of_masks_is_that_of_coco(seed: int) -> None:
    """Of ellipses. Overlaps of their boxes would give another number."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]

    def blob(middle: Any, radius: Any) -> np.ndarray:
        return ((x - middle[0]) / radius[0]) ** 2 + ((y - middle[1]) / radius[1]) ** 2 <= 1

    detections, of_boxes = [], []
    for picture in range(40):
        places = [(rng.uniform(12, 36, size=2), rng.uniform(4, 10, size=2)) for _ in range(rng.integers(4))]
        near = [(m + rng.normal(0, 1, size=2), r * rng.uniform(0.9, 1.1, size=2)) for m, r in places]
        far = [(rng.uniform(12, 36, size=2), rng.uniform(4, 10, size=2)) for _ in range(rng.integers(2))]
        wanted, found = [blob(*one) for one in places], [blob(*one) for one in (*near, *far)]
        scores = rng.random(len(found)).round(1).tolist()
        detections.append((picture, Detection("blob", wanted, found, scores, mask_iou)))
        boxes = [[(*(m - r), *(m + r)) for m, r in some] for some in (places, [*near, *far])]
        of_boxes.append(Detection("blob", *boxes, scores))
    ap = average_precision([one for _, one in detections])
    assert 0.2 < ap < 0.8
    assert abs(ap - average_precision(of_boxes)) > 1e-3
    assert_equals_coco(detections, "segm")


@pytest.mark.parametrize("other", [(4.0, 0.0, 14.0, 10.0), (0.0, 4.0, 10.0, 14.0)])
@pytest.mark.parametrize("first", [True, False])
def test_of_two_that_fit_alike_coco_takes_the_last(other: tuple[float, ...], first: bool) -> None:
    """The surest box lies halfway. The next one fits one of the two wanted, which may be gone."""
    middle = tuple((a + b) / 2 for a, b in zip(LEFT, other, strict=True))
    wanted = [LEFT, other] if first else [other, LEFT]
    detections = [(0, detection("a", wanted, (middle, 0.9), (LEFT, 0.8)))]
    assert average_precision([detections[0][1]], [0.5]) == pytest.approx(1 if first else 51 / 101)
    assert_equals_coco(detections)


def test_no_more_than_a_hundred_boxes_count() -> None:
    """The surest hundred of one name in one picture."""
    wrong = [((40.0 + i, 40.0, 45.0 + i, 45.0), 0.5 + i / 1000) for i in range(100)]
    assert_equals_coco(
        [(0, detection("a", [LEFT], *wrong, (LEFT, 0.1))), (1, detection("a", [LEFT], (LEFT, 0.9)))]
    )
    assert_equals_coco(
        [(0, detection("a", [LEFT], *wrong, (LEFT, 0.51))), (1, detection("a", [LEFT], (LEFT, 0.9)))]
    )


def test_average_precision_is_that_of_coco_on_real_answers() -> None:
    model, processor = minivlm.load()
    questions = make_questions(60, 8, "test", processor.image_processor.image_size)
    asked = [question for question in questions if question.example.task == "detect"]
    pictures, prompts = (
        [question.picture for question in asked],
        [question.example.prefix for question in asked],
    )
    answers = answer_all(model, processor, pictures, prompts, progress=False)
    scores = box_scores(model, processor, pictures, prompts, answers)
    detections = [
        (
            number,
            Detection(
                question.example.prefix,
                [thing.box for thing in question.example.things],
                text_to_boxes(answer, WORLD, WORLD),
                sure,
            ),
        )
        for number, (question, answer, sure) in enumerate(zip(asked, answers, scores, strict=True))
    ]
    assert average_precision([one for _, one in detections]) > 0.5
    assert_equals_coco(detections)
