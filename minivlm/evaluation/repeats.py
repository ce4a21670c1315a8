"""Answers that stop where they only repeat themselves.

A model that is lost may write the same words again and again, up to the limit of tokens. In a batch, every
other row waits for it. vLLM ends such a row by `repetition_detection`; transformers has no such criterion,
and its `repetition_penalty` and `no_repeat_ngram_size` change the answers instead. Here nothing is changed:
a batch ends once each of its rows has ended or repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minivlm.models.answering import MOST_REPEATS
from minivlm.models.protocols import Answers

LONGEST_PATTERN = 4  # tokens that come again and again


def write_until_repeats(model: Answers, max_new_tokens: int, codes: Sequence[int], **inputs: Any) -> Tensor:
    """New tokens [B, n], as `model.generate` gives them, but without the end of endless repetitions.

    Args:
        codes: tokens that may well follow each other, such as those of a mask.
    """
    may_repeat = torch.tensor(list(codes), device=model.device, dtype=torch.int64)
    written: list[Tensor] = []
    for token in model.stream(**inputs, max_new_tokens=max_new_tokens):
        written.append(token)
        # A row that has ended is padded, and so repeats itself, too.
        if bool((_repeats(written) & ~torch.isin(token, may_repeat)).all()):
            break
    return torch.stack(written, dim=1)


def _repeats(written: Sequence[Tensor]) -> Tensor:
    """Which rows end with one pattern MOST_REPEATS times: [B]."""
    found = torch.zeros_like(written[-1], dtype=torch.bool)
    for length in range(1, LONGEST_PATTERN + 1):
        if len(written) >= MOST_REPEATS * length:
            last = torch.stack(list(written[-MOST_REPEATS * length :]), dim=1)  # [B, repeats * length]
            last = last.unflatten(1, (MOST_REPEATS, length))
            found |= (last == last[:, :1]).all(dim=2).all(dim=1)
    return found
