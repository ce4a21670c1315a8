"""What can be reached without looking at the picture: next to it, .60 on yes-or-no questions may be poor.

Both baselines are lists of answers, which are scored like those of a model. To `detect` and `segment` they
always give one box, since they cannot know how many things there are, if any: the mean of all boxes, for
`segment` filled to its edges.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from minivlm.processing import box_to_tokens, codes_to_text, load_codebook
from minivlm.processing.codebook import MASK_SIDE
from minivlm.world.questions import TASKS, Example, ask
from minivlm.world.scenes import WORLD, make_scene

TRAINING_SCENES = 4000  # whose questions and answers the text-only baseline has read
WITH_BOXES = ("detect", "segment")


def majority_answers(examples: Sequence[Example]) -> list[str]:
    """For each example, the most frequent true answer to its task among these same examples.

    This is the best that a constant can do: it is chosen with the true answers in hand.
    """
    of_task = _most_frequent(examples)
    return [of_task[example.task] for example in examples]


def text_only_answers(examples: Sequence[Example]) -> list[str]:
    """For each example, the most frequent answer to the same prompt in training scenes.

    A prompt that none of the 4,000 training scenes was asked gets the most frequent answer to its task there.
    To a task with boxes, the answer is the mean box of all training answers to that task.
    """
    to_prompt, to_task = _learned()
    return [to_prompt.get(example.prefix, to_task[example.task]) for example in examples]


@cache
def _learned() -> tuple[dict[str, str], dict[str, str]]:
    """Answers to prompts and to tasks, from one question of each task about each training scene."""
    examples = []
    for number in range(TRAINING_SCENES):
        rng = np.random.default_rng([0, number])
        scene = make_scene(rng, "train")
        examples += [example for task in TASKS if (example := ask(scene, task, rng)) is not None]
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        if example.task not in WITH_BOXES:
            answers[example.prefix][example.suffix] += 1
    to_prompt = {prompt: counts.most_common(1)[0][0] for prompt, counts in answers.items()}
    return to_prompt, _most_frequent(examples)


def _most_frequent(examples: Sequence[Example]) -> dict[str, str]:
    """The most frequent answer to each task, or the mean box."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        answers[example.task][example.suffix] += 1
    guesses = {task: counts.most_common(1)[0][0] for task, counts in answers.items()}
    for task in WITH_BOXES:
        boxes = [thing.box for example in examples if example.task == task for thing in example.things]
        if boxes:
            x0, y0, x1, y1 = np.mean(boxes, axis=0).tolist()
            guesses[task] = box_to_tokens((x0, y0, x1, y1), WORLD, WORLD)
            guesses[task] += filled_mask() if task == "segment" else ""
    return guesses


@cache
def filled_mask() -> str:
    """The `<seg>` tokens of a mask that fills its box."""
    return codes_to_text(load_codebook().encode(torch.ones(1, MASK_SIDE, MASK_SIDE))[0])
