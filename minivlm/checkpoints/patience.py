"""A limit on how slowly a download may go.

The Hub's library gives up when a server sends nothing for ten seconds. A server that sends a few bytes every
second keeps it waiting for years, without a word: what arrives is counted in pieces of 10 MB. Here, whatever
arrives is counted at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

SECONDS = 60.0  # for which a download may be slower than this:
LEAST = 1024.0  # bytes a second; 6 GB would take ten weeks


class TooSlow(Exception):
    """A server sends less than `LEAST` bytes a second."""


def at_a_fair_pace(pieces: Iterator[bytes], now: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
    """The pieces as they arrive. Raises TooSlow."""
    waited, arrived, asked = 0.0, 0, now()
    for piece in pieces:
        waited += now() - asked
        arrived += len(piece)
        if waited >= SECONDS:
            if arrived < LEAST * waited:
                raise TooSlow(f"it sends {arrived / waited:.0f} bytes a second")
            waited, arrived = 0.0, 0
        yield piece
        asked = now()  # what the receiver did in between, such as writing to a slow disk, does not count


@contextmanager
def no_endless_downloads() -> Iterator[None]:
    """Within, a download by the Hub's library that hardly moves raises TooSlow.

    Its HTTP client is one for the whole process: a download in another thread is watched as well meanwhile.
    """
    from huggingface_hub import get_session

    client: Any = get_session()
    stream: Any = import_module(type(client).__module__.partition(".")[0]).SyncByteStream

    class Watched(stream):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[bytes]:
            return at_a_fair_pace(iter(self.inner))

        def close(self) -> None:
            self.inner.close()

    def watch(response: Any) -> None:
        response.stream = Watched(response.stream)

    hooks = client.event_hooks["response"]
    hooks.append(watch)
    try:
        yield
    finally:
        hooks.remove(watch)
