"""Read a JSONL file about a user's own pictures: one JSON object per line, each line checked.

What an object holds is up to samples.py (a prompt and its answer) and pairs.py (a caption). All lines are
checked before training begins: a mistake in the thousandth line should not surface after an hour.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from minivlm.errors import InputError
from minivlm.processing import load_picture
from minivlm.processing.images import check_sides

MAX_REASONS = 10  # bad lines named in a message

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
) -> list[Item]:
    """Apply `read_line` to each line of a file; it gets the line, its number and the file's folder.

    Args:
        read_line: raises InputError for a bad line.
        keys: of an object, for the message about a file without a good line.
        warn: as in `read_samples`; so are the errors.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): expected a file with one JSON object per line"
        ) from error
    good, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            good.append(read_line(line, number, path.parent))
        except InputError as error:
            bad.append(f"line {number}: {error}")
    if bad and warn is None:
        raise BadLines(path, bad, "Fix them, or skip them with --on-bad-line skip")
    if not good:
        why = f"every line is bad, the first is {bad[0]}" if bad else "it is empty"
        raise InputError(
            f"{path} contains nothing to train on: {why}. Write {_object_of(keys)}, one object per line"
        )
    if bad and warn is not None:
        warn(BadLines(path, bad, "They are skipped"))
    return good


def read_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The values of the keys in one line. Raises InputError: as `read_object` and `text_of`."""
    values = read_object(line, keys)
    return [text_of(values, key) for key in keys]


def read_object(line: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """One line as an object; `keys` are those that a message asks for.

    Raises InputError: it is not UTF-8 or not a JSON object, or gives a key twice.
    """
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=_each_once)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:  # endless numbers or brackets
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"not an object but {type(values).__name__}: write {_object_of(keys)}")
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which by itself would let the last of equal keys win."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f'the key "{twice}" is given twice: leave one of them')
    return values


def _object_of(keys: Sequence[str]) -> str:
    return "{" + ", ".join(f'"{key}"' for key in keys) + "}"


def text_of(values: Mapping[str, Any], key: str, instead: str | None = None) -> str:
    """The text under a key.

    Args:
        instead: what an empty text stands for.

    Raises InputError: it is missing, empty or not text.
    """
    if key not in values:
        raise InputError(f'no "{key}" among its keys ({", ".join(map(repr, values)) or "none"})')
    value = values[key]
    if not isinstance(value, str):
        raise InputError(f'"{key}" is {json.dumps(value)[:40]}: expected text')
    if not value.strip():
        if instead is None:
            say = ": write the answer, or say what an empty one means, as in --empty-answer none"
            raise InputError(f'"{key}" is empty{say * (key == "suffix")}')
        return instead
    return value


def images_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the pictures of a line: one, or a list of several. Raises InputError: as `text_of`."""
    listed = values.get("image")
    if not isinstance(listed, list):
        return (text_of(values, "image"),)
    if not listed:
        raise InputError('"image" is an empty list: expected the path of a picture, or a list of several')
    return tuple(text_of({"image": name}, "image") for name in listed)


def check_marks(text: str, key: str, marks: Iterable[str]) -> None:
    """Raises InputError: a text that begins or ends with a token that only the program may insert.

    Other tools want them in the text. Here a typed one is text, and would be spelled out letter by letter.
    """
    for mark in marks:
        if text.strip().startswith(mark) or text.strip().endswith(mark):
            raise InputError(f'"{key}" contains {mark}, which is added where it belongs: remove it')


def check_picture(path: Path, known: set[Path]) -> None:
    """Check a picture, without decoding it if its format allows, unless it is in `known`.

    Raises InputError: as `load_picture`.
    """
    if path not in known:
        if not _is_whole(path):
            load_picture(path)  # decodes it, and says what is wrong
        known.add(path)


def _is_whole(path: Path) -> bool:
    """Whether a picture is certainly complete: a PNG with the right checksums, a JPEG with its end marker."""
    if not path.is_file():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(path) as image:
                kind = image.format
                check_sides(image)
                image.verify()
    except Exception:  # damaged files make Pillow raise almost anything
        return False
    if kind == "JPEG":
        with path.open("rb") as file:
            file.seek(-2, 2)
            return file.read() == b"\xff\xd9"
    return kind == "PNG"
