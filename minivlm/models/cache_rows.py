"""Rows of a cache: one becomes several, and those that have ended leave.

What a system keeps beside keys and values, by the names in `of_each_row` of its cache, goes along. It is only
read, so it is not copied where rows are repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from minivlm.cache import KVCache

Kept = TypeVar("Kept")
Cache = TypeVar("Cache", bound=KVCache)


def repeated(cache: Kept, times: int) -> Kept:
    """Each row `times` times, one after the other, where each writes into a copy of its own.

    What is no `KVCache` is read again for every token, and never written.
    """

    def copies(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(times, 0)

    def views(tensor: Tensor) -> Tensor:  # of one row, without a copy
        return tensor[:, None].expand(-1, times, *tensor.shape[1:]).flatten(0, 1)

    return _changed(cache, copies, views) if isinstance(cache, KVCache) else _of_each(cache, views)


def selected(cache: Cache, rows: Tensor) -> Cache:
    """Some rows of a cache, where `rows` [B] is true."""
    return _changed(cache, lambda tensor: tensor[rows], lambda tensor: tensor[rows])


def _changed(cache: Cache, written: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor]) -> Cache:
    """A copy whose tensors [B, ...] are changed, those that are written and those that are only read."""
    new = copy.copy(cache)
    new.lengths = written(cache.lengths)
    new.keys = [written(keys) for keys in cache.keys]
    new.values = [written(values) for values in cache.values]
    for name in getattr(cache, "of_each_row", ()):
        setattr(new, name, _of_each(getattr(cache, name), read))
    return new


def _of_each(kept: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor in it, changed."""
    if isinstance(kept, Tensor):
        return change(kept)
    if isinstance(kept, list | tuple):
        return type(kept)(_of_each(one, change) for one in kept)
    if is_dataclass(kept) and not isinstance(kept, type):
        return replace(
            kept, **{field.name: _of_each(getattr(kept, field.name), change) for field in fields(kept)}
        )
    return kept
