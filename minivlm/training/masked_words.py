"""What BERT and VisualBERT learn from: words that are masked, and captions that belong to another picture.

All of it is arithmetic on ids, with a generator that says which. Sources: BERT, section 3.1
(https://arxiv.org/abs/1810.04805), and VisualBERT, section 3.2 (https://arxiv.org/abs/1908.03557).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from minivlm.errors import InputError
from minivlm.processing.inputs import IGNORE


def mask_words(
    input_ids: Tensor,
    may_be_masked: Tensor,
    mask_token_id: int,
    vocabulary: Tensor,
    generator: Generator,
    share: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Choose words to be guessed, and hide most of them.

    Of the chosen words, 80 % become the mask, 10 % another word, and 10 % stay what they are: when the model
    is used there are no masks, so it has to know a word where nothing is hidden, and to doubt what it sees.

    Args:
        input_ids: [B, S].
        may_be_masked: [B, S], boolean; placeholders, padding and what frames a text should not be.
        vocabulary: [n], the ids of words that may stand in for another.
        share: of the words that may be masked.

    Returns:
        The ids with masks, and the labels: the word in each chosen place, -100 elsewhere. Both [B, S].

    Raises InputError: a share that is none.
    """
    _check_share(share)
    draw, fate = (torch.rand(input_ids.shape, generator=generator) for _ in range(2))
    others = vocabulary[torch.randint(len(vocabulary), input_ids.shape, generator=generator)]
    chosen = may_be_masked & (draw < share)
    masked = input_ids.masked_fill(chosen & (fate < 0.8), mask_token_id)
    masked = torch.where(chosen & (fate >= 0.9), others, masked)
    return masked, input_ids.masked_fill(~chosen, IGNORE)


def exchange_captions(captions: Tensor, generator: Generator, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Give some pictures the caption of another one.

    A caption of the same words would fit, whichever picture it was written for, so it is never taken for a
    wrong one. (The original reads two captions of each picture and exchanges the second; or one, as here.)

    Args:
        captions: [B, T], ids, one caption for each picture.
        share: of the pictures.

    Returns:
        order [B]: picture i gets caption order[i]; and fits [B]: 1 where it kept its own, 0 elsewhere.

    Raises InputError: a share that is none.
    """
    _check_share(share)
    differs = (captions[:, None] != captions[None]).any(dim=-1)  # [B, B]
    draw = torch.rand(len(captions), generator=generator)
    exchanged = (draw < share) & differs.any(dim=1)
    own = torch.eye(len(captions))
    order = torch.multinomial(torch.where(exchanged[:, None], differs.float(), own), 1, generator=generator)
    return order[:, 0], 1 - exchanged.long()


def one_word_each(labels: Tensor, generator: Generator) -> Tensor:
    """Keep the label of one word of each answer, so that a row costs one reading, however long its answer is.

    Over many steps, each word of an answer is asked for equally often. See
    `minivlm.models.miniatures.mask_filling`.

    Args:
        labels: [B, S], -100 where there is no answer.

    Returns:
        [B, S], -100 everywhere but at one label of each row that has any.
    """
    draw = torch.rand(labels.shape, generator=generator).masked_fill(labels == IGNORE, -1)
    kept = torch.zeros_like(labels, dtype=torch.bool).scatter(1, draw.argmax(dim=1, keepdim=True), True)
    return labels.masked_fill(~kept, IGNORE)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"share is {share}: expected a part of the whole, from 0 to 1")
