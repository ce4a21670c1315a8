"""Ctrl-C takes effect when nothing is half done, and so does SIGTERM, with which a system ends a process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def note_interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether one of the signals has come. The next one stops everything at once.

    An exception in the middle of a step would leave some weights a step ahead of the others.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield noted.is_set
        return

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = [(number, signal.signal(number, note)) for number in SIGNALS]
    try:
        yield noted.is_set
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """They reach worker processes too, but those must deliver until the main process lets them go."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
