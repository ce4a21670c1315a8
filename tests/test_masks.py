"""Each mask is what the drawing in its docstring shows: per row, with a cache, and combined with others."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minivlm import masks

FOUR, FIVE = torch.arange(4)[None], torch.arange(5)[None]


def drawing(function: Callable[..., Tensor]) -> list[list[int]]:
    """The rows of 0 and 1 in a docstring."""
    lines = [line.split() for line in (function.__doc__ or "").splitlines()]
    return [[int(mark) for mark in line] for line in lines if line and set(line) <= {"0", "1"}]


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (masks.causal, masks.causal(FOUR, FOUR)),
        (masks.prefix_lm, masks.prefix_lm(FIVE, FIVE, torch.tensor([3]))),
        (masks.padding, masks.padding(torch.tensor([[0, 1, 1, 1]])).expand(1, 4, 4)),
        (masks.sliding, masks.sliding(FOUR, FOUR, 2) & masks.causal(FOUR, FOUR)),
        (
            masks.block_diagonal,
            masks.block_diagonal(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 1]])),
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_mask_is_its_drawing(function: Callable[..., Tensor], mask: Tensor):
    assert mask.dtype == torch.bool
    assert mask[0].int().tolist() == drawing(function)


def test_every_mask_has_a_drawing():
    functions = [
        f for _, f in inspect.getmembers(masks, inspect.isfunction) if f.__module__ == masks.__name__
    ]
    assert len(functions) >= 5
    for function in functions:
        assert drawing(function), f"{function.__name__} has no drawing"


def test_rows_have_prefixes_of_their_own():
    mask = masks.prefix_lm(FOUR.expand(2, 4), FOUR.expand(2, 4), torch.tensor([1, 4]))
    assert torch.equal(mask[0], masks.causal(FOUR, FOUR)[0])  # a prefix of one token changes nothing
    assert mask[1].all()


def test_decoding_takes_the_last_row_of_the_full_mask():
    """Positions are compared, not indices: a single query with all keys sees what it saw in the full mask."""
    for full, one in [
        (masks.causal(FIVE, FIVE), masks.causal(FIVE[:, 4:], FIVE)),
        (masks.sliding(FIVE, FIVE, 3), masks.sliding(FIVE[:, 4:], FIVE, 3)),
        (
            masks.prefix_lm(FIVE, FIVE, torch.tensor([2])),
            masks.prefix_lm(FIVE[:, 4:], FIVE, torch.tensor([2])),
        ),
    ]:
        assert torch.equal(full[:, 4:], one)


def test_left_padding_shifts_a_mask():
    """Row 0 has no padding, row 1 one pad on the left: its real corner is a causal mask of 3."""
    is_real = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    positions = (is_real.cumsum(dim=1) - 1).clamp(min=0)
    mask = masks.causal(positions, positions) & masks.padding(is_real)
    assert torch.equal(mask[0], masks.causal(FOUR, FOUR)[0])
    assert torch.equal(mask[1, 1:, 1:], masks.causal(FOUR[:, :3], FOUR[:, :3])[0])
    assert not mask[1, :, 0].any()
