"""Which mistakes the checks of 10_contrastive_training name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, towers
from minivlm.losses import l2_normalize

Answer = Callable[..., Any]
ranks, ring, equals = (
    towers.solutions.find_ranks,
    towers.solutions.ring_loss,
    towers.solutions.sigmoid_of_equals,
)

RANKS: list[tuple[Answer, str]] = [
    (lambda s: ranks(s) - 1, "count from 0"),
    (lambda s: 1 + (s >= s.diagonal()[:, None]).sum(1), "one too large"),
    (lambda s: 1 + (s > s.diagonal()[:, None]).sum(1), "in the model's favor"),
    (lambda s: ranks(s.T), "ranks of the pictures"),
    (lambda s: s.argsort(dim=1, descending=True, stable=True).diagonal(), "which caption is at each place"),
    (lambda s: s.argsort(dim=1, descending=True, stable=True)[:, 0], "which caption is at each place"),
    (lambda s: ranks(-s), "least similar"),
    (lambda s: ranks(s).float(), "whole numbers"),
]


@pytest.mark.parametrize(("answer", "hint"), RANKS)
def test_find_ranks_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.find_ranks(answer)


def _means(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return l2_normalize(a).mean(0), l2_normalize(b).mean(0)


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).norm().item()


GAPS: list[tuple[Answer, str]] = [
    (lambda a, b: _distance(a.mean(0), b.mean(0)), "not of length 1"),
    (lambda a, b: _distance(l2_normalize(a.mean(0)), l2_normalize(b.mean(0))), "normalized the means"),
    (lambda a, b: _distance(*map(l2_normalize, _means(a, b))), "their means as well"),
    (lambda a, b: torch.cdist(l2_normalize(a), l2_normalize(b)).mean().item(), "mean distance"),
    (lambda a, b: _distance(*_means(a, b)) ** 2, "square"),
    (lambda a, b: F.cosine_similarity(*_means(a, b), dim=0).item(), "cosine"),
    (lambda a, b: _means(a, b)[0] - _means(a, b)[1], "one number"),
    (lambda a, b: "wide", "got a str"),
]


@pytest.mark.parametrize(("answer", "hint"), GAPS)
def test_modality_gap_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.modality_gap(answer)


def test_modality_gap_accepts_a_tensor() -> None:
    towers.modality_gap(lambda a, b: (_means(a, b)[0] - _means(a, b)[1]).norm())


def _turn(
    images: list[Tensor],
    texts: list[Tensor],
    block_loss: Answer,
    *,
    rounds: int = 3,
    step: int = -1,
    own: Callable[[int, int, int], bool] = lambda device, owner, turn: device == owner,
) -> tuple[Tensor, list[list[int]]]:
    """A ring with something wrong. Every device gets what the one `step` further had."""
    held = list(enumerate(texts))
    met: list[list[int]] = [[] for _ in images]
    total = torch.tensor(0.0)
    for turn in range(rounds):
        for device, (owner, passing) in enumerate(held):
            met[device].append(owner)
            total = total + block_loss(images[device], passing, own(device, owner, turn))
        held = [held[(device + step) % len(held)] for device in range(len(held))]
    return total / len(images), met


def _one_after_the_other(
    images: list[Tensor], texts: list[Tensor], block_loss: Answer
) -> tuple[Tensor, list[list[int]]]:
    """Every device overwrites its neighbor's texts before the neighbor has passed them on."""
    held = list(enumerate(texts))
    met: list[list[int]] = [[] for _ in images]
    total = torch.tensor(0.0)
    for _ in images:
        for device, (owner, passing) in enumerate(held):
            met[device].append(owner)
            total = total + block_loss(images[device], passing, owner == device)
        for device in range(len(held)):
            held[device] = held[device - 1]
    return total / len(images), met


def _changed(change: Callable[[Tensor, list[list[int]]], Any]) -> Answer:
    return lambda *args: change(*ring(*args))


RINGS: list[tuple[Answer, str]] = [
    (_one_after_the_other, "at the same moment"),
    (lambda *args: _turn(*args, rounds=2), "own block counts as well"),
    (lambda *args: _turn(*args, rounds=4), "back home"),
    (lambda *args: _turn(*args, step=1), "to the left"),
    (lambda *args: _turn(*args, own=lambda device, owner, turn: True), "`own` is wrong"),
    (lambda images, texts, loss: ring([x[:1] for x in images], texts, loss), "whole block"),
    (_changed(lambda loss, met: (3 * loss, met)), "sum over the devices"),
    (_changed(lambda loss, met: (loss / 3, met)), "mean over all blocks"),
    (_changed(lambda loss, met: (loss, [[0, 1, 2]] * 3)), "order of their numbers"),
    (_changed(lambda loss, met: (loss, [[0], [1], [2]])), "expected"),
    (_changed(lambda loss, met: loss), "two things"),
]


@pytest.mark.parametrize(("answer", "hint"), RINGS)
def test_ring_loss_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.ring_loss(answer)


def _equal(captions: list[str]) -> Tensor:
    return torch.tensor([[a == b for b in captions] for a in captions])


def _terms(logits: Tensor, captions: list[str]) -> Tensor:
    return -F.logsigmoid(torch.where(_equal(captions), logits, -logits))


EQUALS: list[tuple[Answer, str]] = [
    (lambda x, c: -F.logsigmoid((2 * torch.eye(len(x)) - 1) * x).sum() / len(x), "only the diagonal"),
    (lambda x, c: _terms(x, c)[torch.eye(len(x)).bool() | ~_equal(c)].sum() / len(x), "left out"),
    (lambda x, c: _terms(x, c)[_equal(c)].sum() / len(x), "only the right pairs"),
    (lambda x, c: -F.logsigmoid(_equal(c) * x).sum() / len(x), "sign 0"),
    (lambda x, c: equals(-x, c), "swapped"),
    (lambda x, c: _terms(x, c).mean(), "mean over all"),
    (lambda x, c: _terms(x, c).sum(), "divide it by n"),
    (lambda x, c: _terms(x, c).sum() / _equal(c).sum(), "number of right pairs"),
    (lambda x, c: -equals(x, c), "sign of the loss"),
]


@pytest.mark.parametrize(("answer", "hint"), EQUALS)
def test_sigmoid_of_equals_names_the_mistake(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        towers.sigmoid_of_equals(answer)
