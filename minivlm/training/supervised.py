"""True answers as a loss: what comes before rewards, since only what is sometimes right can be rewarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.evaluation.continued import answer_ids
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, BaseTokenizer, Tokenizer
from minivlm.processing.inputs import Picture
from minivlm.training.log_probs import answer_logits
from minivlm.training.objectives import SoftTargets
from minivlm.training.recipe import TrainingConfig
from minivlm.world.thinking import conclusion

HEAVY = 3.0  # weight of a conclusion's tokens, and of the first word of each box; of others, 1


class Shown(NamedTuple):
    """A picture, a prompt, and what is to be answered."""

    picture: Picture
    prompt: str
    answer: str


def supervised_loss(model: Answers, processor: AnswerProcessor, rows: Sequence[Shown]) -> Tensor:
    """Weighted mean of the cross-entropies of the answers' tokens, with soft targets for coordinates.

    Two kinds of tokens decide about the others, and weigh more: the first coordinate of a box says which
    thing it is about, and the conclusion is one word after many.
    """
    pictures, prompts, answers = zip(*rows, strict=True)
    tokens, real = answer_ids(processor, prompts, answers)
    weights = answer_weights(processor, rows, tokens, real)[real].to(model.device)
    tokens, real = tokens.to(model.device), real.to(model.device)
    logits = answer_logits(model, processor, list(pictures), list(prompts), tokens, real)
    losses = _cross_entropy(processor.tokenizer)(logits, tokens[real])
    return (weights * losses).sum() / weights.sum()


@lru_cache
def _cross_entropy(tokenizer: BaseTokenizer) -> Callable[[Tensor, Tensor], Tensor]:
    """Of logits [n, V] and labels [n], each alone."""
    if tokenizer.loc_ids:
        return SoftTargets(cast(Tokenizer, tokenizer), TrainingConfig.loc_sigma).cross_entropy
    return partial(F.cross_entropy, reduction="none")


def answer_weights(processor: AnswerProcessor, rows: Sequence[Shown], tokens: Tensor, real: Tensor) -> Tensor:
    """Of each token of `answer_ids`, [P, 1, L], 0 for padding."""
    is_loc = torch.isin(tokens, torch.tensor(processor.tokenizer.loc_ids, dtype=torch.long))
    before = torch.cat([torch.zeros_like(is_loc[..., :1]), is_loc[..., :-1]], dim=-1)
    heavy = (is_loc & ~before) | concluding_tokens(processor, rows, real)
    return torch.where(heavy, HEAVY, 1.0) * real


def concluding_tokens(processor: AnswerProcessor, rows: Sequence[Shown], real: Tensor) -> Tensor:
    """Which tokens of `answer_ids` are the conclusion or its end: boolean [P, 1, L]."""
    concluding = torch.zeros_like(real)
    for place, (_, prompt, answer) in enumerate(rows):
        last = sum(processor.encode_row(prompt, conclusion(answer)).written)
        length = int(real[place].sum())
        concluding[place, 0, length - last : length] = True
    return concluding
