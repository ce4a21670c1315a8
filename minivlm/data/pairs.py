"""A user's own pictures with captions: one JSON object per line, for training two towers.

    {"image": "photos/1.jpg", "text": "a cup of tea on a red table"}

A picture's path is relative to the file's folder. A picture may have several lines, each with a caption. As
in `minivlm.data.samples`, whose lines have a prompt and an answer, all lines are checked before training
begins. A batch has no line twice; lines with equal captions are the user's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm.data.lines import BadLines, check_picture, read_lines
from minivlm.data.objects import check_marks, read_texts
from minivlm.distributed.agreement import part_of
from minivlm.errors import InputError
from minivlm.processing import CaptionTokenizer, PairProcessor, load_picture, to_rgb

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
    """All lines of a JSONL file in UTF-8, with or without a BOM; blank lines are skipped.

    Args:
        tokenizers: of the models that will read the captions, which must be short enough for each.
        warn: told what is wrong with bad lines, which are then skipped; without it they are refused.

    Raises:
        BadLines: a line is not a JSON object, or a key is missing, empty or not text; its caption is too
            long; its picture is missing or damaged.
        InputError: the file cannot be read, or has no good line.
    """
    known: set[Path] = set()

    def read_line(line: bytes, number: int, folder: Path) -> Pair:
        image, text = read_texts(line, KEYS)
        for tokenizer in tokenizers:
            check_marks(text, "text", tokenizer.specials.values())
            length = len(tokenizer.encode(text))
            room = tokenizer.form.max_length - len(tokenizer.before) - 1
            if length > room:
                raise InputError(
                    f"its text has {length} tokens, but the model reads at most {room}: shorten it (new "
                    "towers read more with a larger --max-length)"
                )
        check_picture(folder / image, known)
        return Pair(number, image, folder / image, text)

    return list(read_lines(path, read_line, KEYS, warn))


def read_captions(path: str | Path) -> list[str]:
    """Only the captions, of all lines that have one, for building a tokenizer before the lines are checked.

    Raises InputError: the file cannot be read, or no line has a caption.
    """

    def read_line(line: bytes, number: int, folder: Path) -> str:
        text = read_texts(line, KEYS)[1]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("its text contains half a surrogate pair") from error
        return text

    return list(read_lines(path, read_line, KEYS, warn=lambda bad: None))


# pixel_values [n, C, H, W] and input_ids [n, T]; row i of one matches row i of the other
Inputs = dict[str, Tensor]


class FilePairs(Dataset[list[Inputs] | InputError]):
    """Item number n is the batch of step n, once for each processor.

    Each epoch goes through all lines in another random order. The lines left over at the end, fewer than a
    batch, are skipped until a later epoch.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        processors: Sequence[PairProcessor],
        *,
        seed: int,
        steps: int,
        batch_size: int,
    ) -> None:
        self.among = (0, 1)  # rank of this process, and how many share each batch
        self.pairs, self.processors = pairs, processors
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        if len(pairs) < batch_size:
            raise InputError(
                f"batch_size is {batch_size}, but there are {len(pairs)} pairs: a pair would be in a batch "
                "twice and count as wrong. Choose a smaller batch"
            )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Inputs] | InputError:
        mine = part_of(range(self.batch_size), *self.among)
        chosen = self.choose(step)[mine.start : mine.stop]
        try:
            pictures = [open_picture(pair) for pair in chosen]
        except InputError as error:  # returned: raised in a worker process it would come with a traceback
            return error
        return [processor(pictures, [pair.text for pair in chosen]) for processor in self.processors]

    def choose(self, step: int) -> list[Pair]:
        """The lines of a batch."""
        epoch, place = divmod(step, len(self.pairs) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs))
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.pairs[row] for row in rows.tolist()]


def open_picture(pair: Pair) -> Image.Image:
    """Raises InputError: it turns out to be damaged, or is gone since it was checked."""
    try:
        return to_rgb(load_picture(pair.path))
    except InputError as error:
        raise InputError(f"line {pair.line}: {error}") from error
