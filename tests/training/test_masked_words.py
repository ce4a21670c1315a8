"""What VisualBERT learns from: masked words, exchanged captions, and one word of each answer."""

from __future__ import annotations

import pytest
import torch

from minivlm.errors import InputError
from minivlm.training.masked_words import exchange_captions, mask_words, one_word_each

MASK, PAD = 3, 0
VOCABULARY = torch.arange(10, 100)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_seventh_of_the_words_is_chosen_and_most_of_it_masked() -> None:
    ids = torch.randint(10, 100, (200, 100), generator=generator(1))
    words = torch.ones_like(ids, dtype=torch.bool)
    words[:, :5] = False
    masked, labels = mask_words(ids, words, MASK, VOCABULARY, generator())
    chosen = labels != -100
    assert float(chosen[:, 5:].float().mean()) == pytest.approx(0.15, abs=0.01)
    assert not chosen[:, :5].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    hidden, kept = masked[chosen] == MASK, masked[chosen] == ids[chosen]
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.02)  # and 1 of 90 others by chance
    others = masked[chosen][~hidden & ~kept]
    assert len(others.unique()) > 80
    assert int(others.min()) >= 10


def test_the_generator_says_which() -> None:
    ids = torch.randint(10, 100, (4, 30), generator=generator(1))
    words = torch.ones_like(ids, dtype=torch.bool)
    first, again, other = (mask_words(ids, words, MASK, VOCABULARY, generator(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all(share: float) -> None:
    ids = torch.tensor([[20, 30, PAD]])
    labels = mask_words(ids, ids != PAD, MASK, VOCABULARY, generator(), share)[1]
    assert labels.tolist() == [[20, 30, -100] if share else [-100] * 3]


def test_half_of_the_captions_are_of_another_picture() -> None:
    captions = torch.arange(400)[:, None].expand(-1, 3)
    order, fits = exchange_captions(captions, generator())
    own = order == torch.arange(400)
    assert torch.equal(own.long(), fits)
    assert float(fits.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert len(order[~own].unique()) > 100


def test_the_same_words_are_never_wrong() -> None:
    captions = torch.tensor([[7, 8], [7, 8], [7, 9], [7, 8]])
    for seed in range(20):
        order, fits = exchange_captions(captions, generator(seed), share=1.0)
        assert fits.tolist() == [0, 0, 0, 0]
        assert order[[0, 1, 3]].tolist() == [2, 2, 2]
        assert int(order[2]) != 2
    order, fits = exchange_captions(captions[:2], generator(), share=1.0)
    assert (order.tolist(), fits.tolist()) == ([0, 1], [1, 1])


def test_one_word_of_each_answer() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, 7], [-100, 8, -100, -100, -100], [-100] * 5])
    seen = set()
    for seed in range(30):
        kept = one_word_each(labels, generator(seed))
        assert (kept != -100).sum(dim=1).tolist() == [1, 1, 0]
        assert int(kept[1, 1]) == 8
        seen.add(int(kept[0].max()))
    assert seen == {5, 6, 7}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(share: float) -> None:
    ids = torch.tensor([[20, 30]])
    with pytest.raises(InputError, match=f"share is {share}: expected a part of the whole, from 0 to 1"):
        mask_words(ids, ids > 0, MASK, VOCABULARY, generator(), share)
    with pytest.raises(InputError, match="share is"):
        exchange_captions(ids, generator(), share)
