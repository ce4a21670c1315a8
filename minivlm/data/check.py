"""What is in a file of lines: how long they are, what they ask and name, and which pictures are alike."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minivlm.data.fingerprints import Fingerprint, fingerprint, look_alike
from minivlm.data.lines import lines_of
from minivlm.data.objects import read_object
from minivlm.errors import InputError
from minivlm.processing import text_to_boxes


class Shown(NamedTuple):
    """One line, whatever it is for."""

    line: int
    paths: tuple[Path, ...]
    prompt: str  # empty in a pair
    answer: str
    tokens: int  # of pictures and text; 0: no model has been asked


class Spread(NamedTuple):
    """The smallest, the middle and the largest of some numbers."""

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class Facts:
    """What `data check` prints."""

    lines: int
    pictures: int  # files
    tokens: Spread
    prompts: list[tuple[str, int]]  # the most frequent first
    answers: list[tuple[str, int]]  # likewise, those without a box
    classes: dict[str, tuple[int, Spread]]  # objects of each name, and their shares of the picture in percent
    same: list[list[Path]]  # files that show the same, pixel for pixel
    alike: list[tuple[Path, Path]]


def kind_of_lines(path: Path) -> str:
    """ "pairs" if the first line that is an object has a "text", and "samples" otherwise.

    Raises InputError: the file cannot be read.
    """
    for line in lines_of(path):
        try:
            values = read_object(line.read(), ())
        except InputError:
            continue
        return "pairs" if "text" in values and "suffix" not in values else "samples"
    return "samples"


def examine(lines: Sequence[Shown], watch: Callable[[Sequence[Path]], Iterable[Path]] = iter) -> Facts:
    """Facts about lines that are good. Every picture is opened.

    Raises InputError: a picture is gone since the lines were read.
    """
    prints: dict[Path, Fingerprint] = {}
    for path in watch(list(dict.fromkeys(path for line in lines for path in line.paths))):
        prints[path] = fingerprint(path)
    by_content: dict[str, list[Path]] = defaultdict(list)
    for path, one in prints.items():
        by_content[one.content].append(path)
    areas: dict[str, list[float]] = defaultdict(list)
    others: Counter[str] = Counter()
    for line in lines:
        boxes = text_to_boxes(line.answer, 1, 1)
        for box in boxes:
            areas[box.name].append(100 * (box.x1 - box.x0) * (box.y1 - box.y0))
        if not boxes:
            others[line.answer] += 1
    return Facts(
        lines=len(lines),
        pictures=len(prints),
        tokens=spread([line.tokens for line in lines]),
        prompts=Counter(line.prompt for line in lines).most_common(),
        answers=others.most_common(),
        classes={name: (len(areas[name]), spread(areas[name])) for name in sorted(areas)},
        same=[paths for paths in by_content.values() if len(paths) > 1],
        alike=look_alike(prints),
    )


def spread(values: Sequence[float]) -> Spread:
    """Of at least one number."""
    return Spread(min(values), statistics.median(values), max(values))
