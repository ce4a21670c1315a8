"""One line of a JSONL file as an object, and the texts in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minivlm.errors import InputError


class Line(NamedTuple):
    """One that is not blank, as it is written."""

    number: int  # from 1
    place: str  # what a message calls it
    content: bytes | InputError  # or why it cannot be read

    def read(self) -> bytes:
        """Raises InputError: it cannot be read."""
        if isinstance(self.content, InputError):
            raise self.content
        return self.content


def read_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The values of the keys in one line. Raises InputError: as `read_object` and `text_of`."""
    values = read_object(line, keys)
    return [text_of(values, key) for key in keys]


def read_object(line: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """One line as an object; `keys` are those that a message asks for.

    Raises InputError: as `read_json` and `check_object`.
    """
    return check_object(read_json(line), keys)


def read_json(line: bytes) -> Any:
    """Raises InputError: it is not UTF-8 or not JSON, or gives a key twice."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_each_once)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:  # endless numbers or brackets
        raise InputError(f"not JSON ({error})") from error


def check_object(values: object, keys: Sequence[str]) -> dict[str, Any]:
    """Raises InputError: something else than an object."""
    if not isinstance(values, dict):
        raise InputError(f"not an object but {type(values).__name__}: write {object_of(keys)}")
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which by itself would let the last of equal keys win."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f'the key "{twice}" is given twice: leave one of them')
    return values


def object_of(keys: Sequence[str]) -> str:
    """How an object with these keys is written, for a message."""
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
