"""One forward, three views: the whole sequence at once, token by token with a cache, and a padded batch.

The logits of a row are the same in all three, whatever else is in the batch. So are the answers.
"""

import pytest
import torch
from helpers import IMAGE_TOKENS, TOLERANCE, assert_equal, make_batch, tiny_paligemma, without_labels
from torch import Tensor

from minivlm import PaliGemma
from minivlm.errors import InputError

# Three rows: words of the prefix, words of the suffix, with or without a picture.
PREFIXES, SUFFIXES, PICTURES = [3, 6, 4], [5, 2, 4], [True, False, True]
MIXED = pytest.mark.parametrize(
    "pictures", [PICTURES, [True] * 3, [False] * 3], ids=["mixed", "pictures", "text"]
)
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return tiny_paligemma()


def cut(batch: dict[str, Tensor], row: int, pictures: list[bool]) -> dict[str, Tensor]:
    """One row of a batch as a batch of its own, without padding."""
    keep = batch["attention_mask"][row].bool()
    alone = {
        name: batch[name][row : row + 1, keep] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    if pictures[row]:
        alone["pixel_values"] = batch["pixel_values"][sum(pictures[:row])][None]
    return alone


@torch.no_grad()
@SIDES
@MIXED
def test_padded_batch_equals_single_rows(model: PaliGemma, side: str, pictures: list[bool]):
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, pictures, side))
    logits = model(**batch).logits
    for row in range(3):
        alone = model(**cut(batch, row, pictures)).logits
        assert_equal(logits[row, batch["attention_mask"][row].bool()], alone[0])


@torch.no_grad()
@SIDES
@MIXED
def test_cached_decoding_equals_the_whole_sequence(model: PaliGemma, side: str, pictures: list[bool]):
    """The prefix in one go, then the suffix token by token; rows end at different times."""
    whole = without_labels(make_batch(PREFIXES, SUFFIXES, pictures, "right"))
    singles = [cut(whole, row, pictures) for row in range(3)]
    expected = [model(**single).logits[0] for single in singles]
    starts = [int((single["token_type_ids"] == 0).sum()) for single in singles]

    prefix = _prefixes(singles, starts, side)
    if "pixel_values" in whole:
        prefix["pixel_values"] = whole["pixel_values"]
    hidden, cache = model.prefill(**prefix)
    compared = 0
    for step in range(max(SUFFIXES) + 1):
        logits = model.logits(hidden)
        for row in range(3):
            if step <= SUFFIXES[row]:
                assert_equal(logits[row], expected[row][starts[row] - 1 + step])
                compared += 1
        unfinished = torch.tensor([step < count for count in SUFFIXES])
        tokens = [
            int(singles[row]["input_ids"][0, starts[row] + step]) if unfinished[row] else 0
            for row in range(3)
        ]
        if unfinished.any():
            hidden = model.decode(torch.tensor(tokens), unfinished, cache)
    assert compared == sum(SUFFIXES) + 3
    assert cache.lengths.tolist() == [start + count for start, count in zip(starts, SUFFIXES, strict=True)]


def _prefixes(singles: list[dict[str, Tensor]], starts: list[int], side: str) -> dict[str, Tensor]:
    longest = max(starts)
    ids, mask = torch.zeros(2, 3, longest, dtype=torch.long)
    for row, (single, start) in enumerate(zip(singles, starts, strict=True)):
        place = slice(longest - start, longest) if side == "left" else slice(start)
        ids[row, place] = single["input_ids"][0, :start]
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@SIDES
def test_prefill_may_hold_a_part_of_the_answer(model: PaliGemma, side: str):
    """With token_type_ids, the suffix in a prefill is causal: its last logits are those of a forward pass."""
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES, side))
    hidden, _ = model.prefill(**batch)
    expected = [model(**cut(batch, row, PICTURES)).logits[0, -1] for row in range(3)]
    assert_equal(model.logits(hidden), torch.stack(expected))
    del batch["token_type_ids"]
    hidden, _ = model.prefill(**batch)  # everything is prefix: different logits
    assert (model.logits(hidden) - torch.stack(expected)).abs().max() > 100 * TOLERANCE


@SIDES
@MIXED
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_k": 50, "top_p": 0.95}], ids=["greedy", "sampled"]
)
def test_answers_of_a_batch_are_those_of_its_rows(
    model: PaliGemma, side: str, pictures: list[bool], sampling
):
    batch = make_batch(PREFIXES, [0, 0, 0], pictures, side)
    del batch["labels"]
    singles = [cut(batch, row, pictures) for row in range(3)]
    del batch["token_type_ids"]

    def seed(row: int) -> dict[str, int]:
        return {"seed": 7 + row} if sampling else {}

    together = model.generate(**batch, max_new_tokens=12, **sampling, **seed(0))
    answers = set()
    for row, single in enumerate(singles):
        alone = model.generate(**single, max_new_tokens=12, **sampling, **seed(row))[0].tolist()
        assert together[row, : len(alone)].tolist() == alone
        assert not together[row, len(alone) :].any()
        answers.add(tuple(alone))
    assert len(answers) == 3  # the answers do differ


def test_greedy_answer_is_the_argmax_of_full_passes(model: PaliGemma):
    """The naive way: run the whole sequence again for every token."""
    batch = without_labels(make_batch([4], [0], [True]))
    answer = model.generate(batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=10)
    ids, types = batch["input_ids"], batch["token_type_ids"]
    for token in answer[0]:
        logits = model(ids, batch["pixel_values"], token_type_ids=types).logits
        assert logits[0, -1].argmax() == token
        ids, types = torch.cat([ids, token[None, None]], 1), torch.cat([types, torch.ones(1, 1).long()], 1)


def test_answers_depend_on_the_picture(model: PaliGemma):
    batch = make_batch([4], [0], [True])
    first = model.generate(batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=10)
    second = model.generate(batch["input_ids"], pixel_values=-batch["pixel_values"], max_new_tokens=10)
    assert first.tolist() != second.tolist()


def test_the_picture_is_encoded_once_per_answer(model: PaliGemma):
    calls = []
    hook = model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch([4, 4], [0, 0], [True, True])
    model.generate(batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=5)
    hook.remove()
    assert len(calls) == 1


def test_stream_is_generate(model: PaliGemma):
    batch = make_batch([4], [0], [True])
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], "max_new_tokens": 6}
    assert torch.equal(torch.stack(list(model.stream(**inputs)), dim=1), model.generate(**inputs))


def test_the_context_is_a_limit(model: PaliGemma):
    batch = make_batch([4], [0], [True])
    with pytest.raises(InputError, match=f"the prompt has {IMAGE_TOKENS + 4} tokens .* context of 64"):
        model.generate(batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=57)


def test_bf16_keeps_its_dtype_and_stays_near(model: PaliGemma):
    half = tiny_paligemma().bfloat16()
    batch = without_labels(make_batch(PREFIXES, SUFFIXES, PICTURES))
    with torch.no_grad():
        logits, expected = half(**batch).logits, model(**batch).logits
        hidden, cache = half.prefill(**batch)
    assert logits.dtype == hidden.dtype == cache.keys[0].dtype == torch.bfloat16
    real = batch["attention_mask"].bool()
    assert (logits.float() - expected)[real].abs().mean() < 0.1 * expected[real].abs().mean()
