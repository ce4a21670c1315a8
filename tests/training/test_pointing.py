"""A linear layer in the middle of the decoder that learns where things lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minivlm.training.pointing import PointHead, states_after


@pytest.mark.parametrize(
    ("blocks", "layers"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 1]), (4, [1, 2]), (6, [2, 3])]
)
def test_it_reads_the_middle(blocks: int, layers: list[int]) -> None:
    head = PointHead(8, blocks)
    assert head.layers == sorted(set(layers))
    assert len(head.points) == len(head.layers)


def head_that_says(x: float, y: float) -> PointHead:
    head = PointHead(4, 1)
    with torch.no_grad():
        head.points[0].weight.zero_()
        head.points[0].bias.copy_(torch.tensor([x, y]))
    return head


def test_the_loss_by_hand() -> None:
    states = [torch.randn(1, 3, 4)]
    points = torch.full((1, 3, 2), torch.nan)
    points[0, 1] = torch.tensor([0.5, -0.25])
    assert head_that_says(0.5, -0.25).loss(states, points).item() == 0
    # One of the two numbers is off by .3, which is more than beta: |.3| - beta / 2, and the mean of two.
    assert head_that_says(0.8, -0.25).loss(states, points).item() == pytest.approx((0.3 - 0.05) / 2)


def test_nothing_to_say_costs_nothing() -> None:
    head = PointHead(4, 1)
    loss = head.loss([torch.randn(2, 3, 4, requires_grad=True)], torch.full((2, 3, 2), torch.nan))
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in head.parameters())


def test_parts_of_a_batch_add_up() -> None:
    head, states = PointHead(4, 2), [torch.randn(4, 5, 4), torch.randn(4, 5, 4)]
    points = torch.rand(4, 5, 2) * 2 - 1
    points[torch.rand(4, 5) < 0.5] = torch.nan
    points[0] = torch.nan
    count = (~points[..., 0].isnan()).sum()
    parts = [head.loss([state[rows] for state in states], points[rows], count) for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(sum(parts), head.loss(states, points))


def test_the_length_of_a_state_does_not_matter() -> None:
    head, state, points = PointHead(4, 1), torch.randn(2, 3, 4), torch.rand(2, 3, 2)
    torch.testing.assert_close(head.loss([state], points), head.loss([100 * state], points))


def test_states_are_collected_in_order_and_only_inside() -> None:
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    x = torch.randn(2, 3)
    with states_after(blocks, [1, 2]) as states:
        expected = []
        for block in blocks:
            x = block(x)
            expected.append(x)
    blocks[1](x)
    assert len(states) == 2
    assert states[0] is expected[1]
    assert states[1] is expected[2]
    assert not any(block._forward_hooks for block in blocks)
