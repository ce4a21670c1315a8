"""Does a model look at the picture, or does it answer from the words of the question?

Two tests. The second is that of VQA 2.0's balanced pairs (https://arxiv.org/abs/1612.00837):

- gray: nothing can be seen any more. Whoever gives the same answer as before has not used the picture.
- swapped: the picture of another scene, in which the same question has another true answer. Whoever uses the
  picture changes the answer, and is right again.

And a way to make a model that neglects: `biased` scenes, in which stars are nearly always cyan and colors are
hard to see, so that a guess from the words pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minivlm.evaluation.answers import answer_questions
from minivlm.evaluation.composed import conclusions_right
from minivlm.evaluation.faithfulness import GRAY, agreement, gray_picture
from minivlm.evaluation.scoring import Question, mean_of
from minivlm.evaluation.tables import Metric
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor
from minivlm.world.scenes import COLORS, Scene, Thing
from minivlm.world.thinking import boxes_of, conclude, conclusion

BIASED = ("star", "cyan")
BIAS = 0.9  # share of stars that are cyan, in training
SATURATIONS = (0.1, 0.5)  # of colors in training, from least to most


def neglect(
    model: Answers, processor: AnswerProcessor, questions: Sequence[Question], progress: bool | None = False
) -> dict[str, Metric]:
    """The rows of a table, each beside chance."""

    def conclusions(asked: Sequence[Question]) -> list[str]:
        answers = answer_questions(model, processor, asked, progress)
        return [conclusion(answer) for answer in answers]

    answers = conclusions(questions)
    gray = conclusions([replace(question, picture=gray_picture(question.picture)) for question in questions])
    table = {
        "right": conclusions_right(questions, answers),
        "right, gray picture": conclusions_right(questions, gray),
        "as before, gray picture": _same(gray, answers),
    }
    pairs = swapped(questions)
    if pairs:
        numbers = [number for number, _ in pairs]
        others = [question for _, question in pairs]
        now = conclusions(others)
        table["right, swapped picture"] = conclusions_right(others, now)
        table["as before, swapped picture"] = _same(now, [answers[number] for number in numbers])
    return table


def _same(said: Sequence[str], before: Sequence[str]) -> Metric:
    """How often the same is said, beside what frequencies alone give."""
    same, cases = mean_of([a == b for a, b in zip(said, before, strict=True)])
    return Metric(same, agreement(said, before), cases)


def swapped(questions: Sequence[Question]) -> list[tuple[int, Question]]:
    """Questions with the picture of another scene of the list, where another answer is true.

    Only such as `conclude` understands, and for which there is such a scene: with the number of the question.
    """
    pairs = []
    for number, question in enumerate(questions):
        truth = conclusion(question.example.suffix)
        for step in range(1, len(questions)):  # beginning behind the question: each gets another one
            other = questions[(number + step) % len(questions)]
            found = conclude(question.example.prefix, boxes_of(other.scene))
            if found is not None and found != truth:
                example = replace(question.example, suffix=found, things=())
                pairs.append((number, Question(other.scene, other.picture, example)))
                break
    return pairs


def faded(scene: Scene, saturation: float) -> Scene:
    """The scene with this share of its colors: 0 is gray, 1 as it was."""
    return replace(scene, things=tuple(_faded(thing, saturation) for thing in scene.things))


def _faded(thing: Thing, saturation: float) -> Thing:
    gray = sum(thing.rgb) / 3
    red, green, blue = (round(gray + saturation * (value - gray)) for value in thing.rgb)
    return replace(thing, rgb=(red, green, blue))


def gray_thing(scene: Scene, shape: str) -> Scene:
    """The scene with all things of a shape in one gray, which tells nothing of their color.

    Without its saturation alone, a color would still be brighter or darker than others.
    """
    things = tuple(replace(thing, rgb=GRAY) if thing.shape == shape else thing for thing in scene.things)
    return replace(scene, things=things)


def biased(scene: Scene, rng: np.random.Generator, share: float = BIAS) -> Scene:
    """The scene with colors that are hard to see, and stars of one color in so many of all cases."""
    shape, color = BIASED
    things = []
    for thing in scene.things:
        if thing.shape == shape and rng.random() < share:
            thing = replace(thing, color=color, rgb=COLORS[color])
        things.append(thing)
    least, most = SATURATIONS
    return faded(replace(scene, things=tuple(things)), float(rng.uniform(least, most)))
