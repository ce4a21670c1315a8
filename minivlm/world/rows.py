"""Rows of a batch: questions with their answers, one after the other, as tensors.

    image | <bos> question 1 \\n answer 1 <eos> | <bos> question 2 \\n answer 2 <eos> | ...

The image has no place in these tensors. Questions of one row must not see each other: block numbers tell them
apart for `question_mask`, and positions start anew with each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from minivlm.processing import Tokenizer
from minivlm.processing.inputs import IGNORE
from minivlm.world import clip_questions, questions
from minivlm.world.questions import Example

PADDING = -1  # block number of padding; 0 is the image, questions count from 1
WEIGHTS = {"answer": 3.0, "loc": 1.0, "seg": 0.3, "eos": 0.3, "word": 1.0}  # of a token in the loss
SHORT = {*questions.QUESTION_TASKS, *clip_questions.QUESTION_TASKS}  # tasks whose words are an "answer"
FILL = {  # what stands where a row is shorter than the longest
    "input_ids": 0,
    "position_ids": 0,
    "blocks": PADDING,
    "token_type_ids": 0,
    "labels": IGNORE,
    "weights": 0.0,
}

_PIECES = re.compile("(<loc[0-9]{4}>|<seg[0-9]{3}>)|(?=,)")


def pack_rows(tokenizer: Tokenizer, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """Tensors [R, T] of R rows, padded on the right to the longest, under the names that `Batch` has."""
    packed = [pack_row(tokenizer, row) for row in rows]
    length = max((len(row["input_ids"]) for row in packed), default=0)
    tensors = {}
    for name, fill in FILL.items():
        table = np.full((len(packed), length), fill, dtype=np.float32 if name == "weights" else np.int64)
        for number, row in enumerate(packed):
            table[number, : len(row[name])] = row[name]
        tensors[name] = torch.from_numpy(table)
    return tensors


def pack_row(tokenizer: Tokenizer, examples: Sequence[Example]) -> dict[str, list[float]]:
    """One row of examples, one after the other."""
    row: dict[str, list[float]] = {name: [] for name in FILL}
    for block, example in enumerate(examples, start=1):
        prompt, answer = encode_example(tokenizer, example)
        row["input_ids"] += [*prompt, *answer]
        row["position_ids"] += range(len(prompt) + len(answer))
        row["blocks"] += [block] * (len(prompt) + len(answer))
        row["token_type_ids"] += [0] * len(prompt) + [1] * len(answer)
        row["labels"] += [IGNORE] * len(prompt) + answer
        row["weights"] += [0.0] * len(prompt) + answer_weights(tokenizer, answer, example.task)
    return row


def answer_weights(tokenizer: Tokenizer, answer: Sequence[int], task: str) -> list[float]:
    """What each token of an answer counts in the loss."""
    kinds = _special_kinds(tokenizer)
    word = "answer" if task in SHORT else "word"
    return [WEIGHTS[kinds.get(token, word)] for token in answer]


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Ids of prompt and answer, without placeholders of the picture: its features stand before the text."""
    return _encode_prompt(tokenizer, example.prefix), encode_answer(tokenizer, example.suffix)


# The caches belong to the module and not to an object, since a worker process that does not fork gets its
# objects pickled.
@lru_cache
def _special_kinds(tokenizer: Tokenizer) -> dict[int, str]:
    """The kind of every token that is no word."""
    kinds = dict.fromkeys(tokenizer.loc_ids, "loc") | dict.fromkeys(tokenizer.seg_ids, "seg")
    return kinds | {tokenizer.eos_id: "eos"}


@lru_cache(maxsize=50_000)
def _encode_prompt(tokenizer: Tokenizer, prefix: str) -> list[int]:
    return tokenizer.encode_prefix(prefix, image_seq_len=0)


@lru_cache(maxsize=50_000)
def encode_answer(tokenizer: Tokenizer, suffix: str) -> list[int]:
    """`encode_suffix` in pieces: whole boxes and captions rarely come twice, but their pieces do."""
    pieces = (piece for piece in _PIECES.split(suffix) if piece)
    return [*(index for piece in pieces for index in _encode_piece(tokenizer, piece)), tokenizer.eos_id]


@lru_cache(maxsize=50_000)
def _encode_piece(tokenizer: Tokenizer, piece: str) -> list[int]:
    return tokenizer.encode(piece)
