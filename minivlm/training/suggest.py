"""Settings to begin with, from how many lines there are and how large the model is, each with its reason.

They are rules of thumb, no more: a first run that is likely to learn something and to end in time. What such
settings do to two small sets of pictures, bench/tuning_settings.py measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minivlm.checkpoints.devices import free_memory, gigabytes
from minivlm.data.samples import Sample
from minivlm.processing import text_to_boxes

LARGE = 1e8  # weights, from which on `Finetuning` takes the lower rate
STEPS = {False: 1500, True: 500}  # to aim at, for a small model and a large one
BATCH = 8
FEWEST, MOST = 3, 60  # epochs
FEW_LINES = 1000


@dataclass(frozen=True)
class Suggestion:
    """An option as it is typed, and why."""

    option: str
    value: str
    reason: str


def suggest(
    samples: Sequence[Sample],
    weights: int,
    validation: Path | None,
    *,
    knows_world: bool,
    device: str = "cpu",
) -> list[Suggestion]:
    """What to begin with.

    Args:
        weights: of the model.
        knows_world: whether it was trained on the drawn world.
    """
    large = weights > LARGE
    boxed = sum(bool(text_to_boxes(sample.suffix, 1, 1)) for sample in samples)
    epochs = min(max(math.ceil(STEPS[large] * BATCH / len(samples)), FEWEST), MOST)
    per_epoch = math.ceil(len(samples) / BATCH)
    found = [
        Suggestion("--batch-size", f"{BATCH}", "as is usual for so few pictures"),
        Suggestion(
            "--epochs",
            f"{epochs}",
            f"{len(samples)} lines are {per_epoch} steps each time: {epochs * per_epoch} steps in all",
        ),
    ]
    needed, free = 16 * weights, free_memory(device)
    if free is not None and needed > free / 2:
        reason = f"all weights in training take {gigabytes(needed)}, and {gigabytes(free)} are free"
        found.append(Suggestion("--lora", "16", reason))
    if len(samples) < FEW_LINES:
        reason = "with few pictures, shifted and smaller ones are new ones; boxes move along"
        found.append(Suggestion("--augment", "shift,zoom", reason))
    if validation is None:
        reason = "lines to measure on: `minivlm data split` makes them"
        found.append(Suggestion("--validation", "FILE.jsonl", reason))
    else:
        best = "iou" if boxed > len(samples) / 2 else "exact"
        reason = "most answers have boxes" if best == "iou" else "most answers are words"
        every = max(per_epoch, epochs * per_epoch // 20)
        found += [
            Suggestion("--best", best, reason),
            Suggestion("--measure-every", f"{every}", "about twenty times in the run"),
            Suggestion("--patience", "8", "of these measurements; then it hardly gets better"),
        ]
    if knows_world:
        found.append(
            Suggestion("--replay", "0.2", "so that the model keeps what it knows of the drawn world")
        )
    return found


def suggestions_as_text(found: Sequence[Suggestion]) -> str:
    """One line for each, reasons below each other."""
    typed = [f"{one.option} {one.value}" for one in found]
    width = max(map(len, typed))
    return "\n".join(f"  {left:<{width}}  {one.reason}" for left, one in zip(typed, found, strict=True))
