"""Ctrl-C at a moment when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def note_interrupts() -> Iterator[Callable[[], bool]]:
    """Ask the function given whether Ctrl-C was pressed; the second time it stops everything at once.

    An exception in the middle of a step would leave weights of which some are a step ahead.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield noted.is_set
        return

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches worker processes too. They have to deliver until the main process lets go of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
