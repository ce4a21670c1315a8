"""How good a matrix of similarities is: where the right answer stands among all.

A query may have several right answers (a picture with five captions, a caption that two pictures share). As
usual, the best placed one counts. Recall@k is the share of queries that have a right answer among their
first k; it gets harder with every item that is searched, so it means nothing without their number or chance.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def ranks(similarity: Tensor, right: Tensor | None = None) -> Tensor:
    """The place, from 1, of the best right answer of each query: [n, m] -> [n] int64.

    A wrong answer that is as similar as the right one comes before it. Collapsed towers, for which everything
    is alike, are therefore last, not first.

    Args:
        similarity: queries down, answers across.
        right: [n, m] bool; None: row i belongs to column i.

    Raises ValueError: shapes that do not fit, or a query without a right answer.
    """
    if right is None:
        right = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    if right.shape != similarity.shape or similarity.dim() != 2:
        raise ValueError(
            f"similarity is {list(similarity.shape)}, and right is {list(right.shape)}: expected [n, m]"
        )
    if not bool(right.any(dim=1).all()):
        missing = int((~right.any(dim=1)).nonzero()[0])
        raise ValueError(f"query {missing + 1} of {len(right)} has no right answer")
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    # "not less", since NaN is not greater than anything either.
    return 1 + (~(similarity < best) & ~right).sum(dim=1)


def recall(ranks: Tensor, k: int) -> float:
    """The share of queries with a right answer among the first k."""
    return float((ranks <= k).double().mean())


def median_rank(ranks: Tensor) -> int:
    """The place that half of the queries reach; of two in the middle, the better."""
    return int(ranks.median())


def chance_of_recall(right: Tensor, k: int) -> float:
    """Recall@k of answers in random order: with p of m right, 1 - C(m - p, k) / C(m, k)."""
    m = right.shape[1]
    k = min(k, m)
    counts, queries = right.sum(dim=1).unique(return_counts=True)
    missed = [comb(m - p, k) / comb(m, k) * q for p, q in zip(counts.tolist(), queries.tolist(), strict=True)]
    return 1 - sum(missed) / len(right)


def chance_of_median_rank(right: Tensor) -> int:
    """The place that half of the queries reach if the answers come in random order."""
    low, high = 1, right.shape[1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_of_recall(right, middle) >= 0.5 else (middle + 1, high)
    return low


def accuracy(similarity: Tensor, labels: Tensor) -> float:
    """The share of rows whose most similar column is the label's: [n, classes], [n]. A tie is a mistake."""
    right = torch.nn.functional.one_hot(labels, similarity.shape[1]).bool()
    return recall(ranks(similarity, right), 1)
