"""How good answers about clips are: exact match for each task, beside the most frequent answer.

Clips come from seeds that training never uses. All have 4 to 8 frames, at 1 or 2 a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import cast

import numpy as np

from minivlm.evaluation.answers import answer_all
from minivlm.evaluation.baselines import majority_answers
from minivlm.evaluation.tables import Metric
from minivlm.models.protocols import Answers
from minivlm.models.qwen2_vl import Qwen2VL
from minivlm.processing import AnswerProcessor, Qwen2VLProcessor, video_of
from minivlm.world.clip_batches import CLIP_SIDES, CLIP_TASKS, FRAMES, RATES, training_clip
from minivlm.world.clip_questions import ask
from minivlm.world.clips import Clip
from minivlm.world.questions import Example

STREAM = 7  # of random numbers: [seed, stream, clip]


def make_clip_questions(
    clips: int,
    seed: int = 1,
    tasks: Sequence[str] = CLIP_TASKS,
    frames: Sequence[int] = FRAMES,
    rates: Sequence[int] = RATES,
) -> list[tuple[Clip, Example]]:
    """One question of each task about each of so many clips, the same for the same seed."""
    asked = []
    for number in range(clips):
        rng = np.random.default_rng([seed, STREAM, number])
        width, height = CLIP_SIDES[rng.integers(len(CLIP_SIDES))]
        clip = training_clip(rng, int(rng.choice(frames)), width, height, rates)
        asked += [(clip, example) for task in tasks if (example := ask(clip, task, rng)) is not None]
    return asked


def evaluate_clips(
    model: Qwen2VL,
    processor: Qwen2VLProcessor,
    clips: int = 500,
    seed: int = 1,
    tasks: Sequence[str] = CLIP_TASKS,
    frames: Sequence[int] = FRAMES,
    rates: Sequence[int] = RATES,
    progress: bool | None = None,
) -> dict[str, Metric]:
    """The share of exact answers to each task, about clips of so many frames at so many a second."""
    asked = make_clip_questions(clips, seed, tasks, frames, rates)
    examples = [example for _, example in asked]
    videos = {id(clip): video_of([*clip.frames(int(clip.width))], clip.fps) for clip, _ in asked}
    answers = answer_all(
        cast(Answers, model),
        cast(AnswerProcessor, processor),
        [videos[id(clip)] for clip, _ in asked],
        [example.prefix for example in examples],
        progress=progress,
        expected=[example.suffix for example in examples],
    )
    constant = majority_answers(examples)
    table = {}
    for task in tasks:
        mine = [i for i, example in enumerate(examples) if example.task == task]
        if mine:
            right, guessed = (
                mean(given[i] == examples[i].suffix for i in mine) for given in (answers, constant)
            )
            table[task] = Metric(right, guessed, len(mine))
    return table
