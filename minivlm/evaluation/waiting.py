"""How long it takes: a bar on a terminal, elsewhere a line now and then, and an estimate near the start."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

MEASURED = 5.0  # seconds that an estimate is made from, and
MEASURED_ITEMS = 5  # items at least, after a first one, which also warms up
WORTH_TELLING = 60.0  # seconds; nobody needs to be warned of less
EVERY = 30.0  # seconds between two lines where there is no terminal


class Bar(tqdm):  # type: ignore[type-arg]  # when it runs, tqdm takes no argument
    """Iterate, and show on standard error how far it is.

    Args:
        progress: True shows a bar, False nothing, None a bar on a terminal and lines elsewhere.
        rounds: how many waits of about this length an estimate is for; 0: none is made.
    """

    def __init__(
        self,
        items: Iterable[Any],
        label: str | None = None,
        *,
        unit: str,
        progress: bool | None = None,
        rounds: int = 1,
        **options: Any,
    ) -> None:
        self.lines = progress is None and not sys.stderr.isatty()
        self.quiet, self.label, self.one, self.rounds = progress is False, label, unit, rounds
        super().__init__(items, label, unit=unit, disable=self.quiet or self.lines, **options)
        self.whole = float(self.total or 0)

    def __iter__(self) -> Iterator[Any]:
        started = last = time.monotonic()
        done, told, left = -1, self.quiet or self.rounds == 0, self.whole - self.n
        for item in super().__iter__():
            yield item
            done, left, now = done + 1, left - 1, time.monotonic()
            if done == 0:
                started = now
            elif not told and done >= MEASURED_ITEMS and now - started >= MEASURED:
                told = True
                self._tell_estimate((now - started) / done * ((left + done + 1) * self.rounds))
            if done > 0 and self.lines and now - last >= EVERY:
                last = now
                self._tell_place(left, (now - started) / done * left)

    def _tell_place(self, left: float, seconds: float) -> None:
        label = f"{self.label}: " if self.label else ""
        more = f", {self.postfix}" if getattr(self, "postfix", None) else ""
        where = f"{label}{self.one} {self.whole - left:.0f} of {self.whole:.0f}{more}"
        print(f"minivlm: {where}, about {duration(seconds)} left", file=sys.stderr, flush=True)

    def _tell_estimate(self, seconds: float) -> None:
        if seconds >= WORTH_TELLING:
            message = f"minivlm: at this pace, it takes about {duration(seconds)} on this machine"
            tqdm.write(message, file=sys.stderr)  # above the bar, where there is one


def duration(seconds: float) -> str:
    """To be read: seconds up to two minutes, then minutes up to two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"


def evenly_spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose beginning has some of everything, and so the pace of the rest.

    By steps of the golden ratio, which leave no large gap.
    """
    return sorted(range(count), key=lambda number: number * (5**0.5 - 1) / 2 % 1)
