"""Checks for the exercises of 05_gemma."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minivlm.checks import call, expect, expect_tensor, right, same
from minivlm.text.gemma import GemmaConfig


class solutions:
    """Reference solutions."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        """Gemma's convention: everything in fp32, a factor of (1 + w), one rounding at the end."""
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        return (unit * (1 + weight.float())).to(x.dtype)

    @staticmethod
    def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
        """Rows 0 1 2 3 4 5 ... of every head in the order 0 2 4 ... 1 3 5 ..."""
        pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [H, Dh / 2, 2, D]
        return pairs.transpose(1, 2).reshape(weight.shape)

    @staticmethod
    def cache_bytes(config: GemmaConfig, tokens: int, bytes_per_number: int = 2) -> int:
        """Keys and values of every layer."""
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return numbers * tokens * bytes_per_number

    @staticmethod
    def nucleus(probabilities: Tensor, p: float) -> Tensor:
        """Mark the most probable tokens that together reach p."""
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(dim=0) - ordered
        kept = torch.zeros_like(probabilities, dtype=torch.bool)
        kept[order[before < p]] = True
        return kept


def _different(a: Tensor, b: Tensor) -> float:
    """The fraction of elements that differ."""
    return (a != b).float().mean().item()


def rms_norm(answer: Callable[..., Any]) -> None:
    """fp32 first, then very small numbers to test eps, then bf16 to test where rounding happens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 64, generator=generator) * 3 + 1
    weight = torch.randn(64, generator=generator) * 0.3
    result = call(answer, x, weight)
    unit = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
    expect(
        not same(result, unit * weight),
        "you multiplied by w: in Gemma's convention the stored weight w means a factor of 1 + w",
    )
    expect(not same(result, unit), "the weight is not used: the factor is 1 + w")
    centered = torch.nn.functional.layer_norm(x, (64,), 1 + weight, None, 1e-6)
    expect(
        not same(result, centered),
        "you subtracted the mean, as LayerNorm does: RMSNorm only divides by the root of the mean square",
    )
    by_sum = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6) * (1 + weight)
    expect(not same(result, by_sum), "you took the sum of the squares: take their mean over the last axis")
    whole = x * torch.rsqrt(x.square().mean() + 1e-6) * (1 + weight)
    expect(
        not same(result, whole),
        "you took the mean over the whole tensor: every token is normalized by its own last axis",
    )
    expect_tensor(result, solutions.rms_norm(x, weight))

    small = x * 1e-4
    result = call(answer, small, weight)
    outside = small / (small.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6) * (1 + weight)
    expect(
        not same(result, outside, 1e-4),
        "eps is outside the root: add it to the mean square, under the root",
    )
    expect_tensor(result, solutions.rms_norm(small, weight), "the result for very small numbers")

    x = torch.randn(100, 256, generator=generator).bfloat16()
    weight = (torch.randn(256, generator=generator) * 0.3).bfloat16()
    result = call(answer, x, weight)
    expect(
        result.dtype == torch.bfloat16,
        f"for a bf16 input your result is {result.dtype}: cast back to the dtype of x at the end",
    )
    expected = solutions.rms_norm(x, weight)
    wide = x.float()
    early = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
    early_wide = (early.float() * (1 + weight.float())).to(x.dtype)
    rounded_early = min(_different(result, version) for version in (early * (1 + weight), early_wide)) < 0.02
    expect(
        not rounded_early,
        "in bf16 you round before the multiplication, which is Llama's order: cast to the dtype of x last",
    )
    expect(
        _different(result, expected) < 0.02,
        "right in fp32, but in bf16 too many values differ: convert x and the weight to fp32 first",
    )
    right("a factor of 1 + w, computed in fp32 and rounded once, at the end.")


def half_split_rows(answer: Callable[..., Any]) -> None:
    """Three heads, so that an order over all rows differs from one within every head."""
    heads, head_dim = 3, 8
    weight = torch.arange(heads * head_dim * 24, dtype=torch.float32).view(heads * head_dim, 24)
    result = call(answer, weight.clone(), head_dim)
    expect(not same(result, weight), "the rows are still in their old order")
    expect(
        not same(result, weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)),
        "this is the inverse, from half-split to interleaved: the new row i < Dh/2 of a head is its old "
        "row 2i",
    )
    over_all = torch.cat([weight[0::2], weight[1::2]])
    expect(
        not same(result, over_all),
        "you reordered all rows at once: every head has its own pairs, so split the rows into heads first",
    )
    columns = weight.unflatten(1, (-1, head_dim // 2, 2)).transpose(2, 3).reshape(weight.shape)
    expect(
        not same(result, columns),
        "you reordered the columns: they belong to the input, and the rows are what a head puts out",
    )
    expect_tensor(result, solutions.half_split_rows(weight, head_dim))
    right("the new rows 0, 1, 2, ... of every head are the old rows 0, 2, 4, ..., then 1, 3, 5, ...")


def cache_bytes(answer: Callable[..., Any]) -> None:
    """A configuration in which all numbers differ."""
    config = GemmaConfig(
        hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256
    )
    tokens = 1000
    result = call(answer, config, tokens)
    expect(isinstance(result, int), f"the number of bytes is an int, but yours is a {type(result).__name__}")
    expected = solutions.cache_bytes(config, tokens)
    expect(
        result * 2 != expected,
        "half of what is needed: did you count both keys and values, and 2 bytes per number?",
    )
    expect(
        result != solutions.cache_bytes(replace(config, num_key_value_heads=8), tokens),
        "you counted a key for every query head: only num_key_value_heads of them are kept",
    )
    expect(
        result * config.num_hidden_layers != expected,
        "that is one layer: every layer has its own keys and values",
    )
    expect(
        result * config.head_dim != expected * (config.hidden_size // config.num_attention_heads),
        "you took hidden_size / heads as the width of a head: in Gemma, head_dim is set separately",
    )
    expect(result * tokens != expected, "that is one token: multiply by the number of tokens")
    expect(result == expected, f"expected {expected:,} bytes, got {result:,}")
    expect(
        call(answer, config, 10, 4) == solutions.cache_bytes(config, 10, 4),
        "right for 2 bytes per number, wrong for 4: use bytes_per_number",
    )
    right("2 x layers x key/value heads x head_dim numbers for every token.")


def nucleus(answer: Callable[..., Any]) -> None:
    """Binary fractions, so that sums are exact; not sorted; one p that is reached exactly."""
    probabilities = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
    result = call(answer, probabilities.clone(), 0.8)
    expect(isinstance(result, Tensor), f"return a tensor of booleans, not a {type(result).__name__}")
    expect(
        result.dtype == torch.bool,
        f"return booleans, True for a kept token; yours are of type {result.dtype}",
    )
    expect(
        result.shape == probabilities.shape,
        f"expected one boolean per token, {list(probabilities.shape)}, got shape {list(result.shape)}",
    )
    found = result.tolist()
    expect(
        found != [True, True, True, False, False],
        "your marks are in the order of the sorted tokens: put them back in the original order",
    )
    expect(
        found != [False, True, False, True, False],
        "the kept tokens sum to 0.75, less than p = 0.8: keep the one that crosses p as well",
    )
    expect(
        found != (probabilities >= 0.8).tolist(),
        "you compared single probabilities with p: it is their running sum, starting with the best, that "
        "must reach p",
    )
    expect(
        found == [True, True, False, True, False], f"for p = 0.8 of {probabilities.tolist()} you keep {found}"
    )
    exact = call(answer, probabilities.clone(), 0.75).tolist()
    expect(
        exact == [False, True, False, True, False],
        f"two tokens reach p = 0.75 exactly, so no third is needed; you keep {sum(exact)}",
    )
    spike = call(answer, probabilities.clone(), 0.1).tolist()
    expect(
        spike == [False, True, False, False, False],
        f"for p = 0.1 the best token alone is enough, and it always stays; you keep {sum(spike)} tokens",
    )
    right("the smallest set of best tokens that reaches p, and never an empty one.")
