"""The checks of 05_gemma accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.checks import NotYet, gemma


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def half_precision(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return unit(x, eps) * (1 + weight)


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "rms_norm": [
        ("factor of 1 \\+ w", lambda x, w, eps=1e-6: unit(x.float()) * w),
        ("weight is not used", lambda x, w, eps=1e-6: unit(x)),
        (
            "subtracted the mean",
            lambda x, w, eps=1e-6: torch.nn.functional.layer_norm(x, x.shape[-1:], 1 + w, None, eps),
        ),
        (
            "sum of the squares",
            lambda x, w, eps=1e-6: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * (1 + w),
        ),
        ("whole tensor", lambda x, w, eps=1e-6: x * torch.rsqrt(x.square().mean() + eps) * (1 + w)),
        (
            "outside the root",
            lambda x, w, eps=1e-6: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * (1 + w),
        ),
        ("your result is torch.float32", lambda x, w, eps=1e-6: unit(x.float()) * (1 + w.float())),
        ("Llama's order", lambda x, w, eps=1e-6: unit(x.float()).to(x.dtype) * (1 + w)),
        (
            "Llama's order",
            lambda x, w, eps=1e-6: (unit(x.float()).to(x.dtype).float() * (1 + w.float())).to(x.dtype),
        ),
        ("too many values differ", half_precision),
        ("has shape", lambda x, w, eps=1e-6: unit(x)[0]),
        ("should be a tensor", lambda x, w, eps=1e-6: 1.0),
    ],
    "half_split_rows": [
        ("old order", lambda w, d: w),
        ("the inverse", lambda w, d: w.unflatten(0, (-1, 2, d // 2)).transpose(1, 2).reshape(w.shape)),
        ("all rows at once", lambda w, d: torch.cat([w[0::2], w[1::2]])),
        (
            "the columns",
            lambda w, d: w.unflatten(1, (-1, d // 2, 2)).transpose(2, 3).reshape(w.shape),
        ),
        ("has shape", lambda w, d: w.unflatten(0, (-1, d // 2, 2)).transpose(1, 2)),
    ],
    "cache_bytes": [
        (
            "keys and values",
            lambda c, n, b=2: c.num_hidden_layers * c.num_key_value_heads * c.head_dim * n * b,
        ),
        (
            "every query head",
            lambda c, n, b=2: 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * n * b,
        ),
        ("one layer", lambda c, n, b=2: 2 * c.num_key_value_heads * c.head_dim * n * b),
        (
            "set separately",
            lambda c, n, b=2: (
                2
                * c.num_hidden_layers
                * c.num_key_value_heads
                * (c.hidden_size // c.num_attention_heads)
                * n
                * b
            ),
        ),
        ("one token", lambda c, n, b=2: gemma.solutions.cache_bytes(c, 1, b)),
        ("use bytes_per_number", lambda c, n, b=2: gemma.solutions.cache_bytes(c, n)),
        ("is an int", lambda c, n, b=2: float(gemma.solutions.cache_bytes(c, n, b))),
        ("expected", lambda c, n, b=2: c.num_hidden_layers * n),
    ],
    "nucleus": [
        ("crosses p", lambda q, p: scattered(q, lambda o: o.cumsum(0) <= p)),
        ("order of the sorted", lambda q, p: (o := q.sort(descending=True).values).cumsum(0) - o < p),
        ("single probabilities", lambda q, p: q >= p),
        ("reach p = 0.75 exactly", lambda q, p: scattered(q, lambda o: o.cumsum(0) - o <= p)),
        ("return booleans", lambda q, p: gemma.solutions.nucleus(q, p).float()),
        ("a tensor of booleans", lambda q, p: gemma.solutions.nucleus(q, p).tolist()),
        ("one boolean per token", lambda q, p: gemma.solutions.nucleus(q, p)[:2]),
        ("the best token alone", lambda q, p: gemma.solutions.nucleus(q, max(p, 0.6))),
    ],
}


def scattered(probabilities: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Marks by rank, put back in the order of the vocabulary."""
    ordered, order = probabilities.sort(descending=True)
    kept = torch.zeros_like(probabilities, dtype=torch.bool)
    kept[order[choose(ordered)]] = True
    return kept


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, wrong in WRONG.items() for hint, answer in wrong],
    ids=[f"{name}-{hint}" for name, wrong in WRONG.items() for hint, _ in wrong],
)
def test_names_the_mistake(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(gemma, name)(answer)
