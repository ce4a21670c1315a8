"""Rows of several pictures: turns as `Processor` makes them, and OpenFlamingo's rule for the loss.

`LEARNED` was found by running train/train_utils.py of https://github.com/mlfoundations/open_flamingo
(655f693), function train_one_epoch, on IDS with a model that keeps the labels it is given.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm.errors import InputError
from minivlm.processing import (
    ImageProcessor,
    Processor,
    Tokenizer,
    build_tokenizer,
    interleave,
    interleaved_labels,
)

END, IMAGE = 1, 118
IDS = torch.tensor(
    [
        [5, 17, IMAGE, 99, 42, END, 7, 64, IMAGE, 8, END, 9],
        [0, 0, IMAGE, 23, IMAGE, 31, 11, END, END, 77, 2, 0],
        [4, END, 6, IMAGE, 8, END, IMAGE, END, 3, IMAGE, 0, 0],
        [5, 6, 7, 8, 9, END, 10, 11, 12, 13, 14, 15],
    ]
)
LEARNED = [[3, 4, 5, 9, 10], [3, 5, 6, 7], [4, 5, 7], []]  # places in each row


def test_the_loss_is_where_openflamingo_has_it() -> None:
    expected = torch.full_like(IDS, -100)
    for row, places in enumerate(LEARNED):
        expected[row, places] = IDS[row, places]
    assert torch.equal(interleaved_labels(IDS, (IDS != 0).long(), IMAGE, END), expected)


def test_padding_is_known_by_its_mask() -> None:
    """Not by its id, which in GPT-2 is often that of the end."""
    ids = torch.tensor([[IMAGE, 5, END, END], [IMAGE, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = torch.tensor([[-100, 5, END, -100], [-100, 5, -100, -100]])
    assert torch.equal(interleaved_labels(ids, mask, IMAGE, END), expected)


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = Tokenizer(build_tokenizer(["caption en", "what color is it?", "a red star", "red"]))
    return Processor(tokenizer, ImageProcessor(image_size=28, image_seq_length=1))


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_row_of_one_turn_is_the_processors(processor: Processor) -> None:
    asked = interleave(processor, [[(picture(0), "caption en", None)], [(None, "what color is it?", None)]])
    alone = processor([picture(0), None], ["caption en", "what color is it?"])
    assert asked.keys() == alone.keys() - {"token_type_ids"}
    assert all(torch.equal(asked[name], alone[name]) for name in asked)
    learned = interleave(processor, [[(picture(0), "caption en", "a red star")]])
    alone = processor([picture(0)], ["caption en"], ["a red star"])
    assert torch.equal(learned["input_ids"], alone["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_turns_follow_each_other(processor: Processor, side: str) -> None:
    rows = [
        [
            (picture(0), "caption en", "a red star"),
            (None, "caption en", "red"),
            (picture(1), "caption en", None),
        ],
        [(picture(2), "what color is it?", None)],
    ]
    batch = interleave(processor, rows, padding_side=side)
    first, second = (
        ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    turns = [
        processor([turn[0]], [turn[1]], None if turn[2] is None else [turn[2]])["input_ids"][0]
        for turn in rows[0]
    ]
    assert torch.equal(first, torch.cat(turns))
    assert torch.equal(second, processor([picture(2)], ["what color is it?"])["input_ids"][0])
    assert int((batch["input_ids"] == processor.tokenizer.image_id).sum()) == 3
    for number in range(3):
        assert torch.equal(batch["pixel_values"][number], processor.image_processor([picture(number)])[0])
    empty = batch["attention_mask"][1] == 0
    assert bool(empty[0 if side == "left" else -1])
    assert (batch["input_ids"][1][empty] == processor.tokenizer.pad_id).all()


def test_a_typed_tag_is_text(processor: Processor) -> None:
    batch = interleave(processor, [[(picture(0), "<image> <image>", None)]])
    assert int((batch["input_ids"] == processor.tokenizer.image_id).sum()) == 1


def test_text_alone_has_no_pixels(processor: Processor) -> None:
    assert "pixel_values" not in interleave(processor, [[(None, "caption en", None)]])


def test_what_is_refused(processor: Processor) -> None:
    question = (picture(0), "caption en", None)
    with pytest.raises(InputError, match="turn 1 of row 2 has no answer"):
        interleave(processor, [[question], [question, question]])
    for rows in ([], [[question], []]):
        with pytest.raises(InputError, match="no turns"):
            interleave(processor, rows)
    with pytest.raises(InputError, match="missing"):
        interleave(processor, [[("missing.png", "caption en", None)]])
