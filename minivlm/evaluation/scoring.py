"""From answers to numbers: exact match for words, overlap for boxes and masks.

Each number comes with that of the majority baseline, which is scored by the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from minivlm.evaluation.baselines import WITH_BOXES, majority_answers
from minivlm.evaluation.detection import Detection, average_precision, best_overlaps, match
from minivlm.evaluation.tables import Metric
from minivlm.processing import mask_iou, text_to_boxes, text_to_masks
from minivlm.world.questions import QUESTION_TASKS, TASKS, Example
from minivlm.world.scenes import WORLD, Scene

# Masks are compared in a picture larger than the model's, where the edge of a small mask is no matter of
# rounding. Even so, the true answers overlap by only .94 with the things: 16 words cannot say more.
MASK_SIDE = 4 * int(WORLD)


@dataclass(frozen=True)
class Question:
    """A picture, what is asked about it, and which scene it shows."""

    scene: Scene
    picture: Image.Image
    example: Example


def score(
    questions: Sequence[Question], answers: Sequence[str], sureness: Sequence[Sequence[float]] | None = None
) -> dict[str, Metric]:
    """Metrics of answers to questions, with those of the majority baseline.

    Args:
        sureness: for each answer to `detect`, the scores of its boxes; None takes all boxes as equally sure.
    """
    examples = [question.example for question in questions]
    values = _values(examples, answers, sureness)
    majority = _values(examples, majority_answers(examples), None)
    return {name: Metric(value, majority[name][0], cases) for name, (value, cases) in values.items()}


def _values(
    examples: Sequence[Example], answers: Sequence[str], sureness: Sequence[Sequence[float]] | None
) -> dict[str, tuple[float, int]]:
    """By row, the value and the number of cases."""
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    nothing: list[bool] = []
    for example, answer in zip(examples, answers, strict=True):
        right[example.task].append(answer == example.suffix)
        if example.task in WITH_BOXES and not example.things:
            nothing.append(not text_to_boxes(answer, WORLD, WORLD))
    values = {task: mean_of(right[task]) for task in QUESTION_TASKS}
    values["all questions"] = mean_of([hit for task in QUESTION_TASKS for hit in right[task]])
    values["exact caption"] = mean_of(right["caption"])
    values |= box_values(_detections(examples, answers, sureness))
    values["nothing to detect"] = mean_of(nothing)
    values["mask mean IoU"] = mean_of(_mask_ious(examples, answers))
    return values


def _detections(
    examples: Sequence[Example], answers: Sequence[str], sureness: Sequence[Sequence[float]] | None
) -> list[Detection]:
    detections = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        if example.task == "detect":
            found = text_to_boxes(answer, WORLD, WORLD)
            scores = [1.0] * len(found) if sureness is None else sureness[number]
            wanted = [thing.box for thing in example.things]
            detections.append(Detection(example.prefix, wanted, found, scores))
    return detections


def box_values(detections: Sequence[Detection]) -> dict[str, tuple[float, int]]:
    """Of boxes, by row, the value and the number of cases."""
    ious = [iou for detection in detections for iou in best_overlaps(detection)]
    hits = [iou >= 0.5 for iou in ious]
    found_boxes = sum(len(detection.found) for detection in detections)
    return {
        "box mean IoU": mean_of(ious),
        "box recall at 0.5": mean_of(hits),
        "box precision at 0.5": (sum(hits) / max(found_boxes, 1), found_boxes),
        "average precision at 0.5": (average_precision(detections, [0.5]), len(ious)),
        "average precision 0.5:0.95": (average_precision(detections), len(ious)),
    }


def mask_values(detections: Sequence[Detection]) -> dict[str, tuple[float, int]]:
    """Of masks, by row, the value and the number of cases."""
    ious = [iou for detection in detections for iou in best_overlaps(detection)]
    return {
        "mask mean IoU": mean_of(ious),
        "mask average precision at 0.5": (average_precision(detections, [0.5]), len(ious)),
        "mask average precision 0.5:0.95": (average_precision(detections), len(ious)),
    }


def _mask_ious(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """One for each thing to segment, 0 where no mask was given for it."""
    ious = []
    for example, answer in zip(examples, answers, strict=True):
        if example.task == "segment" and example.things:
            wanted = [thing.mask(MASK_SIDE) for thing in example.things]
            ious += match([[mask_iou(mask, found) for found in _masks(answer)] for mask in wanted])
    return ious


@lru_cache(maxsize=8)
def _masks(answer: str) -> list[np.ndarray]:
    """The masks in an answer; cached, since a baseline gives the same answer again and again."""
    return [found.mask for found in text_to_masks(answer, MASK_SIDE, MASK_SIDE)]


def mean_of(values: Sequence[float]) -> tuple[float, int]:
    """The mean, 0 of nothing, and the number of cases."""
    return float(sum(values) / max(len(values), 1)), len(values)
