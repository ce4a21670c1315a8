"""Checks for 03_attention: heads, a mask, a norm, the block, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlm.attention import Attention, attend_plain
from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.layers import MLP

Layer = Callable[[Tensor], Tensor]


class solutions:
    """The reference solutions, which the notebook's catch-up cells use."""

    @staticmethod
    def multi_head(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """q, k, v [B, N, D] -> [B, N, D], all heads at once."""
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    @staticmethod
    def window_mask(grid: int, radius: int) -> Tensor:
        """Patches of a grid x grid picture see those at most `radius` rows and columns away: [N, N]."""
        number = torch.arange(grid * grid)
        row, column = number // grid, number % grid
        near_rows = (row[:, None] - row[None, :]).abs() <= radius
        near_columns = (column[:, None] - column[None, :]).abs() <= radius
        return near_rows & near_columns

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [..., D] -> [..., D]: each token is normalized by its own mean and variance."""
        mean = x.mean(dim=-1, keepdim=True)
        variance = (x - mean).square().mean(dim=-1, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    @staticmethod
    def encoder_block(x: Tensor, norm1: Layer, attention: Layer, norm2: Layer, mlp: Layer) -> Tensor:
        """Pre-norm: both parts read a normalized copy, and x itself passes through unchanged."""
        x = x + attention(norm1(x))
        return x + mlp(norm2(x))

    @staticmethod
    def block_operations(num_tokens: int, hidden_size: int, intermediate_size: int) -> int:
        """Multiplications and additions of one encoder block for one picture."""
        projections = 4 * num_tokens * hidden_size**2
        scores_and_sum = 2 * num_tokens**2 * hidden_size
        mlp = 2 * num_tokens * hidden_size * intermediate_size
        return 2 * (projections + scores_and_sum + mlp)


def multi_head(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 1: all heads at once."""
    q, k, v = torch.randn(3, 2, 5, 12, generator=_seeded()).unbind()
    result = call(answer, q, k, v, 3)

    def attended(split: Callable[[Tensor], Tensor], scale: float = 4**-0.5) -> Tensor:
        return attend_plain(split(q), split(k), split(v), None, scale)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, 4)).transpose(1, 2)

    def merged(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)

    expect(
        not same(result, merged(attended(heads, scale=12**-0.5))),
        "the scores are divided by the square root of D, the width of the model: each dot product has only "
        "Dh = D / num_heads terms",
    )
    expect(
        not same(result, merged(attended(heads, scale=1.0))),
        "the scores are not divided by the square root of the head width",
    )
    expect(
        not same(result, attended(heads).reshape(2, 5, 12)),
        "the heads are right, but merged without swapping back: move the head axis after the token axis "
        "before you flatten",
    )
    as_viewed = attended(lambda x: x.reshape(2, 3, 5, 4))
    expect(
        not any(same(result, wrong) for wrong in (as_viewed.reshape(2, 5, 12), merged(as_viewed))),
        "a plain reshape to [B, H, N, Dh] cuts across tokens, so that a head gets pieces of several: split "
        "the last axis into [H, Dh] first, then swap the token and head axes",
    )
    as_strided = attended(lambda x: x.unflatten(-1, (4, 3)).permute(0, 3, 1, 2))
    expect(
        not any(same(result, out) for out in (merged(as_strided), as_strided.permute(0, 2, 3, 1).flatten(2))),
        "each head takes every third number: head h should take the slice h * Dh : (h + 1) * Dh",
    )
    expect(
        not same(result, attended(lambda x: x[:, None], scale=12**-0.5)[:, 0]),
        "this is one head of the full width: `num_heads` is not used",
    )
    expect_tensor(result, solutions.multi_head(q, k, v, 3))
    expect_tensor(call(answer, q, k, v, 1), solutions.multi_head(q, k, v, 1), "the result with one head")
    right("all heads at once equal a loop over heads: two reshapes and a swap of axes replace the loop.")


def window_mask(answer: Callable[[int, int], Tensor]) -> None:
    """Exercise 2: a mask on the grid."""
    grid, radius = 5, 1
    result = call(answer, grid, radius)
    expected = solutions.window_mask(grid, radius)
    expect(isinstance(result, Tensor), f"the mask should be a tensor, but it is a {type(result).__name__}")
    expect(
        result.dtype == torch.bool,
        f"the mask should be boolean, but it is {result.dtype}: a mask of numbers would be added to the "
        "scores",
    )
    expect(
        tuple(result.shape) == tuple(expected.shape),
        f"the mask has shape {list(result.shape)}, expected [N, N] = {list(expected.shape)}: one row for "
        "each patch that looks, one column for each patch it may see",
    )
    number = torch.arange(grid * grid)
    rows = (number[:, None] // grid - number // grid).abs()
    columns = (number[:, None] % grid - number % grid).abs()
    for wrong, hint in (
        (~expected, "the mask is inverted: True means that a patch may look"),
        (
            (number[:, None] - number).abs() <= radius,
            "these are neighbors in the sequence: the patch below is `grid` positions away, and the end of "
            "a row is not next to the start of the next. Compare rows and columns",
        ),
        (
            (rows < radius) & (columns < radius),
            "a patch that is exactly `radius` away is left out: use <= instead of <",
        ),
        (
            (rows <= radius) | (columns <= radius),
            "this is a cross as wide as the picture: both the row *and* the column have to be near",
        ),
        (
            rows + columns <= radius,
            "the diagonal neighbors are missing: limit rows and columns separately, not their sum",
        ),
        (rows <= radius, "the columns are not compared: these are whole rows of the picture"),
        (columns <= radius, "the rows are not compared: these are whole columns of the picture"),
    ):
        expect(not torch.equal(result, wrong), hint)
    expect_tensor(result, expected, "the mask")
    expect_tensor(call(answer, 4, 2), solutions.window_mask(4, 2), "the mask of a 4 x 4 grid with radius 2")
    right("a patch in the middle sees 9 patches, a corner 4, and the mask is symmetric.")


def layer_norm(answer: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 3: LayerNorm."""
    # Small numbers and a large eps, so that it matters where eps is.
    x = 0.3 * torch.randn(2, 3, 4, 6, generator=_seeded()) + 1.0
    weight, bias = torch.randn(2, 6, generator=_seeded(1)).unbind()
    eps = 0.05
    result = call(answer, x, weight, bias, eps)

    def scaled(unit: Tensor) -> Tensor:
        return unit * weight + bias

    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    for wrong, hint in (
        (
            scaled(centered / (x.var(dim=-1, keepdim=True) + eps).sqrt()),
            "the variance divides by D - 1, the default of `var`: LayerNorm divides by D "
            "(`correction=0`, or the mean of the squares)",
        ),
        (scaled(centered / (variance.sqrt() + eps)), "is your eps inside the square root? It belongs there"),
        (
            scaled(centered / (x.std(dim=-1, keepdim=True) + eps)),
            "is your eps inside the square root? It belongs there; and `std` divides by D - 1, not by D",
        ),
        (
            scaled(centered / (variance + eps)),
            "divide by the square root of the variance, not by the variance",
        ),
        (scaled(centered / variance.sqrt()), "eps is missing"),
        (
            scaled(x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()),
            "the mean is not subtracted: this is RMSNorm, which comes in a later notebook",
        ),
        (centered / (variance + eps).sqrt(), "weight and bias are missing"),
    ):
        expect(not same(result, wrong), hint)
    for dims in ((0,), (0, 1), (0, 1, 2), (1,), (2,), (1, 2), (0, 1, 2, 3), (1, 2, 3), (2, 3)):
        mean = x.mean(dim=dims, keepdim=True)
        wrong = scaled((x - mean) / (x.var(dim=dims, keepdim=True, correction=0) + eps).sqrt())
        expect(
            not same(result, wrong),
            "mean and variance are taken across tokens or pictures: LayerNorm uses only the last axis",
        )
    expect_tensor(result, solutions.layer_norm(x, weight, bias, eps))
    right("equal to nn.LayerNorm: each token is normalized by itself, whatever else is in the batch.")


def encoder_block(answer: Callable[[Tensor, Layer, Layer, Layer, Layer], Tensor]) -> None:
    """Exercise 4: the pre-norm block."""
    x, norm1, attention, norm2, mlp = _block_parts()
    result = call(answer, x, norm1, attention, norm2, mlp)
    between = x + attention(norm1(x))
    normalized = norm1(x)
    from_normalized = normalized + attention(normalized)
    after = norm1(x + attention(x))
    for wrong, hint in (
        (
            norm2(after + mlp(after)),
            "this is post-norm, as in the Transformer of 2017: here each norm comes before its part",
        ),
        (
            norm2(from_normalized) + mlp(norm2(from_normalized)),
            "the residual starts from the normalized x: add to the x that came in",
        ),
        (
            from_normalized + mlp(norm2(from_normalized)),
            "the first residual starts from the normalized x: add to the x that came in",
        ),
        (
            norm2(between) + mlp(norm2(between)),
            "the second residual starts from the normalized x: add to the output of the first half",
        ),
        (mlp(norm2(attention(norm1(x)))), "both residuals are missing: each part's output is added to x"),
        (mlp(norm2(between)), "the second residual is missing: the MLP's output is added to its input"),
        (between, "the MLP is missing, or its result is not used"),
        (between + mlp(between), "the MLP reads x without a norm: norm2 is missing"),
        (
            x + attention(x) + mlp(norm2(x + attention(x))),
            "attention reads x without a norm: norm1 is missing",
        ),
        (between + mlp(norm1(between)), "norm1 is used twice: the second half has its own norm"),
        (
            between + mlp(norm2(x)),
            "both parts read the same x: the MLP should read x after attention has been added",
        ),
        (x + mlp(norm2(between)), "the MLP's output is added to the original x, and attention's is lost"),
    ):
        expect(not same(result, wrong), hint)
    expect_tensor(result, solutions.encoder_block(x, norm1, attention, norm2, mlp))
    right("two lines, and x itself is only ever added to.")


def block_operations(answer: Callable[[int, int, int], int]) -> None:
    """Exercise 5: what a block costs."""
    tokens, width, inner = 11, 6, 26
    result = call(answer, tokens, width, inner)
    try:
        result = float(result)
    except (TypeError, ValueError) as error:
        raise NotYet(f"the result should be a number, but it is a {type(result).__name__}") from error
    projections, products, mlp = tokens * width**2, tokens**2 * width, tokens * width * inner
    expected = solutions.block_operations(tokens, width, inner)
    for wrong, hint in (
        (
            expected / 2,
            "only the multiplications are counted: each one is followed by an addition, so multiply by 2",
        ),
        (
            2 * (3 * projections + 2 * products + 2 * mlp),
            "three projections of attention are counted, and there are four: queries, keys, values, output",
        ),
        (
            2 * (4 * projections + products + 2 * mlp),
            "one product of N x N is counted, and there are two: the scores and the weighted sum of values",
        ),
        (
            2 * (4 * projections + 2 * products + mlp),
            "one layer of the MLP is counted, and there are two",
        ),
        (
            2 * (4 * projections + 2 * mlp),
            "the scores and the weighted sum are missing: they are what grows with the square of N",
        ),
        (2 * (4 * projections + 2 * products), "the MLP is missing"),
        (2 * (2 * products + 2 * mlp), "the four projections of attention are missing"),
        (
            2 * (4 * projections + 2 * products + 8 * projections),
            "the MLP is counted with an inner width of 4 D: use intermediate_size, which may differ",
        ),
    ):
        expect(abs(result - wrong) > 0.5, hint)
    expect(abs(result - expected) < 0.5, f"for N = 11, D = 6, M = 26 you count {result:.0f}, not {expected}")
    larger = solutions.block_operations(576, 768, 3072)
    expect(
        abs(float(call(answer, 576, 768, 3072)) - larger) < 0.5,
        "right for one size only: is there a constant where N, D or M should be?",
    )
    right("projections and MLP grow with N, scores and weighted sum with the square of N.")


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _block_parts() -> tuple[Tensor, Layer, Layer, Layer, Layer]:
    """x and the four parts of a block, with weights large enough that every mistake shows."""
    generator = _seeded()
    norm1, norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
    attention, mlp = Attention(8, num_attention_heads=2, bias=True), MLP(8, 16)
    for module in (norm1, norm2, attention, mlp):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator).requires_grad_(False)
    return 3 * torch.randn(2, 5, 8, generator=generator) + 1, norm1, attention, norm2, mlp
