"""What an answer is worth: small functions of what was asked and what was answered.

The drawn world knows every true answer and every true box, so nothing here is estimated. What a reward leaves
out will be neglected, and what it counts will be produced: `boxes` pays for boxes whether or not they are
true, and shows what comes of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minivlm.evaluation import faithfulness
from minivlm.evaluation.scoring import Question
from minivlm.training.rollouts import Rollout
from minivlm.world.thinking import THINK, conclude, conclusion, evidence


class Answer(NamedTuple):
    """One sampled answer."""

    text: str
    tokens: int  # its end included
    ended: bool  # False: cut off


Reward = Callable[[Question, Answer], float]


def right(question: Question, answer: Answer) -> float:
    """1 for the true conclusion. An answer that never ended concludes nothing."""
    return float(answer.ended and conclusion(answer.text) == conclusion(question.example.suffix))


def form(question: Question, answer: Answer) -> float:
    """1 for an answer that ends and, where it should think, names a box and has a conclusion."""
    thinks = question.example.prefix.startswith(THINK)
    has_form = not thinks or (bool(evidence(answer.text)) and not evidence(conclusion(answer.text)))
    return float(answer.ended and bool(conclusion(answer.text)) and has_form)


def true_boxes(question: Question, answer: Answer) -> float:
    """How true the evidence is, from 0 to 1, see `minivlm.evaluation.faithfulness.true_boxes`."""
    return faithfulness.true_boxes(question, answer.text)


def follows(question: Question, answer: Answer) -> float:
    """1 if the conclusion follows from the boxes that the answer names, true or not."""
    wanted = conclude(question.example.prefix, evidence(answer.text))
    return float(answer.ended and wanted is not None and conclusion(answer.text) == wanted)


def length(question: Question, answer: Answer) -> float:
    """-1 for each 10 tokens: with a small weight, it prices words."""
    return -answer.tokens / 10


def boxes(question: Question, answer: Answer) -> float:
    """A quarter for each box named, true or not. Can be hacked, and will be."""
    return len(evidence(answer.text)) / 4


REWARDS: dict[str, Reward] = {
    "right": right,
    "form": form,
    "true_boxes": true_boxes,
    "follows": follows,
    "length": length,
    "boxes": boxes,
}


def reward_groups(
    questions: Sequence[Question], rollout: Rollout, weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """The weighted sum of rewards of each answer [P, G], and which conclude rightly [P, G]."""
    groups = [
        [Answer(*one) for one in zip(texts, lengths, ended, strict=True)]
        for texts, lengths, ended in zip(
            rollout.texts, rollout.lengths.tolist(), rollout.ended.tolist(), strict=True
        )
    ]

    def table(worth: Callable[[Question, Answer], float]) -> Tensor:
        return torch.tensor(
            [
                [worth(question, one) for one in group]
                for question, group in zip(questions, groups, strict=True)
            ]
        )

    def total(question: Question, answer: Answer) -> float:
        return sum(weight * REWARDS[name](question, answer) for name, weight in weights.items() if weight)

    return table(total), table(right)
