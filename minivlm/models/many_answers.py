"""Many answers: rows of about one length in a batch, and one picture read once for all of its prompts.

A token of one row reads every weight of the decoder, and a token of each of eight rows reads them once, too.
So a step of a batch takes little longer than one of a row. What it may waste is padding and waiting: batches
are made of rows that are sorted by length, and rows whose answers have ended leave. How much memory a batch
takes is bounded by its tokens, padding and answers included.

Every answer is that of its prompt alone. (Where words are drawn from a seed, the next row of a batch would
get the next seed; so there prompts are answered one after the other. So they are in contrastive decoding,
which reads two pictures.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.models.answer_stream import AnswerStream, Noting, Row
from minivlm.models.cache_rows import selected
from minivlm.models.protocols import Answers
from minivlm.models.shared_picture import SharedPicture
from minivlm.processing import AnswerProcessor, Video, to_device
from minivlm.processing.inputs import Inputs, Picture, ReadsVideos
from minivlm.processing.rows import as_list, check_prompt, open_rows, pad_rows

BATCH_TOKENS = 4096  # of a batch, with its padding and what is written
WINDOW = (
    8  # batches whose rows are sorted together: answers come in the order asked, so they wait for a window
)
LONGEST = 64  # tokens of an answer, where nothing else is said, as in `stream`


class Answer(NamedTuple):
    """What was written, and what `AnswerStream` knows about it."""

    text: str
    confidence: float | None
    repeats: bool


def answers_about(
    model: Answers,
    processor: AnswerProcessor,
    picture: Picture | Video,
    prompts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    contrast: float = 0.0,
    **choices: Any,
) -> list[Answer]:
    """Answers to several prompts about one picture, in their order.

    Args:
        batch_tokens: of the rows that are written at a time.
        contrast, **choices: as in `minivlm.models.answering.answer`.

    Raises InputError: as `answer`, with nothing answered.
    """
    prompts = as_list(prompts, "prompt")
    if _takes_turns(choices, contrast):
        choices["contrast"] = contrast
        return [_alone(model, processor, picture, prompt, choices) for prompt in prompts]
    (pictures,) = open_rows([picture], 1, isinstance(processor, ReadsVideos))
    rows = []
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, number)
        rows.append(processor.make_room(processor.encode_row(prompt, None, 1), pictures))
    pixels = to_device(processor.pixels(pictures), model.device) if rows else {}
    answers: dict[int, Answer] = {}
    beside = getattr(model, "tokens_beside", 0)
    for batch in batches([len(row.ids) + beside for row in rows], batch_tokens, choices):
        padded, _ = pad_rows([rows[number] for number in batch], processor.tokenizer.pad_id, "left")
        inputs = to_device(padded, model.device) | pixels
        written = _write(SharedPicture(model, len(batch)), model, processor, inputs, choices)
        answers |= zip(batch, written, strict=True)
    return [answers[number] for number in range(len(prompts))]


def answers_to(
    model: Answers,
    processor: AnswerProcessor,
    pictures: Iterable[Picture | Video],
    prompts: Sequence[str],
    *,
    batch_tokens: int = BATCH_TOKENS,
    contrast: float = 0.0,
    **choices: Any,
) -> Iterator[list[Answer]]:
    """Answers to every prompt about every picture: those about a picture together, in the order asked.

    Args:
        pictures: better paths than opened pictures, of which many fill the memory. Each is opened when it is
            its turn; before, where the number of its tokens depends on its shape.
        batch_tokens: of the rows that are written at a time.
        contrast, **choices: as in `minivlm.models.answering.answer`.

    Raises InputError: as `answer`, once the answers before are given.
    """
    if len(prompts) != 1 or _takes_turns(choices, contrast):
        for picture in pictures:
            yield answers_about(
                model,
                processor,
                picture,
                prompts,
                batch_tokens=batch_tokens,
                contrast=contrast,
                **choices,
            )
        return
    check_prompt(prompts[0], 0)
    beside = getattr(model, "tokens_beside", 0)
    for window, lengths in _windows(processor, pictures, prompts[0], beside, WINDOW * batch_tokens, choices):
        answers: dict[int, Answer] = {}
        for batch in batches(lengths, batch_tokens, choices):
            inputs = processor([window[number] for number in batch], [prompts[0]] * len(batch))
            written = _write(model, model, processor, to_device(inputs, model.device), choices)
            answers |= zip(batch, written, strict=True)
        yield from ([answers[number]] for number in range(len(window)))


def _windows(
    processor: AnswerProcessor,
    pictures: Iterable[Picture | Video],
    prompt: str,
    beside: int,
    most: int,
    choices: dict[str, Any],
) -> Iterator[tuple[list[Picture | Video], list[int]]]:
    """Pictures one after the other, up to so many tokens at a time, and the lengths of their rows."""
    window: list[Picture | Video] = []
    lengths: list[int] = []
    for picture in pictures:
        row = processor.make_room(processor.encode_row(prompt, None, 1), [picture])
        length = len(row.ids) + beside
        if window and sum(lengths) + length + (1 + len(window)) * _longest(choices) > most:
            yield window, lengths
            window, lengths = [], []
        window.append(picture)
        lengths.append(length)
    if window:
        yield window, lengths


def _longest(choices: dict[str, Any]) -> int:
    most: int = choices.get("max_new_tokens", LONGEST)
    return most


def batches(lengths: Sequence[int], batch_tokens: int, choices: dict[str, Any]) -> list[list[int]]:
    """Numbers of rows of these lengths, sorted by length, as many at a time as fit; one always does."""
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        room = batch_tokens // (lengths[number] + _longest(choices))
        if not found or len(found[-1]) >= room:
            found.append([])
        found[-1].append(number)
    return found


def _takes_turns(choices: dict[str, Any], contrast: float) -> bool:
    """Whether answers are sampled, and from a seed, or held against those to another picture."""
    return contrast != 0 or (choices.get("temperature", 0) > 0 and choices.get("seed") is not None)


def _alone(
    model: Answers, processor: AnswerProcessor, picture: Picture | Video, prompt: str, choices: dict[str, Any]
) -> Answer:
    stream = AnswerStream(model, processor, picture, prompt, **choices)
    return Answer("".join(stream), stream.confidence, stream.repeats)


def _write(
    reading: Any, model: Answers, processor: AnswerProcessor, inputs: Inputs, choices: dict[str, Any]
) -> list[Answer]:
    """The answers of a batch. `reading`: the model, or what stands before it."""
    noting = _Batch(reading)
    rows = [Row(processor.tokenizer) for _ in inputs["input_ids"]]
    ended = [False] * len(rows)
    # Called on the class, as in `AnswerStream`.
    for tokens in type(model).stream(noting, **inputs, **choices):  # type: ignore[arg-type]
        if noting.unfinished is not None:
            ended = [end or not goes_on for end, goes_on in zip(ended, noting.unfinished, strict=True)]
        for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if not ended[number]:
                row.add(token, None if noting.last is None else noting.last[number])
                ended[number] = row.repeats
        if all(ended):
            break
    return [Answer(processor.decode(torch.tensor([row.ids]))[0], row.confidence, row.repeats) for row in rows]


class _Batch(Noting):
    """Also lets rows leave whose answers have ended, once they are half of those that are left."""

    rows: Tensor | None = None  # numbers of those that are left; None: nothing is read on yet
    cache: KVCache

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: Any) -> Tensor:
        """As the model's. What is returned for a row that has left is not read."""
        if not isinstance(cache, KVCache):
            return super().decode(token_ids, unfinished, cache)
        if self.rows is None:
            self.rows, self.cache = torch.arange(len(token_ids), device=token_ids.device), cache
        goes_on = unfinished[self.rows]
        if 2 * int(goes_on.sum()) <= len(self.rows):
            self.rows, self.cache = self.rows[goes_on], selected(self.cache, goes_on)
        left = super().decode(token_ids[self.rows], unfinished[self.rows], self.cache)
        self.unfinished = unfinished
        hidden = left.new_zeros(len(token_ids), *left.shape[1:])
        hidden[self.rows] = left
        return hidden
