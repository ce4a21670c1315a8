"""Decoding: greedy, temperature, top-k, top-p, ends of rows, and every refusal.

The model here is a table: the logits of the next token depend only on the last token, so every answer is
known in advance.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.cache import KVCache
from minivlm.errors import InputError
from minivlm.generate import generate, sample, stream

EOS, PAD = 1, 0


class Table:
    """Hidden states are one-hot vectors of the last token; logits are rows of a table [V, V]."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.prefills = 0
        self.fed: list[list[int | None]] = []  # what decode read, None for finished rows

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> tuple[Tensor, KVCache]:
        self.prefills += 1
        last = [int(row[mask.bool()][-1]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        return self._hidden(torch.tensor(last)), KVCache(1, len(input_ids), 1, 2)

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: KVCache) -> Tensor:
        self.fed.append([int(t) if on else None for t, on in zip(token_ids, unfinished, strict=True)])
        return self._hidden(token_ids)

    def logits(self, hidden_states: Tensor) -> Tensor:
        assert hidden_states.dim() == 2, "one position per row: [B, V], never [B, S, V]"
        return hidden_states @ self.table

    def _hidden(self, token_ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(token_ids, len(self.table)).float()


def countdown() -> Table:
    """7 is followed by 6, ..., 2 by 1, which is the end."""
    return Table(torch.eye(8).roll(-1, dims=1) * 10)


def random_table() -> Table:
    return Table(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)))


def run(
    model: Table, rows: list[list[int]], mask: list[list[int]] | None = None, **kwargs: Any
) -> list[list[int]]:
    attention_mask = None if mask is None else torch.tensor(mask)
    return generate(
        model, torch.tensor(rows), attention_mask, eos_token_id=EOS, pad_token_id=PAD, **kwargs
    ).tolist()


# Greedy, and the ends of rows


def test_greedy_takes_the_most_probable_token_until_the_end():
    model = countdown()
    assert run(model, [[3, 5]]) == [[4, 3, 2, 1]]
    assert model.prefills == 1
    assert model.fed == [[4], [3], [2]]  # the end itself is not read


def test_finished_rows_are_padded_and_no_longer_read():
    model = countdown()
    assert run(model, [[3], [6]]) == [[2, 1, 0, 0, 0], [5, 4, 3, 2, 1]]
    assert model.fed == [[2, 5], [None, 4], [None, 3], [None, 2]]


def test_max_new_tokens():
    model = countdown()
    assert run(model, [[7], [6]], max_new_tokens=2) == [[6, 5], [5, 4]]
    assert len(model.fed) == 1  # the last token is returned, not read


def test_padding_on_either_side_is_ignored():
    rows = [[3, 4, 5], [7, 0, 0], [0, 0, 7]]
    mask = [[1, 1, 1], [1, 0, 0], [0, 0, 1]]
    answers = run(countdown(), rows, mask, max_new_tokens=3)
    assert answers == [[4, 3, 2], [6, 5, 4], [6, 5, 4]]


def test_stream_gives_each_token_as_soon_as_it_is_known():
    model = countdown()
    tokens = stream(model, torch.tensor([[5]]), eos_token_id=EOS)
    assert model.prefills == 0
    for number, expected in enumerate([4, 3, 2, 1]):
        assert next(tokens).tolist() == [expected]
        assert len(model.fed) == number
        assert torch.is_grad_enabled()  # between two tokens, the caller's gradients are on
    with pytest.raises(StopIteration):
        next(tokens)


def test_any_of_several_ends():
    def answer(ends: int | list[int] | tuple[int, ...]) -> list[list[int]]:
        return generate(countdown(), torch.tensor([[6], [3]]), eos_token_id=ends).tolist()

    assert answer([4, 2]) == [[5, 4], [2, 0]]
    assert answer((2,)) == answer(2) == [[5, 4, 3, 2], [2, 0, 0, 0]]


# Sampling


def shares_drawn(logits: list[float], count: int = 4000, **limits: Any) -> Tensor:
    """The share of draws that each token gets [V]."""
    generator = torch.Generator().manual_seed(0)
    limits = {"top_k": None, "top_p": None} | limits
    rows = torch.tensor(logits).expand(count, -1)
    drawn = sample(rows, limits["top_k"], limits["top_p"], [generator] * count)
    return torch.bincount(drawn, minlength=len(logits)) / count


HALVES = [math.log(p) for p in (0.125, 0.5, 0.25, 0.125)]  # exact in binary, and not sorted


def test_sampling_follows_the_probabilities():
    torch.testing.assert_close(shares_drawn(HALVES), torch.tensor(HALVES).exp(), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, {1}), (2, {1, 2}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_best(top_k: int, expected: set[int]):
    shares = shares_drawn(HALVES, top_k=top_k)
    assert set(shares.nonzero().flatten().tolist()) == expected
    kept = torch.tensor(HALVES).exp() * (shares > 0)
    torch.testing.assert_close(shares, kept / kept.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-6, {1}),
        (0.5, {1}),  # exactly reached: no more are needed
        (0.51, {1, 2}),
        (0.75, {1, 2}),
        (0.76, {0, 1, 2}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, expected: set[int]):
    shares = shares_drawn(HALVES, top_p=top_p)
    found = set(shares.nonzero().flatten().tolist())
    # Of the two tokens with 0.125 either may complete a set of three.
    assert found == expected or (len(expected) == 3 and found == {1, 2, 3})
    kept = torch.tensor(HALVES).exp() * (shares > 0)
    torch.testing.assert_close(shares, kept / kept.sum(), rtol=0, atol=0.03)


def test_top_p_looks_at_what_top_k_left():
    # Of the best two, renormalized to 2/3 and 1/3, the first alone reaches 0.6; of all four it does not.
    assert set(shares_drawn(HALVES, top_k=2, top_p=0.6).nonzero().flatten().tolist()) == {1}
    assert set(shares_drawn(HALVES, top_p=0.6).nonzero().flatten().tolist()) == {1, 2}


def test_temperature_sharpens_and_flattens():
    def distinct(temperature: float) -> int:
        rows = [[7]] * 200
        return len(
            {row[0] for row in run(random_table(), rows, max_new_tokens=1, temperature=temperature, seed=0)}
        )

    greedy = run(random_table(), [[7]], max_new_tokens=5)
    assert run(random_table(), [[7]], max_new_tokens=5, temperature=1e-3, seed=0) == greedy
    assert distinct(0.1) < distinct(1.0) < distinct(100.0)


def test_a_seed_makes_sampling_reproducible():
    def answer(seed: int | None) -> list[list[int]]:
        return run(random_table(), [[7], [7]], max_new_tokens=20, temperature=1.0, seed=seed)

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)
    assert answer(None) != answer(None)
    assert answer(3)[0] != answer(3)[1]  # each row has its own random numbers
    torch.manual_seed(0)
    first = answer(None)
    torch.manual_seed(0)
    assert answer(None) == first


def test_a_rows_answer_does_not_depend_on_the_batch():
    rows = [[7], [8], [9]]
    together = run(random_table(), rows, max_new_tokens=20, temperature=1.0, seed=3)
    for number, row in enumerate(rows):
        alone = run(random_table(), [row], max_new_tokens=20, temperature=1.0, seed=3 + number)
        assert together[number][: len(alone[0])] == alone[0]
        assert not any(together[number][len(alone[0]) :])


def test_sampling_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    run(random_table(), [[7]], max_new_tokens=3, temperature=1.0, seed=5)
    assert torch.equal(torch.rand(1), expected)


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: ask for at least 1"),
        (
            {"max_new_tokens": 6, "max_length": 8},
            "prompt has 3 tokens .* context of 8: ask for at most 5 new",
        ),
        (
            {"max_new_tokens": 1, "max_length": 2},
            "prompt has 3 tokens .* context of 2: shorten the prompt by 2 or more",
        ),
        ({"max_new_tokens": 1, "max_length": 3}, "context of 3: shorten the prompt by 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1: use 0"),
        ({"temperature": float("nan")}, "temperature is nan: use 0"),
        ({"temperature": 1e-40}, "temperature is 1e-40: use 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0: keep at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0: it is a probability"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_numbers_out_of_range(kwargs: dict[str, Any], message: str):
    model = countdown()
    with pytest.raises(InputError, match=message):
        run(model, [[3, 4, 5]], **kwargs)
    assert model.prefills == 0  # refused before the work


def test_the_longest_real_row_counts_against_the_context():
    rows, mask = [[0, 0, 5], [0, 6, 7]], [[0, 0, 1], [0, 1, 1]]
    assert len(run(countdown(), rows, mask, max_new_tokens=6, max_length=8)[0]) == 6
    with pytest.raises(InputError, match="prompt has 2 tokens"):
        run(countdown(), rows, mask, max_new_tokens=7, max_length=8)


class Weighted(Table, torch.nn.Module):
    """A table that is a parameter, as in a real model."""

    def __init__(self, table: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.table = torch.nn.Parameter(table)
        self.prefills, self.fed = 0, []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_weights_are_named(bad: float):
    with pytest.raises(InputError, match="NaN or infinity in table: the checkpoint is damaged"):
        run(Weighted(torch.full((8, 8), bad)), [[5]])


def test_overflow_is_told_from_damage():
    model = Weighted(torch.full((8, 8), 1e38))
    model._hidden = lambda token_ids: torch.full((len(token_ids), 8), 1e38)
    with pytest.raises(InputError, match=r"although all weights are: .* try dtype=torch.float32"):
        run(model, [[5]])


class OverflowsLater(Weighted):
    """The embedding of one token is too large."""

    def __init__(self, token: int) -> None:
        super().__init__(countdown().table)
        self.token = token

    def _hidden(self, token_ids: Tensor) -> Tensor:
        return super()._hidden(token_ids) + torch.where(token_ids == self.token, torch.inf, 0)[:, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overflow_at_a_later_token(temperature: float):
    rows = torch.tensor([[6], [7]])
    tokens = stream(OverflowsLater(4), rows, eos_token_id=EOS, temperature=temperature, seed=0)
    assert next(tokens).tolist() == [5, 6]
    assert next(tokens).tolist() == [4, 5]
    with pytest.raises(InputError, match="the numbers overflow, try dtype"):
        next(tokens)


def test_a_finished_row_may_overflow():
    """What it gets as padding is not read by anyone."""
    assert run(OverflowsLater(PAD), [[3], [6]]) == [[2, 1, 0, 0, 0], [5, 4, 3, 2, 1]]


def test_pixels_that_are_not_finite_are_named():
    model = Weighted(torch.full((8, 8), 1e38))
    model._hidden = lambda token_ids: torch.full((len(token_ids), 8), math.nan)
    with pytest.raises(InputError, match=r"^pixel_values hold NaN or infinity"):
        run(model, [[5]], pixel_values=torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize(
    ("input_ids", "kwargs", "message"),
    [
        ([[5.0]], {}, r"input_ids is of type torch.float32, expected whole numbers"),
        ([5], {}, r"input_ids has shape \[1\], expected \[B, T\]"),
        ([], {}, r"input_ids has shape \[0\]"),
        ([[]], {}, r"input_ids has shape \[1, 0\]"),
        ([[5]], {"attention_mask": torch.ones(2, 1)}, r"attention_mask has shape \[2, 1\]"),
        ([[5]], {"attention_mask": torch.zeros(1, 1)}, "a row of attention_mask has padding alone"),
        ([[5]], {"top_k": 1.5}, "top_k is 1.5: expected a whole number"),
        ([[5]], {"max_new_tokens": 2.0}, "max_new_tokens is 2.0: expected a whole number"),
        ([[5]], {"max_new_tokens": True}, "max_new_tokens is True: expected a whole number"),
    ],
)
def test_inputs_of_another_shape_or_type(input_ids: list[Any], kwargs: dict[str, Any], message: str):
    model = countdown()
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor(input_ids), eos_token_id=EOS, **kwargs)
    assert model.prefills == 0


def test_a_stream_refuses_at_its_first_token():
    tokens: Iterator[Tensor] = stream(countdown(), torch.tensor([[5]]), eos_token_id=EOS, max_new_tokens=0)
    with pytest.raises(InputError):
        next(tokens)
