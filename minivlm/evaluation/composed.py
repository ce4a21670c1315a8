"""Composed questions about drawn scenes, and how many of their conclusions are right.

Scenes come from seeds that training never uses. A model that should think is asked so by its prompts; only
the conclusion of its answer counts, however it got there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minivlm.errors import InputError
from minivlm.evaluation.baselines import majority_answers
from minivlm.evaluation.scoring import Question, mean_of
from minivlm.evaluation.tables import Metric
from minivlm.world.composed_questions import COMPOSED_TASKS, ask_composed
from minivlm.world.questions import QUESTION_TASKS, Example, ask
from minivlm.world.scenes import Scene, Split, make_scene
from minivlm.world.thinking import conclusion, think

STREAM = 2**31 + 100  # of random numbers: [seed, stream, number of the question]
Change = Callable[[Scene, np.random.Generator], Scene]  # of a scene, before anything is asked


def check_task(task: str, thinks: bool = False) -> None:
    """Raises InputError: there is no such question, or nothing to think about in it."""
    known = COMPOSED_TASKS if thinks else (*COMPOSED_TASKS, *QUESTION_TASKS)
    if task not in known:
        what = "asked to think about" if thinks else "asked"
        raise InputError(f"there is no task {task!r} that is {what}: choose from {', '.join(known)}")


def draw_question(
    rng: np.random.Generator,
    task: str,
    pixels: int,
    split: Split = "train",
    thinks: bool = False,
    change: Change | None = None,
) -> Question:
    """A question of a task about the next scene that allows one."""
    while True:
        scene = make_scene(rng, split)
        scene = scene if change is None else change(scene, rng)
        example: Example | None = (ask_composed if task in COMPOSED_TASKS else ask)(scene, task, rng)
        if example is not None:
            return Question(scene, scene.draw(pixels), think(example) if thinks else example)


def make_composed(
    task: str,
    questions: int,
    seed: int = 1,
    *,
    pixels: int = 64,
    split: Split = "test",
    thinks: bool = False,
    change: Change | None = None,
) -> list[Question]:
    """Held-out questions of a task, each about a scene of its own, the same for the same seed.

    Raises InputError: as `check_task`.
    """
    check_task(task, thinks)
    return [
        draw_question(np.random.default_rng([seed, STREAM, number]), task, pixels, split, thinks, change)
        for number in range(questions)
    ]


def conclusions_right(questions: Sequence[Question], answers: Sequence[str]) -> Metric:
    """The share of true conclusions, beside that of the most frequent one."""
    examples = [
        Example(question.example.task, question.example.prefix, conclusion(question.example.suffix))
        for question in questions
    ]
    right, _ = mean_of(
        [conclusion(answer) == one.suffix for answer, one in zip(answers, examples, strict=True)]
    )
    constant, cases = mean_of(
        [guess == one.suffix for guess, one in zip(majority_answers(examples), examples, strict=True)]
    )
    return Metric(right, constant, cases)
