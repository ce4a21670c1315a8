"""How well found things fit the wanted ones: overlaps, matching, and COCO's average precision.

Recall asks how many of the wanted things were found, precision how many of the found ones were wanted. A
model can trade one for the other by pointing at more or at fewer things. Average precision looks at the whole
trade-off: it takes boxes from the surest to the least sure, and asks at each recall how precise one can be.
The definition is that of COCO (https://arxiv.org/abs/1405.0312), whose program gives the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivlm.processing import Box

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # of IoU
RECALLS = np.linspace(0.0, 1.0, 101)  # where precision is read off
MOST_BOXES = 100  # for one name in one picture; less sure ones are left out

AnyBox = Sequence[float] | Box
Overlap = Callable[[Any, Any], float]  # intersection over union of two things


def box_iou(a: AnyBox, b: AnyBox) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    ax0, ay0, ax1, ay1 = a[:4]
    bx0, by0, bx1, by1 = b[:4]
    overlap = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    return float(overlap / union) if union > 0 else 0.0


def match(ious: Sequence[Sequence[float]]) -> list[float]:
    """IoU of each wanted thing with its match: best pairs first, each found thing used once, 0 without one.

    Args:
        ious: a row for each wanted thing, a column for each found one.
    """
    pairs = [(iou, i, j) for i, row in enumerate(ious) for j, iou in enumerate(row)]
    matched: dict[int, float] = {}
    used: set[int] = set()
    for iou, i, j in sorted(pairs, reverse=True):
        if i not in matched and j not in used:
            matched[i] = iou
            used.add(j)
    return [matched.get(i, 0.0) for i in range(len(ious))]


def match_boxes(wanted: Sequence[AnyBox], found: Sequence[AnyBox]) -> list[float]:
    """IoU of each wanted box with its match, as in `match`."""
    return match([[box_iou(box, other) for other in found] for box in wanted])


@dataclass(frozen=True)
class Detection:
    """What was asked for in one picture, what was found, and how sure the model was of each found thing."""

    name: str
    wanted: Sequence[Any]
    found: Sequence[Any]
    scores: Sequence[float]  # one for each found thing
    overlap: Overlap = box_iou  # another for things that are no boxes


def best_overlaps(detection: Detection) -> list[float]:
    """IoU of each wanted thing with its match, as in `match`."""
    return match(
        [[detection.overlap(thing, other) for other in detection.found] for thing in detection.wanted]
    )


def average_precision(
    detections: Sequence[Detection], thresholds: Sequence[float] = COCO_THRESHOLDS
) -> float:
    """COCO's AP: the mean over names and thresholds of IoU; 0 where nothing was wanted.

    A name that is wanted in no picture does not count, whatever was found for it.
    """
    by_name: dict[str, list[Detection]] = defaultdict(list)
    for detection in detections:
        by_name[detection.name].append(detection)
    wanted = [group for group in by_name.values() if any(detection.wanted for detection in group)]
    return float(np.mean([_of_one_name(group, t) for group in wanted for t in thresholds])) if wanted else 0.0


def _of_one_name(detections: Sequence[Detection], threshold: float) -> float:
    """Mean of the precisions that can be reached at 101 recalls."""
    hits = [hit for detection in detections for hit in _hits(detection, threshold)]
    surest_first = np.argsort([-score for score, _ in hits], kind="stable")
    right = np.cumsum([hits[i][1] for i in surest_first])
    recall = right / sum(len(detection.wanted) for detection in detections)
    precision = right / np.arange(1, len(hits) + 1)
    # More boxes can be more precise. A recall then counts with the best precision at it or beyond.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(recall, RECALLS)  # the first box at which a recall is reached
    return float(np.append(precision, 0.0)[reached].mean())


def _hits(detection: Detection, threshold: float) -> list[tuple[float, bool]]:
    """Score of each found box, surest first, and whether it hits a wanted one that no surer box has hit."""
    free = list(detection.wanted)
    hits = []
    surest_first = sorted(range(len(detection.found)), key=lambda i: -detection.scores[i])
    for i in surest_first[:MOST_BOXES]:
        ious = [detection.overlap(thing, detection.found[i]) for thing in free]
        best = max(range(len(free)), key=lambda k: (ious[k], k), default=None)  # of equals the last, as COCO
        hit = best is not None and ious[best] >= threshold
        if best is not None and hit:
            del free[best]
        hits.append((detection.scores[i], hit))
    return hits
