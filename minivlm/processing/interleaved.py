"""Pictures and text in turns, as in Flamingo (https://arxiv.org/abs/2204.14198): rows of several pictures.

    <image> <bos> prompt \\n answer <eos> <image> <bos> prompt \\n answer <eos> <image> <bos> prompt \\n

A turn has the form that `Processor` gives a row, so a model meets the same form with and without examples.
`<eos>` ends a turn, as `<|endofchunk|>` does in OpenFlamingo (https://github.com/mlfoundations/open_flamingo).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.images import load_picture
from minivlm.processing.inputs import IGNORE, AnswerProcessor, Inputs, Picture, Row
from minivlm.processing.rows import pad_rows

Turn = tuple[Picture | None, str, str | None]  # picture, prompt, answer; None: no picture, to be answered


def interleave(
    processor: AnswerProcessor, rows: Sequence[Sequence[Turn]], padding_side: str = "left"
) -> Inputs:
    """A batch with several turns in each row: examples, and a question without its answer at the end.

    >>> interleave(processor, [[("1.png", "caption en", "a red star"), ("2.png", "caption en", None)]])

    Every picture has its placeholders, and text typed by a user never becomes one, so there are as many
    pictures as places.

    Returns:
        input_ids and attention_mask [B, S], and pixel_values [M, C, H, W] of all pictures, in the order of
        the rows; absent without pictures.

    Raises InputError: no rows, or a row without turns; an answer is missing before the end of a row; a
    picture that cannot be read.
    """
    if not rows or not all(rows):
        raise InputError("a row has no turns: give at least a question, as (picture, 'caption en', None)")
    written, pictures = [], []  # rows, and the pictures of all of them
    for number, turns in enumerate(rows):
        row = Row([], [])
        for place, (picture, prompt, answer) in enumerate(turns):
            if answer is None and place + 1 < len(turns):
                raise InputError(
                    f"turn {place + 1} of row {number + 1} has no answer, and another turn follows: "
                    "give every example its answer, and leave out only the last"
                )
            turn = processor.encode_row(prompt, answer, int(picture is not None))
            shown = [] if picture is None else [_opened(picture)]
            turn = processor.make_room(turn, shown)
            row = Row(row.ids + turn.ids, row.written + turn.written)
            pictures += shown
        written.append(row)
    batch, _ = pad_rows(written, processor.tokenizer.pad_id, padding_side)
    return batch | processor.pixels(pictures) if pictures else batch


def _opened(picture: Picture) -> Image.Image:
    return load_picture(picture) if isinstance(picture, str | Path) else picture


def interleaved_labels(
    input_ids: Tensor, attention_mask: Tensor, image_token_id: int, end_token_id: int
) -> Tensor:
    """What a model learns from rows of pictures and text: [B, S], -100 where there is no loss.

    That is the text from a picture to the end of its turn, end included. There is no loss on padding and
    placeholders, before the first picture, and between the end of a turn and the next picture. OpenFlamingo's
    rule for pages of the web, where text without a picture teaches nothing about pictures.

        a  dog <image> it runs <end> and  so <image> sleeps <end>
        -  -      -    it runs <end>  -   -     -    sleeps <end>

    Args:
        input_ids, attention_mask: [B, S].
        end_token_id: what ends a turn, here `<eos>`.
    """
    is_image, is_end = input_ids == image_token_id, input_ids == end_token_id
    places = torch.arange(input_ids.shape[1], device=input_ids.device) + 1
    last_image = (is_image * places).cummax(dim=1).values  # up to here; 0 for none
    # Before here. What comes around to the first place does not matter: nothing is learned there.
    last_end = (is_end * places).cummax(dim=1).values.roll(1, dims=1)
    learned = (last_image > last_end) & ~is_image & attention_mask.bool()
    return input_ids.masked_fill(~learned, IGNORE)
