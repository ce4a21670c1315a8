"""A user's own pictures with prompts and answers: one JSON object per line, the usual form for PaliGemma.

    {"image": "photos/1.jpg", "prefix": "what is it?", "suffix": "a teapot"}
    {"image": "photos/1.jpg", "prefix": "detect cup", "suffix": "<loc0256><loc0128><loc0767><loc0895> cup"}

`prefix` is the prompt, `suffix` the answer, and a picture's path is relative to the file's folder. Systems
that read several pictures with one prompt take a list of them: `"image": ["before.jpg", "after.jpg"]`. All
lines are checked before training begins: a mistake in the thousandth line should not surface after an hour.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from minivlm.data.lines import BadLines, check_picture, read_lines
from minivlm.data.objects import check_marks, images_of, read_object, text_of
from minivlm.distributed.agreement import part_of
from minivlm.errors import InputError
from minivlm.processing import AnswerProcessor, load_picture, text_to_boxes, to_rgb
from minivlm.processing.inputs import IGNORE, Inputs

KEYS = ("image", "prefix", "suffix")

_WORDS = {"loc": (4, 1024), "seg": (3, 128)}  # number of digits, number of words
# What is meant as one of these words, however it is written: not <location>, but <loc_0256>, &lt;loc0256&gt;,
# <LOC0256>, <loc-001>, <locnan>, loc0256>.
_MEANT = re.compile(
    r"(?:<|&lt;)[\s/]*(?:loc|seg)(?![a-z])|(?:<|&lt;)(?:loc|seg)(?=nan|none|null|inf)"
    r"|(?:loc|seg)[0-9]+\s*(?:>|&gt;)",
    re.IGNORECASE,
)
_WORD = re.compile(r"<(loc|seg)([0-9]+)>")
_SHOWN = re.compile(r"(?:&lt;)?[^>&\n]{1,12}(?:>|&gt;)|\S{1,20}")  # how much of it a message shows
_SEG = re.compile(r"<seg[0-9]{3}>")
_OBJECT = re.compile(r"((?:<loc[0-9]{4}>)+)((?:<seg[0-9]{3}>)*)")


@dataclass(frozen=True)
class Sample:
    """One line: a picture or several, a prompt and its answer."""

    line: int  # in the file, from 1
    images: tuple[str, ...]  # as the file names them
    paths: tuple[Path, ...]
    prefix: str
    suffix: str


def read_samples(
    path: str | Path,
    processor: AnswerProcessor,
    max_length: int,
    warn: Callable[[BadLines], object] | None = None,
    empty_answer: str | None = None,
) -> Sequence[Sample]:
    """All lines of a JSONL file in UTF-8, with or without a BOM; blank lines are skipped. Or those of shards.

    Args:
        processor: of the model that will be trained; it determines how many tokens a line has.
        max_length: most tokens for picture, prompt and answer together.
        warn: told what is wrong with bad lines, which are then skipped; without it they are refused.
        empty_answer: what the model learns to say where the answer is empty, as for a picture without the
            objects asked for; None refuses such lines.

    Raises:
        BadLines: the file has bad lines; for what makes a line bad, see `_read_line`.
        InputError: the file cannot be read, or has no good line.
    """
    known: set[Path] = set()  # pictures that have been checked

    def read_line(line: bytes, number: int, folder: Path) -> Sample:
        return _read_line(line, number, folder, processor, max_length, known, empty_answer)

    return read_lines(path, read_line, KEYS, warn, partial(_sample_of, empty_answer=empty_answer))


def _read_line(
    line: bytes,
    number: int,
    folder: Path,
    processor: AnswerProcessor,
    max_length: int,
    known: set[Path],
    empty_answer: str | None,
) -> Sample:
    """Read one line and check all of it.

    Raises InputError: as `_sample_of` and `check_marks`; its text is too long, or has malformed boxes; a
    picture is missing or damaged, or is one too many for the system.
    """
    sample = _sample_of(line, number, folder, empty_answer)
    for key, text in (("prefix", sample.prefix), ("suffix", sample.suffix)):
        check_marks(text, key, processor.tokenizer.specials.values())
        _check_words(text)
    _check_boxes(sample.suffix)
    for path in sample.paths:
        check_picture(path, known)
    length = length_of(sample, processor)
    if length > max_length:
        raise InputError(
            f"picture, prefix and suffix have {length} tokens, over the limit of {max_length}: shorten them"
        )
    return sample


def _sample_of(line: bytes, number: int, folder: Path, empty_answer: str | None) -> Sample:
    """What a line says. Raises InputError: as `read_object` and `text_of`."""
    values = read_object(line, KEYS)
    images = images_of(values)
    prefix, suffix = text_of(values, "prefix"), text_of(values, "suffix", empty_answer)
    return Sample(number, images, tuple(folder / image for image in images), prefix, suffix)


def length_of(sample: Sample, processor: AnswerProcessor) -> int:
    """Tokens of pictures, prompt and answer. Raises InputError: more pictures than the system reads."""
    row = processor.encode_row(sample.prefix, sample.suffix, len(sample.paths))
    return len(processor.make_room(row, sample.paths).ids)


def _check_words(text: str) -> None:
    """Raises InputError: a `<loc>` or `<seg>` that is not in the vocabulary, and so would be spelled out."""
    for meant in _MEANT.finditer(text):
        word = _WORD.match(text, meant.start())
        kind = "seg" if "seg" in meant[0].lower() else "loc"
        digits, count = _WORDS[kind]
        first, last = (f"<{kind}{number:0{digits}}>" for number in (0, count - 1))
        if word is None or len(word[2]) != digits:
            shown = _SHOWN.match(text, meant.start())
            raise InputError(f"{shown[0] if shown else meant[0]} is malformed: expected {first} to {last}")
        if int(word[2]) >= count:
            where = " and lies outside the picture" if kind == "loc" else ""
            raise InputError(f"{word[0]} does not exist{where}: expected {first} to {last}")


def _check_boxes(suffix: str) -> None:
    """Raises InputError: a box that could not be read back from the answer, see `text_to_boxes`."""
    for locs, segs in _OBJECT.findall(suffix):
        count = locs.count("<")
        if count != 4:
            raise InputError(
                f"{count} <loc> in a row, in {locs}: a box has four, without spaces between them: y0 x0 y1 x1"
            )
        if not text_to_boxes(locs, 1, 1):
            raise InputError(f"the box {locs} has no area: expected y0 < y1 and x0 < x1, as y0 x0 y1 x1")
        if segs.count("<") not in (0, 16):
            raise InputError(f"{segs.count('<')} <seg> after the box {locs}: a mask has 16")
    if _SEG.search(_OBJECT.sub("", suffix)):
        raise InputError("<seg> without a box before it: a mask fills the box before it")


class SampleBatches(Dataset[list[Inputs] | InputError]):
    """Item number n is the batches of step n, a function of (seed, n) alone.

    The rows of a run are all samples in random order, then all of them in another random order, and so on.
    Steps divide them into equal parts, of which only the last of the run may be smaller.

    Args:
        rows: in the whole run.
        batch_size: rows per batch.
        accumulate: batches per step.
        change: what becomes of a row, from its number in the run.
        more: rows that come on top in a batch, from the first of its rows to below the last.
        order: the numbers of all samples as an epoch shows them; None: any order is as likely as any other.
        among: the rank of this process and the number of processes that share each batch. One that gets no
            row of a small batch reads its first one without an answer, which has no loss.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: AnswerProcessor,
        *,
        seed: int,
        rows: int,
        batch_size: int,
        accumulate: int,
        change: Callable[[Opened, int], Opened] | None = None,
        more: Callable[[int, int], Sequence[Opened]] | None = None,
        order: Callable[[np.random.Generator], np.ndarray] | None = None,
        among: tuple[int, int] = (0, 1),
    ) -> None:
        self.change, self.more, self.order, self.among = change, more, order, among
        self.samples, self.processor = samples, processor
        self.seed, self.rows, self.batch_size, self.accumulate = seed, rows, batch_size, accumulate
        self._order = (-1, np.arange(0))  # the epoch used last, and its order

    def __len__(self) -> int:
        return -(-self.rows // (self.batch_size * self.accumulate))

    def __getitem__(self, step: int) -> list[Inputs] | InputError:
        first = step * self.batch_size * self.accumulate
        last = min(first + self.batch_size * self.accumulate, self.rows)
        starts = range(first, last, self.batch_size)
        try:
            return [self._share(range(start, min(start + self.batch_size, last))) for start in starts]
        except InputError as error:  # returned: raised in a worker process it would come with a traceback
            return error

    def _share(self, rows: range) -> Inputs:
        """What this process reads of a batch. Raises InputError: as `make_inputs`."""
        mine = part_of(rows, *self.among)
        if mine:
            return self._inputs(mine.start, mine.stop)
        inputs = make_inputs(self.processor, [self.sample(rows.start)])
        return inputs | {"labels": torch.full_like(inputs["labels"], IGNORE)}

    def _inputs(self, first: int, last: int) -> Inputs:
        """The batch of these rows. Raises InputError: as `make_inputs`."""
        samples = [self.sample(row) for row in range(first, last)]
        if self.change is None and self.more is None:
            return make_inputs(self.processor, samples)
        opened = [open_sample(sample) for sample in samples]
        if self.change is not None:
            opened = [self.change(one, row) for row, one in enumerate(opened, start=first)]
        if self.more is not None:
            opened += self.more(first, last)
        return inputs_of(self.processor, opened)

    def sample(self, row: int) -> Sample:
        """The sample in a row of the run."""
        epoch, place = divmod(row, len(self.samples))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.samples)) if self.order is None else self.order(rng)
            self._order = (epoch, order)
        return self.samples[int(self._order[1][place])]


def make_inputs(processor: AnswerProcessor, samples: Sequence[Sample]) -> Inputs:
    """A batch with labels, padded on the right.

    Raises InputError: a picture turns out to be damaged, or is gone since it was checked.
    """
    return inputs_of(processor, [open_sample(sample) for sample in samples])


class Opened(NamedTuple):
    """A sample whose pictures are open."""

    pictures: list[Image.Image]
    prefix: str
    suffix: str


def inputs_of(processor: AnswerProcessor, opened: Sequence[Opened]) -> Inputs:
    """`make_inputs`, once pictures are open."""
    return processor(
        [one.pictures for one in opened],
        [one.prefix for one in opened],
        suffixes=[one.suffix for one in opened],
        padding_side="right",
    )


def open_sample(sample: Sample) -> Opened:
    """Raises InputError: a picture turns out to be damaged, or is gone since it was checked."""
    try:
        return Opened([to_rgb(load_picture(path)) for path in sample.paths], sample.prefix, sample.suffix)
    except InputError as error:
        raise InputError(f"line {sample.line}: {error}") from error
