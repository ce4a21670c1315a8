"""On which lines the best state of a run can be chosen, and by which metric."""

from __future__ import annotations

from collections.abc import Sequence

from minivlm.data.overlap import name_overlap, overlap
from minivlm.data.samples import Sample
from minivlm.errors import InputError
from minivlm.processing import text_to_boxes


def has_boxes(sample: Sample) -> bool:
    """Whether its answer has boxes, as words."""
    return bool(text_to_boxes(sample.suffix, 1, 1))


def check_choice(metric: str, samples: Sequence[Sample], validation: Sequence[Sample]) -> None:
    """Raises InputError: the best state cannot be chosen by this metric on these lines."""
    if not validation:
        raise InputError(f"the best state by {metric} is chosen on validation lines: add a file of them")
    if metric == "iou" and not any(map(has_boxes, validation)):
        raise InputError(
            "the best state by iou needs boxes, and no validation answer has one in <loc> words: choose loss "
            "or exact"
        )
    shared = overlap(validation, samples)
    if shared:
        raise InputError(
            f"training shows pictures of {len(shared)} validation lines, {name_overlap(shared)}, so the best "
            "state would be the one that knows them by heart: divide the file with `minivlm data split`"
        )
