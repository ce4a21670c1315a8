"""Replay: rows of the drawn world between your own, so that a model does not forget what it could do.

A network that learns something new loses what it is no longer shown. Showing some of the old again, rehearsal
(A. Robins, 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"), is the simplest remedy. It needs
the old data. The drawn world is there for the asking, so this is for models that were trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minivlm.data.samples import Opened
from minivlm.errors import InputError
from minivlm.evaluation.answers import drawn_side, evaluate
from minivlm.evaluation.tables import Metric
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor
from minivlm.world.questions import TASKS, ask
from minivlm.world.scenes import make_scene

SCENES = 50  # that the world's accuracy is measured on
KNOWN = 0.6  # of its questions right; without looking, .36 can be reached
STREAM = 2**30  # of random numbers: [seed, stream, number of the row]

Scores = Mapping[str, Metric]


@dataclass(frozen=True)
class WorldRows:
    """Rows of the world for a batch of your own rows: a function of (seed, their numbers) alone.

    Args:
        share: of all rows of a run; from 0 to below 1.
        pixels: of a scene's side.
    """

    share: float
    seed: int
    pixels: int

    def __call__(self, first: int, last: int) -> list[Opened]:
        """Those that go with the own rows from `first` to below `last`."""
        each = self.share / (1 - self.share)
        start, end = (math.floor(round(row * each, 6)) for row in (first, last))
        return [self.row(number) for number in range(start, end)]

    def row(self, number: int) -> Opened:
        """One question about one scene; all tasks are as frequent."""
        rng = np.random.default_rng([self.seed, STREAM, number])
        scene = make_scene(rng, "train")
        asked = [ask(scene, TASKS[index], rng) for index in rng.permutation(len(TASKS))]
        example = next(one for one in asked if one is not None)  # every scene has a caption
        return Opened([scene.draw(self.pixels)], example.prefix, example.suffix)


def rows_of_the_world(share: float, seed: int, processor: AnswerProcessor) -> WorldRows:
    """In pictures of the size that the model reads."""
    return WorldRows(share, seed, drawn_side(processor.image_processor))


def world_scores(model: Answers, processor: AnswerProcessor) -> Scores:
    """How good the model is in the drawn world, on scenes that are shown in no training."""
    return evaluate(model, processor, SCENES, progress=False, columns=["held_out"])["held_out"]


def check_known(scores: Scores, model: str) -> None:
    """Raises InputError: there is nothing of the world to forget."""
    right = scores["all questions"].value
    if right < KNOWN:
        raise InputError(
            f"replay shows scenes of the drawn world, and {model} answers {right:.0%} of them right: "
            "it is for models that were trained there, such as the shipped one. Leave it out"
        )


def forgetting_as_text(before: Scores, after: Scores) -> str:
    """The world's table before and after training, as Markdown."""
    lines = ["| the drawn world | before | after | cases |", "|---" * 4 + "|"]
    for name, was in before.items():
        lines.append(f"| {name} | {was.value:.3f} | {after[name].value:.3f} | {was.cases} |")
    return "\n".join(lines)
