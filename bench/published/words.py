"""Words for a tokenizer of a published size: every letter, and runs of letters, likelier ones first."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

# By frequency, so that the words which fit into the vocabulary are the likelier ones.
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


def longer_words(mark: str) -> Iterator[tuple[str, str]]:
    """(known beginning, last letter) of words: after a space of 1 to 4 letters, without of 2 and 3.

    Every word is a shorter one and a letter more, those with a space before them first: a word of a text is
    cut where the longest known beginning ends.
    """
    for space, length in ((mark, 1), (mark, 2), (mark, 3), ("", 2), ("", 3), (mark, 4)):
        for letters in itertools.product(LETTERS, repeat=length):
            *start, last = letters
            yield space + "".join(start), last


def byte_form(pieces: str, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A byte-pair encoding over bytes that cuts texts by a regular expression, without words yet."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def with_byte_words(
    form: tokenizers.Tokenizer, count: int, first: Sequence[str] = (), never: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """A tokenizer over bytes in the form of another, with so many words and no added tokens.

    Args:
        first: words before all others.
        never: signs of bytes that are no words.
    """
    state = json.loads(form.to_str())
    letters = [*first, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(never))]
    if count < len(letters):
        raise ValueError(f"room for {count} words, expected {len(letters)} for the bytes alone")
    merges = list(itertools.islice(longer_words("Ġ"), count - len(letters)))
    words = [*letters, *(start + last for start, last in merges)]
    state["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    state["model"]["merges"] = [list(pair) for pair in merges]
    state["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(state))
