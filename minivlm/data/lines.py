"""Read a JSONL file about a user's own pictures: one JSON object per line, each line checked.

What an object holds is up to samples.py (a prompt and its answer) and pairs.py (a caption); objects.py takes
it apart. All lines are checked before training begins: a mistake in the thousandth line should not surface
after an hour.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from minivlm.data.objects import Line, object_of
from minivlm.data.shards import ShardItems, Spot, folder_of, is_shards, lines_in_shards
from minivlm.errors import InputError
from minivlm.processing import load_picture
from minivlm.processing.images import check_sides, open_file

MAX_REASONS = 10  # bad lines named in a message
MOST_KNOWN = 10**5  # pictures whose names are kept while lines are checked

Item = TypeVar("Item")


class BadLines(InputError):
    """Lines of a file that training cannot use. `reasons` names the first of them, one each."""

    def __init__(self, path: Path, bad: list[str], advice: str) -> None:
        self.summary = f"{path} has {len(bad)} bad line{'s' * (len(bad) > 1)}"
        self.reasons = bad[:MAX_REASONS] + (
            [f"and {len(bad) - MAX_REASONS} more"] if len(bad) > MAX_REASONS else []
        )
        self.advice = advice
        super().__init__(f"{self.summary}: {'; '.join(self.reasons)}. {advice}")


def read_lines(
    path: str | Path,
    read_line: Callable[[bytes, int, Path], Item],
    keys: Sequence[str],
    warn: Callable[[BadLines], object] | None = None,
    again: Callable[[bytes, int, Path], Item] | None = None,
) -> Sequence[Item]:
    """Apply `read_line` to each line of a file or of shards; it gets the line, its number and the folder.

    Args:
        read_line: raises InputError for a bad line.
        keys: of an object, for the message about a file without a good line.
        warn: as in `read_samples`; so are the errors.
        again: reads a line that is known to be good. With it, lines of shards do not stay in memory.
    """
    path = Path(path)
    folder = folder_of(path) if is_shards(path) else path.parent
    good: list[Item] | ShardItems[Item] = (
        ShardItems(path, again) if again is not None and is_shards(path) else []
    )
    bad = []
    for spot, line in _spotted(path):
        try:
            item = read_line(line.read(), line.number, folder)
        except InputError as error:
            bad.append(f"{line.place}: {error}")
        else:
            if isinstance(good, ShardItems):
                good.add(spot, line.number)
            else:
                good.append(item)
    if bad and warn is None:
        raise BadLines(path, bad, "Fix them, or skip them with --on-bad-line skip")
    if not good:
        why = f"every line is bad, the first is {bad[0]}" if bad else "it is empty"
        raise InputError(
            f"{path} contains nothing to train on: {why}. Write {object_of(keys)}, one object per line"
        )
    if bad and warn is not None:
        warn(BadLines(path, bad, "They are skipped"))
    return good


def lines_of(path: Path) -> Iterator[Line]:
    """All lines but blank ones. Raises InputError: the file cannot be read."""
    return (line for _, line in _spotted(path))


def _spotted(path: Path) -> Iterator[tuple[Spot, Line]]:
    """All lines and where they are, which is said of those in shards."""
    if is_shards(path):
        yield from lines_in_shards(path)
        return
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): expected a file with one JSON object per line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Spot(0, 0, 0), Line(number, f"line {number}", line)


def check_picture(path: Path, known: set[Path]) -> None:
    """Check a picture, without decoding it if its format allows, unless it is in `known`.

    Raises InputError: as `load_picture`.
    """
    if path not in known:
        if len(known) >= MOST_KNOWN:
            known.clear()
        if not _is_whole(path):
            load_picture(path)  # decodes it, and says what is wrong
        known.add(path)


def _is_whole(path: Path) -> bool:
    """Whether a picture is certainly complete: a PNG with the right checksums, a JPEG with its end marker."""
    try:
        with warnings.catch_warnings(), open_file(path, "picture") as file:
            warnings.simplefilter("error")
            with Image.open(file) as image:
                kind = image.format
                check_sides(image)
                image.verify()
            if kind == "JPEG":
                file.seek(-2, 2)
                return file.read() == b"\xff\xd9"
    except Exception:  # damaged files make Pillow raise almost anything
        return False
    return kind == "PNG"
