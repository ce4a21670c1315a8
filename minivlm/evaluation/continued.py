"""Answers that somebody else has begun: rows that end inside of an answer.

A model conditions on what it has written. If another hand has written it (with other boxes, say), what the
model says next shows how much of its answer rests on these words, and how much on the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, to_device
from minivlm.processing.inputs import Inputs, Picture


@torch.inference_mode()
def continue_answers(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    beginnings: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 64,
) -> list[str]:
    """What the model writes after these beginnings of answers, without them."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        inputs = processor(list(pictures[part]), list(prompts[part]))
        tokens, real = answer_ids(processor, prompts[part], beginnings[part], ends=False)
        rows = to_device(extended(inputs, tokens[:, 0], real[:, 0]), model.device)
        texts += processor.decode(model.generate(**rows, max_new_tokens=max_new_tokens))
    return texts


def extended(inputs: Inputs, tokens: Tensor, real: Tensor) -> Inputs:
    """Prompts [B, T], padded on the left, that go on with tokens [B, L] of an answer, padded on the right."""
    rows = dict(inputs)
    rows["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    rows["attention_mask"] = torch.cat([inputs["attention_mask"], real.long()], dim=1)
    if "token_type_ids" in inputs:
        rows["token_type_ids"] = torch.cat([inputs["token_type_ids"], real.long()], dim=1)
    return rows


def answer_ids(
    processor: AnswerProcessor, prompts: Sequence[str], answers: Sequence[str], ends: bool = True
) -> tuple[Tensor, Tensor]:
    """Answers as tokens, and which of them are real: both [P, 1, L]. ends: with the token that ends them."""
    written = []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = processor.encode_row(prompt, answer)
        ids = [index for index, is_written in zip(row.ids, row.written, strict=True) if is_written]
        end = len(ids) if ends else ids.index(processor.tokenizer.eos_id)
        written.append(ids[:end])
    longest = max(map(len, written))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in written])
    lengths = torch.tensor([len(ids) for ids in written])
    return tokens[:, None], (torch.arange(longest) < lengths[:, None])[:, None]
