"""From the rows of a batch to its tensors: what the processors of all models that answer have in common.

A system says how a row is written (`encode_row`) and how pictures become pixels (`pixels`). Opening pictures,
checking numbers, padding, labels and the way back from ids to words are the same everywhere, and stand here.
Where a picture takes as many tokens as its shape asks for, `make_room` puts them into a finished row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.images import ImageProcessor, load_picture
from minivlm.processing.inputs import IGNORE, Inputs, Picture, ReadsVideos, Row
from minivlm.processing.tokens import BaseTokenizer
from minivlm.processing.video import Video

Pictures = Picture | Video | Sequence[Picture | Video] | None  # those of one row


class RowProcessor(ABC):
    """The part of a processor that does not depend on the form of its prompts."""

    tokenizer: BaseTokenizer
    image_processor: ImageProcessor
    has_segments: ClassVar[bool] = False  # whether the model's mask depends on token_type_ids

    @abstractmethod
    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """The ids of one row; without an answer, it ends where the answer begins."""

    def make_room(self, row: Row, pictures: Sequence[Picture | Video]) -> Row:
        """A row of `encode_row` with as many image tokens as its pictures take.

        Here every picture takes the same number, and they are there already.
        """
        return row

    def pixels(self, pictures: Sequence[Image.Image | Video]) -> Inputs:
        """What the tower reads of all pictures of a batch, in order."""
        return {"pixel_values": self.image_processor(cast(Sequence[Image.Image], pictures))}

    def to_pictures(self, inputs: Inputs) -> Tensor:
        """The pictures of a batch as the tower sees them, to be looked at: [M, C, height, width]."""
        return inputs["pixel_values"]

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """The other way around: pictures of one size [M, C, height, width] -> what `pixels` returns.

        Args:
            inputs: the batch of one picture that they are versions of, with parts hidden.
        """
        return {"pixel_values": pictures}

    def __call__(
        self,
        images: Picture | Video | Sequence[Pictures] | None,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> Inputs:
        """One batch: a row for each prompt.

        Pictures are PIL images or paths. A row whose picture is None is text only: it has no image tokens,
        and pixel_values holds the other pictures in order. Pad on the left for generation, so that every row
        ends where the answer begins; either side will do for training.

        Returns, with S the length of the longest row and M the number of pictures:
          input_ids       [B, S] int64
          attention_mask  [B, S] int64, 1 for tokens, 0 for padding
          pixel_values    [M, C, H, W] fp32, and whatever else `pixels` returns; absent without pictures
          token_type_ids  [B, S] int64, 0 for the prompt and padding, 1 for what is to be written; only if the
                          model reads them
          labels          [B, S] int64, ids of what is to be written, -100 elsewhere; only with suffixes

        Raises InputError: unequal numbers of pictures, prompts and suffixes; an empty prompt; a row longer
        than max_length (nothing is truncated: training would silently use half a picture or an answer without
        its end); a picture that cannot be read; an argument of the wrong type.
        """
        prompts = as_list(prompts, "prompt")
        if not prompts:
            raise InputError("there are no prompts: give at least one, such as 'caption en'")
        pictures = open_rows(images, len(prompts), isinstance(self, ReadsVideos))
        answers: list[str] | list[None] = [None] * len(prompts)
        if suffixes is not None:
            answers = as_list(suffixes, "suffix")
        if len(answers) != len(prompts):
            raise InputError(
                f"got {len(answers)} suffixes for {len(prompts)} prompts: give one suffix per prompt"
            )
        rows = []
        for number, (prompt, answer, of_row) in enumerate(zip(prompts, answers, pictures, strict=True)):
            check_prompt(prompt, number)
            rows.append(self.encode_row(prompt, answer, len(of_row)))
        return self.batch(rows, pictures, padding_side, max_length)

    def batch(
        self,
        rows: Sequence[Row],
        pictures: Sequence[Sequence[Image.Image | Video]],
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> Inputs:
        """Rows of different lengths and their pictures as tensors; labels if every row has an answer."""
        rows = [self.make_room(row, of_row) for row, of_row in zip(rows, pictures, strict=True)]
        check_lengths(rows, max_length)
        inputs, written = pad_rows(rows, self.tokenizer.pad_id, padding_side)
        if self.has_segments:
            inputs["token_type_ids"] = written.long()
        if all(row.written[-1] for row in rows):
            inputs["labels"] = inputs["input_ids"].masked_fill(~written, IGNORE)
        existing = [picture for of_row in pictures for picture in of_row]
        if existing:
            inputs |= self.pixels(existing)
        return inputs

    def decode(self, ids: Tensor) -> list[str]:
        """Ids [B, n] -> B texts. Each row ends before its first end token; special tokens are dropped.

        Raises InputError: another shape.
        """
        if ids.ndim != 2:
            raise InputError(f"ids have shape {list(ids.shape)}: expected [B, n], one row per answer")
        texts = []
        for row in ids.tolist():
            end = row.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in row else len(row)
            texts.append(self.tokenizer.decode(row[:end]))
        return texts

    def batch_decode(
        self, ids: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """As the tokenizer's `batch_decode`, under the name that processors of `transformers` have."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens)


def check_prompt(prompt: str, number: int) -> None:
    """Raises InputError: there is nothing in the prompt of this number, counted from 0."""
    if not prompt.strip():
        raise InputError(f"prompt {number + 1} is empty: ask something, such as 'caption en'")


def as_list(texts: str | Sequence[str], name: str) -> list[str]:
    """One or several texts as a list; `name` is what the error calls them."""
    given = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(given):
        if not isinstance(text, str):
            raise InputError(f"{name} {number + 1} is of type {type(text).__name__}: expected a string")
    return given


def open_rows(
    images: Picture | Video | Sequence[Pictures] | None, rows: int, videos: bool = False
) -> list[list[Image.Image | Video]]:
    """The opened pictures of each row: none, one or several. `videos`: whether they may be among them."""
    if images is None:
        return [[] for _ in range(rows)]
    given = [images] if isinstance(images, Picture | Video) else list(images)
    if len(given) != rows:
        raise InputError(
            f"got {len(given)} pictures for {rows} prompts: give one picture per prompt, the "
            "same one twice if two prompts are about it, or None for a prompt without a picture"
        )
    opened = []
    for number, of_row in enumerate(given):
        several = of_row if isinstance(of_row, (list, tuple)) else [] if of_row is None else [of_row]
        opened.append([_open(picture, number, videos) for picture in several])
    return opened


def _open(picture: object, number: int, videos: bool) -> Image.Image | Video:
    if isinstance(picture, (str, Path)):
        picture = load_picture(picture)
    if isinstance(picture, Video) and not videos:
        raise InputError(f"picture {number + 1} is a video, and this model reads pictures: give one frame")
    if not isinstance(picture, Image.Image | Video):
        raise InputError(
            f"picture {number + 1} is of type {type(picture).__name__}: expected a PIL image, a path or None"
        )
    return picture


def check_lengths(rows: Sequence[Row], max_length: int | None) -> None:
    """Raises InputError: a row with more than max_length tokens."""
    for number, row in enumerate(rows):
        if max_length is not None and len(row.ids) > max_length:
            raise InputError(
                f"row {number + 1} has {row.written.count(False)} tokens before the answer and "
                f"{row.written.count(True)} in it, over max_length {max_length}: shorten the text or raise "
                "max_length"
            )


def pad_rows(rows: Sequence[Row], pad_id: int, padding_side: str) -> tuple[Inputs, Tensor]:
    """Rows of different lengths -> input_ids and attention_mask [B, S], and what is to be written [B, S]."""
    if padding_side not in ("left", "right"):
        raise InputError(f"padding_side is {padding_side!r}: expected 'left' or 'right'")
    shape = len(rows), max(len(row.ids) for row in rows)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    written = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.ids)
        place = slice(shape[1] - length, shape[1]) if padding_side == "left" else slice(length)
        input_ids[number, place] = torch.tensor(row.ids)
        attention_mask[number, place] = 1
        written[number, place] = torch.tensor(row.written)
    return {"input_ids": input_ids, "attention_mask": attention_mask}, written
