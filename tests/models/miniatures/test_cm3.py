"""CM3 moves the same spans as the authors' program, loses no token, and fills blanks.

`EXPECTED` was printed by metaseq/data/cm3_dataset.py of https://github.com/facebookresearch/metaseq
(f7ffa5f): spans of `get_spans_to_mask` and the row of `sentinel_masking` and `sentinel_targets`, for the
document 0, 1, ..., length - 1, the sentinels MASKS and END, and the uniform numbers `draws`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import noise, randomize
from miniatures import TINY_TEXT, TINY_VISION, tiny
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.models.miniatures.cm3 import (
    CM3,
    CM3Config,
    causally_masked,
    choose_spans,
    infill,
    move_spans,
    put_back,
)
from minivlm.training.recipe import TrainingConfig, build

MASKS, END, IMAGE = (110, 111, 112, 113), 114, 119
CONFIG = CM3Config(TINY_VISION, TINY_TEXT, MASKS, END, image_token_id=IMAGE)
EXPECTED = {  # length, most spans, start of the draws -> spans, row
    (9, 1, 0): ([(0, 8)], [110, 8, 110, 0, 1, 2, 3, 4, 5, 6, 7, 114]),
    (9, 1, 1): ([(2, 5)], [0, 1, 110, 5, 6, 7, 8, 110, 2, 3, 4, 114]),
    (9, 1, 5): ([(7, 8)], [0, 1, 2, 3, 4, 5, 6, 110, 8, 110, 7, 114]),
    (9, 2, 0): ([(1, 5)], [0, 110, 5, 6, 7, 8, 110, 1, 2, 3, 4, 114]),
    (9, 2, 1): ([(2, 5), (5, 6)], [0, 1, 110, 111, 6, 7, 8, 110, 2, 3, 4, 114, 111, 5, 114]),
    (9, 2, 2): ([(0, 1), (3, 6)], [110, 1, 2, 111, 6, 7, 8, 110, 0, 114, 111, 3, 4, 5, 114]),
    (12, 3, 0): ([(4, 5), (5, 11)], [0, 1, 2, 3, 110, 111, 11, 110, 4, 114, 111, *range(5, 11), 114]),
    (12, 3, 5): ([(2, 3), (9, 12)], [0, 1, 110, *range(3, 9), 111, 110, 2, 114, 111, 9, 10, 11, 114]),
    (30, 3, 2): (
        [(0, 6), (12, 18), (25, 26)],
        [
            *(110, *range(6, 12), 111, *range(18, 25), 112, *range(26, 30)),
            *(110, *range(6), 114, 111, *range(12, 18), 114, 112, 25, 114),
        ],
    ),
}
WITH_EMPTY = {  # where the program keeps a span without a token
    (12, 3, 1): ([(2, 8), (8, 8)], [0, 1, 110, 111, 9, 10, 11, 110, *range(2, 8), 114, 111, 114]),
    (12, 3, 2): (
        [(5, 7), (8, 11), (10, 10)],
        [*range(5), 110, 7, 111, 11, 110, 5, 6, 114, 111, 8, 9, 10, 114, 112, 114],
    ),
}


def draws(count: int, start: int) -> Tensor:
    return (noise(count**2, 2, start=float(start)).double() + 1) / 2


@pytest.mark.parametrize("case", EXPECTED)
def test_spans_and_rows_equal_the_original(case: tuple[int, int, int]) -> None:
    length, count, start = case
    spans, row = EXPECTED[case]
    assert choose_spans(length, draws(count, start)) == spans
    assert move_spans(torch.arange(length), spans, MASKS, END).tolist() == row


def test_a_span_without_a_token_is_dropped() -> None:
    for (length, count, start), (spans, _) in WITH_EMPTY.items():
        ours = choose_spans(length, draws(count, start))
        assert ours == [(first, last) for first, last in spans if first < last]
        assert sorted(put_back(move_spans(torch.arange(length), ours, MASKS, END), MASKS, END).tolist()) == [
            *range(length)
        ]
    # In the program it costs a token: 8 is nowhere in the first row.
    assert 8 not in WITH_EMPTY[12, 3, 1][1]


def test_a_single_span_is_put_in_order_before_it_is_rounded() -> None:
    backwards = torch.tensor([[0.97, 0.24]], dtype=torch.float64)
    assert choose_spans(10, backwards) == [(2, 10)]
    assert choose_spans(10, backwards.expand(4, 2)) == [(2, 9)]  # as the program does with several


@pytest.mark.parametrize("seed", range(50))
def test_every_token_occurs_once_and_finds_back(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, count = int(torch.randint(1, 40, (), generator=generator)), seed % 4
    document = torch.randperm(100, generator=generator)[:length]
    spans = choose_spans(length, torch.rand(count**2, 2, generator=generator, dtype=torch.float64))
    assert all(first < last for first, last in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    row = move_spans(document, spans, MASKS, END)
    assert len(row) == length + 3 * len(spans)
    assert sorted(row[row < 100].tolist()) == sorted(document.tolist())
    assert [int((row == mask).sum()) for mask in MASKS] == [2] * len(spans) + [0] * (4 - len(spans))
    assert torch.equal(put_back(row, MASKS, END), document)


def row(words: int = 20) -> Tensor:
    return torch.cat([torch.full((4,), IMAGE), torch.arange(words)])


def test_patches_stay_in_front_and_are_no_targets() -> None:
    for seed in range(50):
        ids, labels = causally_masked(row(), CONFIG, torch.Generator().manual_seed(seed))
        assert (ids[:4] == IMAGE).all()
        assert (labels[:4] == -100).all()
        assert torch.equal(ids[4:], labels[4:])  # sentinels are learned, too
        assert torch.equal(put_back(ids, MASKS, END), row())


def test_how_many_documents_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [0] * 5
    for _ in range(2000):
        ids, _ = causally_masked(row(), CONFIG, generator)
        counts[int((ids == END).sum())] += 1
    # exp(-1) = 37 % have no span drawn; a span may also be empty, and several may not fit.
    assert 0.36 < counts[0] / 2000 < 0.43
    assert counts[3] > 0
    assert counts[4] == 0  # fewer than there are sentinels


def test_a_row_is_cut_to_the_context() -> None:
    long = row(TINY_TEXT.max_position_embeddings - 4)
    lengths = {
        len(causally_masked(long, CONFIG, torch.Generator().manual_seed(seed))[0]) for seed in range(9)
    }
    assert lengths == {TINY_TEXT.max_position_embeddings}


def test_draws_are_reproducible() -> None:
    first, again = (causally_masked(row(), CONFIG, torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(first, again)


@torch.no_grad()
def test_a_moved_span_sees_both_sides() -> None:
    model = randomize(tiny("cm3"))
    pixels = noise(1, 3, 28, 28)
    ids = torch.cat([torch.full((4,), IMAGE), move_spans(torch.arange(1, 7), [(2, 3)], (110,), 113)])[None]
    assert ids[0, 4:].tolist() == [1, 2, 110, 4, 5, 6, 110, 3, 113]
    other = ids.clone()
    other[0, 9] = 50  # the last word
    moved = (model(ids, pixels).logits - model(other, pixels).logits)[0].abs().amax(dim=-1)
    assert not moved[:9].any()
    assert moved[10] > 1e-3  # where the span's first token is written


class Scripted:
    """In place of the model's forward: writes what it is told."""

    def __init__(self, model: CM3, answers: list[list[int]]) -> None:
        self.rows: list[list[int]] = []
        self.answers, self.model = answers, model
        self.words: list[int] = []
        model.prefill, model.decode, model.logits = self.prefill, self.decode, self.logits

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Any]:
        assert pixel_values.shape == (1, 3, 16, 16)
        self.rows.append(input_ids[0].tolist())
        self.words = list(self.answers.pop(0))
        return torch.zeros(1, 1), None

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: Any) -> Tensor:
        return torch.zeros(1, 1)

    def logits(self, hidden_states: Tensor) -> Tensor:
        scores = torch.zeros(1, self.model.config.text.vocab_size)
        scores[0, self.words.pop(0)] = 1
        return scores


def in_the_world() -> tuple[CM3, Any, list[int], int]:
    """A model whose sentinels come after the words of the drawn world."""
    processor = build(TrainingConfig(image_size=16, patch_size=8))[1]
    size, image_id = processor.tokenizer.vocab_size, processor.tokenizer.image_id
    masks, end = [size, size + 1], size + 2
    system = tiny(
        "cm3",
        vision=type(TINY_VISION)(**{**vars(TINY_VISION), "image_size": 16, "patch_size": 8}),
        text=type(TINY_TEXT)(**{**vars(TINY_TEXT), "vocab_size": size + 3}),
        mask_token_ids=tuple(masks),
        end_of_mask_token_id=end,
        image_token_id=image_id,
    ).eval()
    assert isinstance(system, CM3)
    return system, processor, masks, end


def test_blanks_are_filled_from_left_to_right() -> None:
    model, processor, masks, end = in_the_world()
    tokenizer = processor.tokenizer
    red, blue = tokenizer.encode(" red"), tokenizer.encode(" blue")
    script = Scripted(model, [[*red, end], [*blue, end]])
    text = "caption en\na ___ star left of a ___ circle"
    filled = infill(model, processor, Image.new("RGB", (16, 16)), text)
    assert filled == "caption en\na red star left of a blue circle"
    document = [tokenizer.bos_id, *tokenizer.encode(filled), tokenizer.eos_id]
    places = [document.index(red[0]), document.index(blue[0])]
    spans = [(place, place + 1) for place in places]
    trained = move_spans(torch.tensor(document), spans, masks, end).tolist()
    image = [tokenizer.image_id] * 4
    assert script.rows == [image + trained[:-5], image + trained[:-2]]  # the very rows of training


def test_a_span_that_does_not_end_is_taken_as_it_is() -> None:
    model, processor, _, _ = in_the_world()
    red = processor.tokenizer.encode(" red")
    Scripted(model, [red * 3])
    filled = infill(model, processor, Image.new("RGB", (16, 16)), "a ___ star", max_new_tokens=2)
    assert filled == "a red red star"


@pytest.mark.parametrize(("text", "count"), [("a red star", 0), ("___ ___ ___ star", 3)])
def test_too_few_or_many_blanks_are_refused(text: str, count: int) -> None:
    model, processor, _, _ = in_the_world()
    with pytest.raises(InputError, match=f"the text has {count} blanks: expected 1 to 2 times '___'"):
        infill(model, processor, Image.new("RGB", (16, 16)), text)


def test_an_untrained_model_fills_blanks_with_something() -> None:
    model, processor, _, _ = in_the_world()
    filled = infill(model, processor, Image.new("RGB", (16, 16)), "a ___ star", max_new_tokens=3)
    assert filled.startswith("a")
    assert filled.endswith(" star")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_token_ids": (5,)}, r"mask_token_ids are \(5,\) .* two mask tokens at least"),
        ({"mask_token_ids": (5, 5)}, "all different"),
        ({"mask_token_ids": (5, END)}, "all different"),
        ({"mask_token_ids": (5, 120)}, "expected ids below vocab_size 120"),
        ({"mask_token_ids": (5, IMAGE)}, "none of them image_token_id 119"),
    ],
)
def test_sentinels_that_cannot_be_told_apart_are_refused(settings: dict[str, Any], words: str) -> None:
    own = {"vision": TINY_VISION, "text": TINY_TEXT, "image_token_id": IMAGE, "end_of_mask_token_id": END}
    with pytest.raises(InputError, match=words):
        CM3Config(**own | settings)
