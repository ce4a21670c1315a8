"""What the processes of a training run say to each other, besides gradients: sums, settings and errors.

Each function takes the process's place, or None for one that works alone, which agrees with itself. All
processes have to call the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minivlm.distributed.places import Place
from minivlm.errors import InputError, ToldElsewhere

Value = TypeVar("Value")


def is_first(place: Place | None) -> bool:
    """Whether this process is the one that writes files and talks."""
    return place is None or place.rank == 0


def part_of(rows: range, rank: int, size: int) -> range:
    """The rows of one process: neighbors, as many as others have or one more. They may be none."""
    return rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]


def share_of(place: Place | None, rows: range) -> range:
    """The rows of this process."""
    return rows if place is None else part_of(rows, place.rank, place.size)


def total(place: Place | None, values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes."""
    if place is None:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with place.exchanging("the losses of the others"):
        dist.all_reduce(sums, group=place.group)
    return sums.tolist()


def anyone(place: Place | None, said: bool) -> bool:
    """Whether at least one process says so."""
    return total(place, [float(said)])[0] > 0


def as_the_first(place: Place | None, value: Value) -> Value:
    """What process 0 has."""
    if place is None:
        return value
    values = [value]
    with place.exchanging("word from process 0"):
        dist.broadcast_object_list(values, group=place.group, group_src=0)
    return values[0]


def everyone(place: Place | None, value: Value) -> list[Value]:
    """What each process has."""
    if place is None:
        return [value]
    values = [value] * place.size
    with place.exchanging("word from the others"):
        dist.all_gather_object(values, value, group=place.group)
    return values


@contextmanager
def together(place: Place | None) -> Iterator[None]:
    """What one process cannot do, all of them give up, and say why.

    Without it, those that could would wait for the one that has left.

    Raises:
        InputError: this is process 0, and it or another one has failed.
        ToldElsewhere: the same in all others.
    """
    if place is None:
        yield
        return
    failed: InputError | None = None
    try:
        yield
    except InputError as error:
        failed = error
    reasons = everyone(place, None if failed is None else str(failed))
    bad = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    if not bad:
        return
    rank, reason = bad[0]
    if failed is not None and rank == place.rank == 0:
        raise failed
    told = f"process {rank} of {place.size}: {reason}" if rank else reason
    raise (InputError if is_first(place) else ToldElsewhere)(told) from failed


def check_same(place: Place | None, settings: Mapping[str, Any]) -> None:
    """Raises InputError, in every process: they were started with other settings, or see other data."""
    with together(place):
        if place is None:
            return
        own, *others = everyone(place, dict(settings))
        for rank, other in enumerate(others, start=1):
            differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
            if differing:
                changes = ", ".join(f"{name} {own.get(name)} and {other.get(name)}" for name in differing)
                raise InputError(
                    f"processes 0 and {rank} do not train the same ({changes}): give all nodes the same "
                    "command and the same files"
                )
