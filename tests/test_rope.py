"""Rotary positions: a rotation, relative, half-split, and exact at any position."""

import math

import pytest
import torch
from torch import Tensor

from minivlm.rope import apply_rotary, rotary_angles, rotate_half

GENERATOR = torch.Generator().manual_seed(0)
Q, K = torch.randn(2, 1, 1, 1, 8, generator=GENERATOR, dtype=torch.float64)


def turned(x: Tensor, position: int) -> Tensor:
    """x [1, 1, 1, Dh] at a position."""
    return apply_rotary(x, *rotary_angles(torch.tensor([[position]]), x.shape[-1]))


def test_shapes_and_first_angles():
    cos, sin = rotary_angles(torch.tensor([[0, 3], [1, 2]]), head_dim=4, theta=100.0)
    assert cos.shape == sin.shape == (2, 1, 2, 4)
    assert cos.dtype == torch.float32
    # Pair i turns by position * theta ** (-2 i / Dh): 1 and 0.1 radians per position, in both halves.
    expected = torch.tensor([3.0, 0.3, 3.0, 0.3])
    torch.testing.assert_close(cos[0, 0, 1], expected.cos())
    torch.testing.assert_close(sin[0, 0, 1], expected.sin())


def test_position_zero_changes_nothing():
    assert torch.equal(turned(Q, 0), Q)


def test_pairs_are_turned_and_keep_their_length():
    x = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4)
    y = turned(x, 1).flatten()
    # The partner of element 0 is element 2 = 0 + Dh / 2, and the turn is counterclockwise.
    torch.testing.assert_close(y, torch.tensor([math.cos(1), 0, math.sin(1), 0]))
    assert rotate_half(torch.tensor([1.0, 2, 3, 4])).tolist() == [-3, -4, 1, 2]
    torch.testing.assert_close(turned(Q, 77).norm(), Q.norm())


def test_products_depend_on_distance_alone():
    def product(query: int, key: int) -> float:
        return float((turned(Q, query) * turned(K, key)).sum())

    for query, key in [(5, 2), (13, 10), (1003, 1000)]:
        assert product(query, key) == pytest.approx(product(3, 0), abs=1e-3 if query > 1000 else 1e-6)
    assert abs(product(4, 0) - product(3, 0)) > 1e-2
    assert abs(product(0, 3) - product(3, 0)) > 1e-2  # before and after are told apart


def test_half_split_is_the_papers_form_with_another_order():
    """The paper pairs neighbors (2i, 2i + 1). Sorting even elements before odd ones gives our form."""
    position, half = 5, 4
    angles = position * 10000.0 ** -(torch.arange(half).double() / half)
    even, odd = Q.flatten()[::2], Q.flatten()[1::2]
    paper = torch.stack(
        [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], 1
    )
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    ours = turned(Q[..., order], position).flatten()
    torch.testing.assert_close(ours, paper.flatten()[order], rtol=0, atol=1e-6)
    assert (turned(Q, position).flatten() - paper.flatten()).abs().max() > 0.1  # without it: another rotation


def test_bf16_keeps_its_dtype_and_far_positions_apart():
    x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    cos, sin = rotary_angles(torch.tensor([[256, 257]]), 4)  # as bf16 numbers, both positions are 256
    y = apply_rotary(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert (y[0, 0, 0] - y[0, 0, 1]).abs().max() > 0.1
