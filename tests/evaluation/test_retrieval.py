"""Ranks, recall and chance against loops that follow the words of their definitions."""

from __future__ import annotations

from itertools import permutations
from statistics import mean, median_low

import pytest
import torch
from torch import Tensor

from minivlm.evaluation.retrieval import (
    accuracy,
    chance_of_median_rank,
    chance_of_recall,
    median_rank,
    ranks,
    recall,
)


def draw(n: int, m: int, seed: int, levels: int = 6) -> tuple[Tensor, Tensor]:
    """Similarities of few levels, so that many are equal, and one to three right answers for each query."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(levels, (n, m), generator=generator).float()
    right = torch.rand(n, m, generator=generator).argsort(dim=1) < torch.randint(
        1, 4, (n, 1), generator=generator
    )
    return similarity, right


def naive_rank(row: list[float], right: list[bool]) -> int:
    """Sort the answers, of equally similar ones the wrong first, and look for the first right one."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], right[i]))
    return 1 + next(place for place, i in enumerate(order) if right[i])


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_recall_equal_loops(seed: int) -> None:
    similarity, right = draw(9, 7, seed)
    wanted = [naive_rank(row, mark) for row, mark in zip(similarity.tolist(), right.tolist(), strict=True)]
    found = ranks(similarity, right)
    assert found.tolist() == wanted
    for k in (1, 3, 7):
        assert recall(found, k) == pytest.approx(mean(rank <= k for rank in wanted))
    assert median_rank(found) == median_low(wanted)


def test_without_marks_the_diagonal_is_right() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.6], [0.1, 0.2, 0.3]])
    assert ranks(similarity).tolist() == [1, 3, 1]
    assert ranks(similarity.T).tolist() == [1, 1, 2]


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_towers_that_have_collapsed_are_last(value: float) -> None:
    """All is alike, so nothing was found; with "more similar than the right one" recall would be 1."""
    assert ranks(torch.full((4, 4), value)).tolist() == [4] * 4


def test_chance_equals_the_mean_over_all_orders() -> None:
    _, right = draw(5, 5, seed=0)
    orders = [torch.tensor(order).float().expand(5, 5) for order in permutations(range(5))]
    places = torch.cat([ranks(order, right) for order in orders])
    for k in (1, 2, 5, 10):
        assert chance_of_recall(right, k) == pytest.approx(recall(places, k))
    assert chance_of_median_rank(right) == median_rank(places)
    assert chance_of_recall(torch.eye(200).bool(), 10) == pytest.approx(0.05)
    assert chance_of_median_rank(torch.eye(200).bool()) == 100


def test_accuracy_counts_a_draw_as_a_mistake() -> None:
    similarity = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [0.0, 1.0]])
    assert accuracy(similarity, torch.tensor([0, 1, 0, 0])) == 0.5


def test_matrices_that_are_refused() -> None:
    with pytest.raises(ValueError, match="query 2 of 3 has no right answer"):
        ranks(torch.zeros(3, 3), torch.tensor([[True] * 3, [False] * 3, [True] * 3]))
    with pytest.raises(ValueError, match=r"similarity is \[3, 2\], and right is \[2, 3\]"):
        ranks(torch.zeros(3, 2), torch.ones(2, 3).bool())
