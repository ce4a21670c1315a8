"""Answers of a model to many prompts, and how sure it is of the boxes in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from tqdm import tqdm

from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor, Tokenizer, box_to_tokens, text_to_boxes

LONGEST_ANSWER = 96  # tokens; three things to segment take 69


def answer_all(
    model: PaliGemma,
    processor: Processor,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    batch_size: int = 64,
    progress: bool | None = None,
    label: str | None = None,
    expected: Sequence[str] | None = None,
) -> list[str]:
    """Greedy answers to many prompts, in batches of rows of about equal length.

    Args:
        progress: True shows a bar, False none, None only on a terminal.
        label: what the bar is called.
        expected: answers of about the same length, where they are known. A batch takes as long as its longest
            answer, so that rows are sorted by them; they change nothing but the time.
    """
    answer_lengths = [0] * len(prompts) if expected is None else [len(answer) for answer in expected]
    order = sorted(
        range(len(prompts)), key=lambda i: (prompts[i].split()[0], answer_lengths[i], len(prompts[i]))
    )
    answers = [""] * len(prompts)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, label, unit="batch", disable=None if progress is None else not progress):
        rows = order[start : start + batch_size]
        inputs = processor([pictures[i] for i in rows], [prompts[i] for i in rows])
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        texts = processor.decode(model.generate(**inputs, max_new_tokens=LONGEST_ANSWER))
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text
    return answers


@torch.inference_mode()
def box_scores(
    model: PaliGemma,
    processor: Processor,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 64,
) -> list[list[float]]:
    """How sure the model is of each box that `text_to_boxes` finds in its answers, from 0 to 1.

    A box is four words, each with a probability; their geometric mean is the box's score. The probabilities
    come from reading picture, prompt and answer once more, all in one forward pass.
    """
    boxes = [text_to_boxes(answer, 1, 1) for answer in answers]
    scores: list[list[float]] = [[] for _ in answers]
    order = sorted((i for i, found in enumerate(boxes) if found), key=lambda i: len(answers[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = processor(
            [pictures[i] for i in rows], [prompts[i] for i in rows], [answers[i] for i in rows]
        )
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        words = inputs["labels"][:, 1:]  # [B, S - 1], each predicted by the logits before it
        log_probs = model(**inputs).logits[:, :-1].float().log_softmax(dim=-1)  # [B, S - 1, V]
        log_probs = log_probs.gather(-1, words.clamp(min=0)[..., None])[..., 0]  # [B, S - 1], of these words
        for i, ids, of_words in zip(rows, words.tolist(), log_probs, strict=True):
            for place in _places(processor.tokenizer, ids, [box_to_tokens(box, 1, 1) for box in boxes[i]]):
                scores[i].append(float(of_words[place].mean().exp()))
    return scores


def _places(tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str]) -> Iterator[slice]:
    """Where in the ids each of these texts stands, from left to right."""
    start = 0
    for text in texts:
        wanted = tokenizer.encode(text)
        start = next(i for i in range(start, len(ids)) if ids[i : i + len(wanted)] == wanted)
        yield slice(start, start + len(wanted))
        start += len(wanted)
