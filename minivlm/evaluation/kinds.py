"""What kinds of prompts a file has: the prompts themselves, or the words that many of them begin with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MOST_KINDS = 12  # rows of a table that one can still read
OTHERS = "all others"
TASK_WORDS = ("detect", "segment")  # whose next words are names


def kinds_of(prompts: Sequence[str]) -> list[str]:
    """The kind of each prompt.

    With at most MOST_KINDS different prompts, a prompt is its own kind. Otherwise it is as many of its first
    words, three, two or one, as leave no more kinds than that; if even one word is too many, rare ones are
    put together.
    """
    for words in (None, 3, 2, 1):
        kinds = [_beginning(prompt.split(), words) for prompt in prompts]
        if len(set(kinds)) <= MOST_KINDS:
            return kinds
    frequent = {kind for kind, _ in Counter(kinds).most_common(MOST_KINDS - 1)}
    return [kind if kind in frequent else OTHERS for kind in kinds]


def _beginning(words: Sequence[str], count: int | None) -> str:
    if count is not None and words[0] in TASK_WORDS:
        count = 1
    more = count is not None and len(words) > count
    return " ".join(words[:count]) + " ..." * more
