"""The checks of 09_looking_inside say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.looking import measures


def distance_with(distances: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda weights: (weights * distances(weights.shape[-1])).sum(dim=-1).mean(dim=(0, 2))


def on_a_line(count: int) -> Tensor:
    numbers = torch.arange(float(count))
    return (numbers[:, None] - numbers).abs()


def city_blocks(count: int) -> Tensor:
    side = round(count**0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return torch.cdist(places, places, p=1)


def weighted(weights: Tensor) -> Tensor:
    return weights * measures.patch_distances(weights.shape[-1])


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (distance_with(on_a_line), "a new row begins between them"),
        (distance_with(city_blocks), "Pythagoras"),
        (distance_with(lambda n: measures.patch_distances(n).square()), "squared"),
        (lambda w: weighted(w).sum(dim=(0, 2, 3)), "average over them"),
        (lambda w: weighted(w).mean(dim=(0, 2, 3)), "already sum to 1"),
        (lambda w: weighted(w).sum(dim=-1).mean(), "each head"),
        (lambda w: weighted(w).sum(dim=-1).mean(dim=0), "has shape"),
        (distance_with(lambda n: measures.patch_distances(9)), "stops with RuntimeError"),
    ],
)
def test_attention_distance(answer: Callable[[Tensor], Tensor], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.attention_distance(answer)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (lambda w: (w * w.log()).sum(dim=-1).mean(dim=(0, 2)), "negative"),
        (lambda w: -(w * w.log2()).sum(dim=-1).mean(dim=(0, 2)), "in bits"),
        (lambda w: -(w * w.log()).mean(dim=(0, 2, 3)), "sum over them"),
        (lambda w: torch.special.entr(w.mean(dim=(0, 2))).sum(dim=-1), "before the logarithm"),
        (lambda w: -(w * w.log()).sum(dim=-1).mean(dim=(0, 2)), "0 \\* log"),
        (lambda w: torch.special.entr(w).sum(dim=-1).mean(dim=(0, 1)), "has shape"),
    ],
)
def test_attention_entropy(answer: Callable[[Tensor], Tensor], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.attention_entropy(answer)


def test_a_clamp_instead_of_entr_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    checks.looking.attention_entropy(lambda w: -(w * w.clamp(min=1e-12).log()).sum(dim=-1).mean(dim=(0, 2)))
    assert capsys.readouterr().out.startswith("Right: ")


def rolled(
    step: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Callable[[Sequence[Tensor]], Tensor]:
    """A rollout with another step for each layer, or joined in another way (later, earlier)."""

    def rollout(maps: Sequence[Tensor]) -> Tensor:
        result = step(maps[0])
        for layer in maps[1:]:
            result = join(step(layer), result)
        return result

    return rollout


def half(weights: Tensor) -> Tensor:
    return 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(4)


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (rolled(half, lambda later, earlier: earlier @ later), "wrong order"),
        (rolled(lambda w: w.mean(dim=1)), "residual path"),
        (rolled(lambda w: w.mean(dim=1) + torch.eye(4)), "sum to 8"),
        (rolled(half, torch.mul), "element by element"),
        (rolled(lambda w: 0.5 * w + 0.5 * torch.eye(4)), "head axis"),
    ],
)
def test_attention_rollout(answer: Callable[[Sequence[Tensor]], Tensor], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.attention_rollout(answer)


def top(scores: Callable[[Tensor, Tensor], Tensor], largest: bool = True) -> Callable[..., Any]:
    def words(tokens: Tensor, table: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        best = scores(tokens, table).topk(k, largest=largest)
        return best.values, best.indices

    return words


def cosine(tokens: Tensor, table: Tensor) -> Tensor:
    return F.normalize(tokens, dim=1) @ F.normalize(table, dim=1).T


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (top(lambda tokens, table: tokens @ table.T), "dot product"),
        (top(torch.cdist, largest=False), "by distance"),
        (top(cosine, largest=False), "point the other way"),
        (top(lambda tokens, table: tokens @ F.normalize(table, dim=1).T), "larger than 1"),
        (lambda tokens, table, k=1: top(cosine)(tokens, table, k)[::-1], "swapped"),
        (lambda tokens, table, k=1: top(cosine)(tokens, table, k)[1], "two tensors"),
        (lambda tokens, table, k=1: top(cosine)(tokens, table, 1), "has shape"),
    ],
)
def test_nearest_words(answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        checks.looking.nearest_words(answer)
