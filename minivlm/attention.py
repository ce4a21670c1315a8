"""Attention: where queries meet keys.

All attention goes through `attend`. It has a plain form that is easy to read, the same in blocks for long
rows, and a fused form (`scaled_dot_product_attention`); tests show that they are equal. The mask is always
explicit: a boolean tensor, True = may look, or None if everything may.

Shape comments in the whole package use one legend: B batch, N image tokens, T text tokens (or queries),
S all tokens (or keys), D width, H heads, K key/value heads, Dh head width, P patch side, C channels,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORES_PER_BLOCK = 2**21  # held at a time by `attend_in_blocks`: 8 MiB in fp32


_recorded: ContextVar[list[Tensor] | None] = ContextVar("recorded", default=None)


@contextmanager
def record_attention() -> Iterator[list[Tensor]]:
    """Collect the attention maps of everything that runs inside, in the order of computation.

    >>> with record_attention() as maps:
    ...     model(pixel_values)
    >>> maps[0].shape  # first layer: [B, H, T, S], each row sums to 1
    """
    maps: list[Tensor] = []
    token = _recorded.set(maps)
    try:
        yield maps
    finally:
        _recorded.reset(token)


@cache
def onednn_has_bf16() -> bool:
    """Whether PyTorch hands bf16 products to oneDNN on this machine, which then is fast at them."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of bf16 (Intel's AMX), which the fused kernel then uses.

    Where PyTorch is told to do without AVX-512 (ATEN_CPU_CAPABILITY), it cannot arrange tiles for it.
    """
    return torch.cpu._is_amx_tile_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T * scale) v, with grouped queries.

    Args:
        q: [B, H, T, Dh].
        k, v: [B, K, S, Dh]; each of the K heads serves H / K query heads.
        mask: broadcastable to [B, 1, T, S], boolean (True = may look) or in its `additive` form, which
            saves time if many layers share one mask. Every query must see at least one key.
        scale: usually Dh ** -0.5.
        softcap: limit the scores smoothly to +-softcap (Gemma 2), before the mask.

    Returns:
        [B, H, T, Dh].
    """
    maps = _recorded.get()
    if maps is not None:
        weights = attention_weights(q, k, mask, scale, softcap)
        maps.append(weights.detach())
        return weighted_sum(weights, v)
    # The form is chosen here and nowhere else, based on measurements (bench/attention.py): on a CPU, the
    # plain form is faster with gradients, and without AMX in bf16 with many queries.
    on_cpu, needs_gradient = q.device.type == "cpu", torch.is_grad_enabled() and q.requires_grad
    if on_cpu and q.dtype == torch.bfloat16 and not onednn_has_bf16():
        return attend_without_bf16(q, k, v, mask, scale, softcap)
    if on_cpu and needs_gradient:
        return attend_plain(q, k, v, mask, scale, softcap)
    in_blocks = on_cpu and q.dtype == torch.bfloat16 and q.shape[2] > 1 and not has_amx()
    if softcap is not None or in_blocks:
        return attend_in_blocks(q, k, v, mask, scale, softcap)
    return attend_fused(q, k, v, mask, scale)


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Where each query looks: [B, H, T, S], every row sums to 1."""
    B, H, T, Dh = q.shape
    K, S = k.shape[1], k.shape[2]
    # The H / K query heads of a group share their keys: stacked as one tall matrix, no key is copied.
    scores = (q * scale).reshape(B, K, H // K * T, Dh) @ k.mT
    scores = scores.view(B, H, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + (additive(mask, scores.dtype) if mask.dtype == torch.bool else mask)
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores: 0 where a query may look, otherwise the lowest number."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """The mean of the values with these weights: [B, H, T, S], [B, K, S, Dh] -> [B, H, T, Dh]."""
    B, H, T, S = weights.shape
    K, Dh = v.shape[1], v.shape[3]
    return (weights.reshape(B, K, H // K * T, S) @ v).view(B, H, T, Dh)


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """The plain formula of `attend`. Same arguments and result."""
    return weighted_sum(attention_weights(q, k, mask, scale, softcap), v)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """`attend_plain` on a few rows of the batch, heads or queries at a time.

    The scores of a long row would fill gigabytes (4,096 image tokens: 16 heads * 4096 * 4096). A block of
    them fits in the processor's cache, and is freed before the next one is computed.
    """
    B, H, T, _ = q.shape
    K, S = k.shape[1], k.shape[2]
    if B * H * T * S <= SCORES_PER_BLOCK:
        return attend_plain(q, k, v, mask, scale, softcap)
    group = H // K  # query heads that share keys
    rows_at_once = max(1, SCORES_PER_BLOCK // (H * T * S))
    heads = min(K, max(1, SCORES_PER_BLOCK // (group * T * S)))
    queries = max(1, SCORES_PER_BLOCK // (heads * group * S))
    mask = None if mask is None else mask.expand(B, 1, T, S)
    out = torch.empty_like(q)
    for row, head, start in product(range(0, B, rows_at_once), range(0, K, heads), range(0, T, queries)):
        rows, keys = slice(row, row + rows_at_once), slice(head, head + heads)
        part = (rows, slice(head * group, (head + heads) * group), slice(start, start + queries))
        seen = None if mask is None else mask[rows, :, start : start + queries]
        out[part] = attend_plain(q[part], k[rows, keys], v[rows, keys], seen, scale, softcap)
    return out


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`attend` through PyTorch's fused kernel, which never holds the whole [T, S] matrix of scores."""
    B, H, T, Dh = q.shape
    K = k.shape[1]
    if T == 1:  # a group's query heads take the place of T, so that no key is copied for them
        q = q.view(B, K, H // K, Dh)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != K)
    return out.reshape(B, H, T, Dh)


def attend_without_bf16(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """`attend` for bf16 on a processor that multiplies fp32 only: the plain form takes twenty times as long.

    The fused kernel widens what it reads by itself.
    """
    if softcap is None:
        return attend_fused(q, k, v, mask, scale)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    return attend_in_blocks(q.float(), k.float(), v.float(), mask, scale, softcap).to(q.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped queries (https://arxiv.org/abs/2305.13245).

    K = H is ordinary multi-head attention, K = 1 multi-query attention. What depends on the model is passed
    as functions: `rotary` rotates queries and keys, `update_cache` stores keys and values and returns all of
    them.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.scale = self.head_dim**-0.5
        self.softcap: float | None = None
        num_key_value_heads = num_key_value_heads or num_attention_heads
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_attention_heads * self.head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotary: Callable[[Tensor], Tensor] | None = None,
        update_cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        if update_cache is not None:
            k, v = update_cache(k, v)
        out = attend(q, k, v, mask, self.scale, self.softcap)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, H, T, Dh] -> [B, T, D]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H * Dh] -> [B, H, T, Dh]
