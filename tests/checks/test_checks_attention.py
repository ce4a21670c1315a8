"""The checks of 03_attention accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.checks import NotYet, attention

Answer = Callable[..., Any]


def heads_of(
    split: Answer,
    merge: Answer,
    scale: Callable[[int, int], float] = lambda width, head_width: head_width**-0.5,
) -> Answer:
    """Multi-head attention with its three places for mistakes: splitting, scaling, merging."""

    def answer(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        width = q.shape[-1]
        q, k, v = (split(x, num_heads) for x in (q, k, v))
        weights = (q @ k.mT * scale(width, q.shape[-1])).softmax(dim=-1)
        return merge(weights @ v)

    return answer


def cut(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def put_together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def view(x: Tensor, num_heads: int) -> Tensor:
    return x.reshape(x.shape[0], num_heads, x.shape[1], -1)


def view_back(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[2], -1)


def every_third(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2)


HEADS: list[tuple[Answer, str]] = [
    (heads_of(cut, put_together, lambda width, head_width: width**-0.5), "width of the model"),
    (heads_of(cut, put_together, lambda width, head_width: 1.0), "not divided"),
    (heads_of(cut, put_together, lambda width, head_width: 1 / head_width), "right shape, but is off"),
    (heads_of(cut, view_back), "without swapping back"),
    (heads_of(view, view_back), "cuts across tokens"),
    (heads_of(view, put_together), "cuts across tokens"),
    (heads_of(every_third, put_together), "every third"),
    (heads_of(every_third, lambda x: x.permute(0, 2, 3, 1).flatten(2)), "every third"),
    (heads_of(lambda x, _: x, lambda x: x), "num_heads"),
    (heads_of(cut, lambda x: x), "shape"),
]


@pytest.mark.parametrize(("answer", "hint"), HEADS)
def test_heads(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.multi_head(answer)


def rows_and_columns(grid: int) -> tuple[Tensor, Tensor]:
    """How far apart two patches are, in rows and in columns: [N, N] each."""
    number = torch.arange(grid * grid)
    return (number[:, None] // grid - number // grid).abs(), (number[:, None] % grid - number % grid).abs()


def windowed(combine: Callable[[Tensor, Tensor, int], Tensor]) -> Answer:
    return lambda grid, radius: combine(*rows_and_columns(grid), radius)


def in_the_sequence(grid: int, radius: int) -> Tensor:
    number = torch.arange(grid * grid)
    return (number[:, None] - number).abs() <= radius


WINDOWS: list[tuple[Answer, str]] = [
    (windowed(lambda row, column, r: (row > r) | (column > r)), "inverted"),
    (in_the_sequence, "neighbors in the sequence"),
    (windowed(lambda row, column, r: (row < r) & (column < r)), "<="),
    (windowed(lambda row, column, r: (row <= r) | (column <= r)), "cross"),
    (windowed(lambda row, column, r: row + column <= r), "diagonal"),
    (windowed(lambda row, column, r: row <= r), "whole rows"),
    (windowed(lambda row, column, r: column <= r), "whole columns"),
    (windowed(lambda row, column, r: ((row <= r) & (column <= r)).float()), "boolean"),
    (lambda grid, radius: torch.ones(grid, grid, dtype=torch.bool), "shape"),
    (lambda grid, radius: attention.solutions.window_mask(grid, 1), "4 x 4"),
    (lambda grid, radius: [[True]], "tensor"),
]


@pytest.mark.parametrize(("answer", "hint"), WINDOWS)
def test_windows(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.window_mask(answer)


def norm_over(dims: tuple[int, ...]) -> Answer:
    def answer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, variance = x.mean(dim=dims, keepdim=True), x.var(dim=dims, keepdim=True, correction=0)
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    return answer


def norm_with(divide: Callable[[Tensor, Tensor, float], Tensor]) -> Answer:
    def answer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return divide(x, x - x.mean(dim=-1, keepdim=True), eps) * weight + bias

    return answer


def variance(centered: Tensor) -> Tensor:
    return centered.square().mean(dim=-1, keepdim=True)


NORMS: list[tuple[Answer, str]] = [
    (norm_with(lambda x, c, eps: c / (x.var(dim=-1, keepdim=True) + eps).sqrt()), "D - 1"),
    (norm_with(lambda x, c, eps: c / (variance(c).sqrt() + eps)), "inside the square root"),
    (norm_with(lambda x, c, eps: c / (x.std(dim=-1, keepdim=True) + eps)), "inside the square root"),
    (norm_with(lambda x, c, eps: c / (variance(c) + eps)), "not by the variance"),
    (norm_with(lambda x, c, eps: c / variance(c).sqrt()), "eps is missing"),
    (norm_with(lambda x, c, eps: x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()), "RMSNorm"),
    (lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], eps=eps), "weight and bias"),
    (norm_over((0,)), "only the last axis"),
    (norm_over((0, 1, 2)), "only the last axis"),
    (norm_over((-2,)), "only the last axis"),
    (norm_over((-2, -1)), "only the last axis"),
    (lambda x, weight, bias, eps: x.view(-1, 7), "RuntimeError"),
]


@pytest.mark.parametrize(("answer", "hint"), NORMS)
def test_norms(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.layer_norm(answer)


def post_norm(x: Tensor, norm1: Answer, attend: Answer, norm2: Answer, mlp: Answer) -> Tensor:
    x = norm1(x + attend(x))
    return norm2(x + mlp(x))


def both_normalized(x: Tensor, norm1: Answer, attend: Answer, norm2: Answer, mlp: Answer) -> Tensor:
    x = norm1(x)
    x = norm2(x + attend(x))
    return x + mlp(x)


def first_normalized(x: Tensor, norm1: Answer, attend: Answer, norm2: Answer, mlp: Answer) -> Tensor:
    x = norm1(x)
    x = x + attend(x)
    return x + mlp(norm2(x))


def second_normalized(x: Tensor, norm1: Answer, attend: Answer, norm2: Answer, mlp: Answer) -> Tensor:
    x = norm2(x + attend(norm1(x)))
    return x + mlp(x)


def block_with(second: Answer) -> Answer:
    """A right first half, and `second` makes the result from it."""

    def answer(x: Tensor, norm1: Answer, attend: Answer, norm2: Answer, mlp: Answer) -> Tensor:
        return second(x, x + attend(norm1(x)), norm1, norm2, mlp)

    return answer


BLOCKS: list[tuple[Answer, str]] = [
    (post_norm, "post-norm"),
    (both_normalized, "the residual starts from the normalized"),
    (first_normalized, "first residual starts from the normalized"),
    (second_normalized, "second residual starts from the normalized"),
    (lambda x, norm1, attend, norm2, mlp: mlp(norm2(attend(norm1(x)))), "both residuals"),
    (lambda x, norm1, attend, norm2, mlp: x + attend(x) + mlp(norm2(x + attend(x))), "norm1 is missing"),
    (block_with(lambda x, y, norm1, norm2, mlp: mlp(norm2(y))), "second residual is missing"),
    (block_with(lambda x, y, norm1, norm2, mlp: y), "MLP is missing"),
    (block_with(lambda x, y, norm1, norm2, mlp: y + mlp(y)), "norm2 is missing"),
    (block_with(lambda x, y, norm1, norm2, mlp: y + mlp(norm1(y))), "norm1 is used twice"),
    (block_with(lambda x, y, norm1, norm2, mlp: y + mlp(norm2(x))), "same x"),
    (block_with(lambda x, y, norm1, norm2, mlp: x + mlp(norm2(y))), "attention's is lost"),
    (block_with(lambda x, y, norm1, norm2, mlp: y + 2 * mlp(norm2(y))), "right shape, but is off"),
]


@pytest.mark.parametrize(("answer", "hint"), BLOCKS)
def test_blocks(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.encoder_block(answer)


COSTS: list[tuple[Answer, str]] = [
    (lambda n, d, m: 4 * n * d * d + 2 * n * n * d + 2 * n * d * m, "only the multiplications"),
    (lambda n, d, m: 6 * n * d * d + 4 * n * n * d + 4 * n * d * m, "three projections"),
    (lambda n, d, m: 8 * n * d * d + 2 * n * n * d + 4 * n * d * m, "one product of N x N"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d + 2 * n * d * m, "one layer of the MLP"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * d * m, "square of N"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d, "MLP is missing"),
    (lambda n, d, m: 4 * n * n * d + 4 * n * d * m, "four projections"),
    (lambda n, d, m: 24 * n * d * d + 4 * n * n * d, "intermediate_size"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n + 4 * n * d * m, "you count"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d + 104 * n * d, "one size only"),
    (lambda n, d, m: "a lot", "should be a number"),
]


@pytest.mark.parametrize(("answer", "hint"), COSTS)
def test_costs(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.block_operations(answer)
