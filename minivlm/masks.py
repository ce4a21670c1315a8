"""Attention masks: boolean, True where a query may attend to a key.

Every function compares *positions* of queries with positions of keys, never tensor indices, so the same few
lines serve training, prefill, decoding with a cache, and padded batches. Combine masks with `&` and `|`, then
add the head axis: `mask[:, None]`.

In the drawings, rows are queries, columns are keys, and 1 means may attend. Source of the prefix-LM form:
PaliGemma, section 3.1 (https://arxiv.org/abs/2407.07726).
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
    """Causal, but every token sees the first `prefix_lengths` tokens. [B, T], [B, S], [B] -> [B, T, S]

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
    """No token sees padding. [B, S] -> [B, 1, S]

    Four tokens, the first of which is padding:

        0 1 1 1
        0 1 1 1
        0 1 1 1
        0 1 1 1
    """
    return key_is_real[:, None, :].bool()


def sliding(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Each token sees the last `window` positions, including its own. [B, T], [B, S] -> [B, T, S]

    window = 2, combined with `causal`:

        1 0 0 0
        1 1 0 0
        0 1 1 0
        0 0 1 1
    """
    return query_positions[:, :, None] - key_positions[:, None, :] < window


def block_diagonal(query_blocks: Tensor, key_blocks: Tensor) -> Tensor:
    """Tokens see only their own block. [B, T], [B, S] block numbers -> [B, T, S]

    Blocks 0 0 1 1:

        1 1 0 0
        1 1 0 0
        0 0 1 1
        0 0 1 1
    """
    return query_blocks[:, :, None] == key_blocks[:, None, :]
