"""A user's own pictures with captions: one JSON object a line, for the training of two towers.

    {"image": "photos/1.jpg", "text": "a cup of tea on a red table"}

A picture's path is relative to the file's folder. A picture may have several lines with a caption each. As in
`minivlm.data.lines`, whose lines have a prompt and an answer, all lines are looked at before training begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minivlm.data.lines import BadLines, check_picture, read_lines, read_texts
from minivlm.errors import InputError
from minivlm.processing import CaptionTokenizer

KEYS = ("image", "text")


@dataclass(frozen=True)
class Pair:
    """One line: a picture and its caption."""

    line: int  # in the file, from 1
    image: str  # as the file names it
    path: Path
    text: str


def read_pairs(
    path: str | Path,
    tokenizers: Sequence[CaptionTokenizer],
    warn: Callable[[BadLines], object] | None = None,
) -> list[Pair]:
    """All lines of a JSONL file in UTF-8, with or without a BOM; blank lines are passed over.

    Args:
        tokenizers: of the models that will read the captions, which have to be short enough for each.
        warn: told what is wrong with bad lines, which are then left out; without it they are refused.

    Raises:
        BadLines: a line is no JSON object, or a key is missing, empty or no text; its caption is too long;
            its picture is missing or damaged.
        InputError: the file cannot be read, or no good line is in it.
    """
    known: set[Path] = set()

    def read_line(line: bytes, number: int, folder: Path) -> Pair:
        image, text = read_texts(line, KEYS)
        for tokenizer in tokenizers:
            length = len(tokenizer.encode(text))
            room = tokenizer.form.max_length - len(tokenizer.before) - 1
            if length > room:
                raise InputError(
                    f"its text has {length} tokens, and the model reads {room} at most: shorten it (new "
                    "towers read more with a larger --max-length)"
                )
        check_picture(folder / image, known)
        return Pair(number, image, folder / image, text)

    return read_lines(path, read_line, KEYS, warn)


def read_captions(path: str | Path) -> list[str]:
    """The captions alone, of all lines that have one, for making a tokenizer before the lines are judged.

    Raises InputError: the file cannot be read, or no line has a caption.
    """

    def read_line(line: bytes, number: int, folder: Path) -> str:
        text = read_texts(line, KEYS)[1]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("half a surrogate pair in its text") from error
        return text

    return read_lines(path, read_line, KEYS, warn=lambda bad: None)
