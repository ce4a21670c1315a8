"""Does a model say yes to what is not there? Asked as POPE does (https://arxiv.org/abs/2305.10355).

About each picture there are as many questions about things that are there as about things that are not. What
is missing is chosen in three ways, of which the later ones are meant to be harder:

- random: any name that is missing;
- popular: of the missing names, those that are most frequent in all pictures;
- adversarial: of the missing names, those that occur most often together with what is there.

In photos a fork makes a knife likely. In the drawn world all names are about as likely, whatever is beside
them, so frequencies can mislead nobody there, unless training has made them differ. What can mislead is a
picture that has the color in one thing and the shape in another, so there is a fourth way:

- mixed: a color and a shape that are both there, in different things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from minivlm.evaluation.answers import answer_questions
from minivlm.evaluation.composed import STREAM
from minivlm.evaluation.scoring import Question
from minivlm.evaluation.tables import Metric
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor
from minivlm.world.questions import Example, with_article
from minivlm.world.scenes import SEEN_PAIRS, Scene, make_scene

NAMES = tuple(f"{color} {shape}" for color, shape in SEEN_PAIRS)
WAYS = ("random", "popular", "adversarial", "mixed")
MOST = 3  # names of each kind about a picture, as in POPE
COIN = 0.5  # all of the numbers below for a coin


def pope_questions(way: str, scenes: int, seed: int = 1, pixels: int = 64) -> list[Question]:
    """Balanced questions about so many held-out scenes. Other ways ask about the same scenes.

    A scene whose names are too few, or for `mixed` has no such pair, is asked less about.
    """
    shown = [
        make_scene(np.random.default_rng([seed, STREAM + 1, number]), "test") for number in range(scenes)
    ]
    names = [sorted({thing.name for thing in scene.things}) for scene in shown]
    frequency = Counter(name for of_scene in names for name in of_scene)
    together = {
        name: Counter(other for of_scene in names if name in of_scene for other in of_scene) for name in NAMES
    }
    questions = []
    for number, (scene, present) in enumerate(zip(shown, names, strict=True)):
        rng = np.random.default_rng([seed, STREAM + 2, number])
        missing = [NAMES[i] for i in rng.permutation(len(NAMES)) if NAMES[i] not in present]
        if way == "popular":
            missing.sort(key=lambda name: -frequency[name])
        elif way == "adversarial":
            missing.sort(key=lambda name: -sum(together[one][name] for one in present))
        elif way == "mixed":
            missing = [name for name in missing if _is_mixed(name, scene)]
        count = min(MOST, len(present), len(missing))
        there = [present[i] for i in rng.permutation(len(present))[:count]]
        picture = scene.draw(pixels)
        for name, answer in [*((one, "yes") for one in there), *((one, "no") for one in missing[:count])]:
            example = Example("existence", f"is there {with_article(name)}?", answer)
            questions.append(Question(scene, picture, example))
    return questions


def _is_mixed(name: str, scene: Scene) -> bool:
    color, shape = name.split()
    return any(thing.color == color for thing in scene.things) and any(
        thing.shape == shape for thing in scene.things
    )


def pope(
    model: Answers,
    processor: AnswerProcessor,
    scenes: int = 200,
    seed: int = 1,
    pixels: int = 64,
    progress: bool | None = False,
) -> dict[str, dict[str, Metric]]:
    """A table: by way of choosing, POPE's five numbers, beside those of a coin."""
    table = {}
    for way in WAYS:
        questions = pope_questions(way, scenes, seed, pixels)
        answers = answer_questions(model, processor, questions, progress)
        wanted = [question.example.suffix == "yes" for question in questions]
        table[way] = pope_numbers([answer == "yes" for answer in answers], wanted)
    return table


def pope_numbers(said: Sequence[bool], wanted: Sequence[bool]) -> dict[str, Metric]:
    """Accuracy, precision, recall, F1, and how often it says yes."""
    pairs = list(zip(said, wanted, strict=True))
    hits, yes = pairs.count((True, True)), sum(said)
    precision, recall = hits / max(yes, 1), hits / max(sum(wanted), 1)
    values = {
        "accuracy": sum(a == b for a, b in pairs) / max(len(pairs), 1),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / max(precision + recall, 1e-9),
        "says yes": yes / max(len(pairs), 1),
    }
    return {name: Metric(value, COIN, len(pairs)) for name, value in values.items()}
