"""The checks of 03_attention accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import load
from minivlm.attention import Attention
from minivlm.checks import NotYet, attention
from minivlm.vision.pooling import AttentionPoolingHead

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


def heads_with(attend: Answer) -> Answer:
    """Heads cut and put together as they should be, and `attend` between."""

    def answer(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        out: Tensor = attend(*(cut(x, num_heads) for x in (q, k, v)))
        return put_together(out)

    return answer


def in_a_loop(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    results = []
    for q_h, k_h, v_h in zip(*(x.chunk(num_heads, dim=-1) for x in (q, k, v)), strict=True):
        results.append((q_h @ k_h.mT / q_h.shape[-1] ** 0.5).softmax(dim=-1) @ v_h)
    return torch.cat(results, dim=-1)


HEADS: list[tuple[Answer, str]] = [
    (heads_of(cut, put_together, lambda width, head_width: width**-0.5), "width of the model"),
    (heads_of(cut, put_together, lambda width, head_width: 1.0), "not divided"),
    (heads_of(cut, put_together, lambda width, head_width: 1 / head_width), "divide by its square root"),
    (heads_of(cut, put_together, lambda width, head_width: head_width**0.5), "multiplied by"),
    (heads_of(cut, put_together, lambda width, head_width: (head_width / width) ** 0.5), "number of heads"),
    (heads_of(cut, view_back), "without swapping back"),
    (heads_of(view, view_back), "cuts across tokens"),
    (heads_of(view, put_together), "cuts across tokens"),
    (heads_of(every_third, put_together), "every third"),
    (heads_of(every_third, lambda x: x.permute(0, 2, 3, 1).flatten(2)), "every third"),
    (heads_of(lambda x, _: x, lambda x: x), "num_heads"),
    (heads_of(cut, lambda x: x), "shape"),
    (heads_of(lambda x, heads: x.unflatten(-1, (heads, -1)), lambda x: x.flatten(2)), "of one token attend"),
    (heads_with(lambda q, k, v: (q @ k.mT / 2).softmax(dim=-2) @ v), "wrong axis"),
    (heads_with(lambda q, k, v: (q @ k.mT / 2).softmax(dim=1) @ v), "wrong axis"),
    (heads_with(lambda q, k, v: q @ k.mT / 2 @ v), "softmax is missing"),
    (heads_with(F.scaled_dot_product_attention), "PyTorch's own attention"),
    (in_a_loop, "with a loop"),
]


@pytest.mark.parametrize(("answer", "hint"), HEADS)
def test_heads(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.multi_head(answer)


def with_einsum(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], num_heads, -1) for x in (q, k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def in_place(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    q *= (q.shape[-1] // num_heads) ** -0.5
    return put_together((cut(q, num_heads) @ cut(k, num_heads).mT).softmax(dim=-1) @ cut(v, num_heads))


@pytest.mark.parametrize("right", [with_einsum, in_place, attention.solutions.multi_head])
def test_other_ways_to_all_heads(right: Answer) -> None:
    attention.multi_head(right)


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


def test_reach_is_what_is_measured() -> None:
    attention.reach(attention.solutions.reach)


def but(**changes: Any) -> Answer:
    names = {
        "norm": "LayerNorm",
        "batch": "BatchNorm, in training",
        "mlp": "MLP",
        "all": "attention",
        "causal": "attention, causal",
        "window": "attention, window",
        "twice": "two attentions, window",
    }
    return lambda: attention.solutions.reach() | {names[name]: moved for name, moved in changes.items()}


REACHES: list[tuple[Answer, str]] = [
    (but(norm=16), "features of each token"),
    (but(batch=1), "That is LayerNorm"),
    (but(batch=8), "over all 16 tokens"),
    (but(mlp=16), "to each token alone"),
    (but(all=1), "its key and its value"),
    (but(all=15), "Token 8 itself"),
    (but(causal=9), "who sees token 8"),
    (but(causal=7), "a token sees itself"),
    (but(causal=16), "hides token 8"),
    (but(window=9), "left edge"),
    (but(window=3), "Rows count"),
    (but(twice=6), "neighbor of a neighbor"),
    (but(twice=16), "column 3 is three away"),
    (but(twice=36), "cut off the rest"),
    (but(norm=16, mlp=16, window=4), "3 of 7 differ"),
    (but(mlp="one"), "you say one, measured 1"),
    (lambda: {"MLP": 1}, "no prediction for LayerNorm"),
    (lambda: 16, "return a dict"),
]


@pytest.mark.parametrize(("answer", "hint"), REACHES)
def test_reaches(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.reach(answer)


def looks(
    asks: Tensor, tokens: Tensor, a: Any, scale: float | None = None, heads: int | None = None
) -> Tensor:
    q, k, v = a.q_proj(asks), a.k_proj(tokens), a.v_proj(tokens)
    return _attended(q.expand(len(tokens), -1, -1), k, v, heads or 2, scale)


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None) -> Tensor:
    q, k, v = (cut(x, heads) for x in (q, k, v))
    return put_together(F.scaled_dot_product_attention(q, k, v, scale=scale))


def pooled_by(look: Answer) -> Answer:
    """A right second half after `look`."""

    def answer(tokens: Tensor, probe: Tensor, a: Any, norm: Answer, mlp: Answer) -> Any:
        x = look(tokens, probe, a)
        return (x + mlp(norm(x)))[:, 0]

    return answer


def then(rest: Answer) -> Answer:
    """A right first half, and `rest` after it."""

    def answer(tokens: Tensor, probe: Tensor, a: Any, norm: Answer, mlp: Answer) -> Any:
        return rest(a.o_proj(looks(probe, tokens, a)), probe, norm, mlp)

    return answer


def beside_the_tokens(tokens: Tensor, probe: Tensor, a: Any) -> Tensor:
    out: Tensor = a(torch.cat([probe.expand(len(tokens), 1, -1), tokens], dim=1))
    return out[:, :1]


def normalized_first(tokens: Tensor, probe: Tensor, a: Any, norm: Answer, mlp: Answer) -> Any:
    return attention.solutions.pooling_head(norm(tokens), probe, a, norm, mlp)


def unprojected(tokens: Tensor, probe: Tensor, a: Any) -> Any:
    q = probe.expand(len(tokens), 1, -1)
    return a.o_proj(_attended(q, a.k_proj(tokens), a.v_proj(tokens), 2, None))


POOLS: list[tuple[Answer, str]] = [
    (pooled_by(lambda x, probe, a: probe + a.o_proj(looks(probe, x, a))), "starts \\*after\\* attention"),
    (then(lambda x, probe, norm, mlp: x[:, 0]), "MLP is missing"),
    (then(lambda x, probe, norm, mlp: mlp(norm(x))[:, 0]), "residual around the MLP"),
    (then(lambda x, probe, norm, mlp: (x + mlp(x))[:, 0]), "without a norm"),
    (then(lambda x, probe, norm, mlp: (norm(x) + mlp(norm(x)))[:, 0]), "starts from the normalized"),
    (then(lambda x, probe, norm, mlp: norm(x + mlp(x))[:, 0]), "post-norm"),
    (then(lambda x, probe, norm, mlp: x + mlp(norm(x))), "take its one token"),
    (pooled_by(lambda x, probe, a: a.o_proj(looks(x, probe.expand(2, 1, 8), a)).mean(1, True)), "exchanged"),
    (pooled_by(lambda x, probe, a: a(x).mean(dim=1, keepdim=True)), "the probe has no part"),
    (pooled_by(beside_the_tokens), "class token"),
    (normalized_first, "normalized twice"),
    (pooled_by(lambda x, probe, a: a.o_proj(looks(probe, x, a, scale=8**-0.5))), "the width's"),
    (pooled_by(lambda x, probe, a: a.o_proj(looks(probe, x, a, scale=1.0))), "not divided"),
    (pooled_by(lambda x, probe, a: a.o_proj(looks(probe, x, a, heads=1))), "one head"),
    (pooled_by(lambda x, probe, a: looks(probe, x, a)), "o_proj is missing"),
    (pooled_by(unprojected), "through q_proj"),
    (pooled_by(lambda x, probe, a: a.o_proj(a.v_proj(x).mean(1, keepdim=True))), "same weight"),
    (lambda tokens, probe, a, norm, mlp: a(tokens), "shape"),
    (pooled_by(lambda x, probe, a: a.o_proj(looks(probe, x, a))), "did the work"),
]


@pytest.mark.parametrize(("answer", "hint"), POOLS)
def test_pools(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.pooling_head(answer)


def test_the_pooling_head_is_the_package_s() -> None:
    head = AttentionPoolingHead(8, 16, 2)
    ours = Attention(8, 2, bias=True)
    parts = zip(head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3), strict=True)
    for projection, (weight, bias) in zip((ours.q_proj, ours.k_proj, ours.v_proj), parts, strict=True):
        projection.weight, projection.bias = nn.Parameter(weight), nn.Parameter(bias)
    ours.o_proj = head.attention.out_proj
    tokens = torch.randn(2, 5, 8)
    pooled = attention.solutions.pooling_head(tokens, head.probe, ours, head.layernorm, head.mlp)
    assert torch.allclose(pooled, head(tokens), atol=1e-5)


def test_the_patient_is_healthy_but_for_one_block() -> None:
    tower = load()[0].vision_tower
    pixel_values = torch.rand(1, 3, tower.config.image_size, tower.config.image_size)
    patient = attention.patient(tower)
    assert attention.solutions.find_the_bug(patient, tower, pixel_values) == (2, "scaled by width")
    assert {type(layer).__name__ for layer in patient.layers} == {"EncoderBlock"}
    right = list(tower.hidden_states(pixel_values))
    for number in (1, 3):
        ours = patient.layers[number - 1](right[number - 1])
        assert torch.allclose(ours, right[number], atol=1e-3)
    attention.find_the_bug(attention.solutions.find_the_bug)


BUGS: list[tuple[Any, str]] = [
    ((1, "scaled by width"), "if block 1 were broken"),
    ((1, "causal"), "number 0 is the patch embeddings"),
    ((3, "scaled by width"), "only passes on"),
    ((3, "post-norm"), "first\\* difference"),
    ((0, "scaled by width"), "counted from 1"),
    ((4, "scaled by width"), "there is no block 4"),
    ((2, "causal"), "pushing the last patch"),
    ((2, "post-norm"), "no norm cut it"),
    ((2, "normalized residual"), "take the cosine"),
    ((2, "right"), "should be one of"),
    ((2, "softmax"), "should be one of"),
    (("scaled by width", 2), "first thing is the number"),
    ("scaled by width", "two things"),
    (2, "two things"),
]


@pytest.mark.parametrize(("answer", "hint"), [(lambda *_, f=found: f, hint) for found, hint in BUGS])
def test_bugs(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.find_the_bug(answer)


COSTS: list[tuple[Answer, str]] = [
    (lambda n, d, m: 4 * n * d * d + 2 * n * n * d + 2 * n * d * m, "only the multiplications"),
    (lambda n, d, m: 6 * n * d * d + 4 * n * n * d + 4 * n * d * m, "three projections"),
    (lambda n, d, m: 8 * n * d * d + 2 * n * n * d + 4 * n * d * m, "one product of N x N"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d + 2 * n * d * m, "one layer of the MLP"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * d * m, "square of N"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d, "MLP is missing"),
    (lambda n, d, m: 4 * n * n * d + 4 * n * d * m, "four projections"),
    (lambda n, d, m: 24 * n * d * d + 4 * n * n * d, "intermediate_size"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n + 4 * n * d * m, "is a dot product"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d + 4 * n * m * m, "M x M"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d + 4 * n * d * m + n, "you count"),
    (lambda n, d, m: 8 * n * d * d + 4 * n * n * d + 104 * n * d, "one size only"),
    (lambda n, d, m: "a lot", "should be a number"),
]


@pytest.mark.parametrize(("answer", "hint"), COSTS)
def test_costs(answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        attention.block_operations(answer)
