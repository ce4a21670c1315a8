"""Attention masks: boolean, True where a query may look at a key.

Every function compares *positions* of queries with positions of keys, never indices of a tensor. The same
few lines then serve training, prefill, decoding with a cache, and padded batches. Combine them with `&`
and `|`, and add the axis of heads at the end: `mask[:, None]`.

Drawings: rows are queries, columns are keys, 1 = may look.
Source of the prefix-LM form: PaliGemma, section 3.1 (https://arxiv.org/abs/2407.07726).
"""

from __future__ import annotations

from torch import Tensor


def causal(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Each token sees itself and the past. [B, T], [B, S] -> [B, T, S]

    1 0 0 0
    1 1 0 0
    1 1 1 0
    1 1 1 1
    """
    return key_positions[:, None, :] <= query_positions[:, :, None]


def prefix_lm(query_positions: Tensor, key_positions: Tensor, prefix_lengths: Tensor) -> Tensor:
    """Causal, and the first `prefix_lengths` tokens are seen by everyone. [B, T], [B, S], [B] -> [B, T, S]

    With a prefix of 3 (image and prompt) and a suffix of 2 (the answer):

        1 1 1 0 0
        1 1 1 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1
    """
    in_prefix = key_positions < prefix_lengths[:, None]
    return causal(query_positions, key_positions) | in_prefix[:, None, :]


def padding(key_is_real: Tensor) -> Tensor:
    """Nobody sees padding. [B, S] -> [B, 1, S]

    With one pad on the left of four tokens:

        0 1 1 1
        0 1 1 1
        0 1 1 1
        0 1 1 1
    """
    return key_is_real[:, None, :].bool()


def sliding(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Each token sees the last `window` positions, itself included. [B, T], [B, S] -> [B, T, S]

    window = 2, combined with `causal`:

        1 0 0 0
        1 1 0 0
        0 1 1 0
        0 0 1 1
    """
    return query_positions[:, :, None] - key_positions[:, None, :] < window


def block_diagonal(query_blocks: Tensor, key_blocks: Tensor) -> Tensor:
    """Tokens see their own block only. [B, T], [B, S] block numbers -> [B, T, S]

    Blocks 0 0 1 1:

        1 1 0 0
        1 1 0 0
        0 0 1 1
        0 0 1 1
    """
    return query_blocks[:, :, None] == key_blocks[:, None, :]
