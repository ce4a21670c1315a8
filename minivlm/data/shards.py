"""Shards: lines and their pictures in tars, in the form of WebDataset (https://github.com/webdataset/webdataset).

    train-000000.tar
      00000000.jpg      a picture, byte for byte
      00000000.json     its line: {"image": "00000000.jpg", "prefix": "what is it?", "suffix": "a cup"}
      00000001.00.png   several pictures of one line
      00000001.01.png
      00000001.json     [{...}, {...}]: several lines about the same pictures

Files with the same key, which is their name up to the first dot, are a sample and lie next to each other.
What else has this key is not looked at. The pictures of a line are those of its key.

Where many small files are slow to list, to copy and to read, a few tars are not. An epoch streams them: it
takes the tars in random order, and of the next `BUFFER` lines any one, so what is read lies close together.
Numbers are enough to know this order, and a member can be read from its place. So no picture waits in memory,
a run that is resumed in the middle of an epoch goes on at once, and several processes may prepare batches.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, overload

import numpy as np

from minivlm.data.annotated import picture_endings
from minivlm.data.objects import Line, read_json
from minivlm.errors import InputError
from minivlm.processing.tars import KEPT, members_of, open_member, version_of

BUFFER = 1000  # lines among which the next one is drawn
MOST_SHARDS = 10**6  # in a pattern
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Item = TypeVar("Item")


@dataclass
class Members:
    """The names of a sample's files."""

    text: str | None = None
    pictures: list[str] = field(default_factory=list)


class Spot(NamedTuple):
    """Where a line is."""

    tar: int  # of the set
    sample: int  # of the tar
    line: int  # of the sample


def is_shards(path: Path) -> bool:
    """Whether a path means shards and no file of lines: a folder, a tar, or a pattern."""
    name = path.name.lower()
    return path.is_dir() or name.endswith((".tar", ".tar.gz", ".tgz")) or bool(_RANGE.search(name))


def shards_of(path: Path) -> list[Path]:
    """The tars of a folder by name, those of a pattern such as train-{000000..000012}.tar, or the one tar.

    Raises InputError: there is none, or one of a pattern is missing.
    """
    if path.is_dir():
        tars = sorted(one for one in path.glob("*.tar") if not one.name.startswith("."))
        if not tars:
            raise InputError(
                f"{path} is a folder without shards: expected tars in it, or name a file with lines of JSON"
            )
        return tars
    found = _RANGE.search(path.name)
    if found is None:
        return [path]
    first, last = map(int, found.groups())
    if not first <= last < first + MOST_SHARDS:
        raise InputError(f"{path} counts from {first} to {last}: expected a range such as {{000000..000012}}")
    before, after = path.name[: found.start()], path.name[found.end() :]
    digits = len(found[1])
    tars = [path.with_name(f"{before}{number:0{digits}}{after}") for number in range(first, last + 1)]
    missing = [tar.name for tar in tars if not tar.is_file()]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(tars)} are missing, the first is {missing[0]}")
    return tars


def folder_of(path: Path) -> Path:
    """What the pictures of a set are named relative to."""
    return path if path.is_dir() else path.parent


def samples_in(tar: Path) -> Sequence[Members]:
    """The samples of a tar, in their order.

    Raises InputError: as `members_of`; files of one key lie apart.
    """
    members_of(tar)  # which says what is wrong
    return _samples_in(tar, version_of(tar))


@lru_cache(KEPT)
def _samples_in(tar: Path, version: tuple[int, int]) -> list[Members]:
    endings = picture_endings()
    samples: dict[str, Members] = {}
    last = None
    for name in members_of(tar):
        folder, slash, base = name.rpartition("/")
        stem, dot, ending = base.lower().partition(".")
        if not (stem and dot):  # hidden, or without an ending
            continue
        key = folder + slash + base[: len(stem)]
        if key in samples and key != last:
            raise InputError(
                f"{tar} has the key {key} twice: files of one key have to lie next to each other, and other "
                "samples need other keys"
            )
        last = key
        sample = samples.setdefault(key, Members())
        if ending == "json":
            sample.text = name
        elif f".{ending.rpartition('.')[2]}" in endings:
            sample.pictures.append(name)
    return [one for one in samples.values() if one.text is not None or one.pictures]


def lines_in_shards(path: Path) -> Iterator[tuple[Spot, Line]]:
    """All lines, as a file beside the tars would have them: "image" is "train-000000.tar/00000000.jpg".

    Raises InputError: as `shards_of` and `samples_in`.
    """
    number = 0
    for which, tar in enumerate(shards_of(path)):
        for nth, members in enumerate(samples_in(tar)):
            for line, content in enumerate(_contents(tar, members)):
                number += 1
                name = f"{tar.name}/{members.text or members.pictures[0]}"
                place = f"{name}, line {line + 1}" if line else name
                yield Spot(which, nth, line), Line(number, place, content)


def _contents(tar: Path, members: Members) -> list[bytes | InputError]:
    """The lines of a sample, each as it would stand in a file, or what is wrong with all of them."""
    if members.text is None:
        key = members.pictures[0].rpartition("/")[2].partition(".")[0]
        return [InputError(f"there is no {key}.json beside it: every picture needs its lines")]
    if not members.pictures:
        return [InputError("there is no picture with its key, such as .jpg or .png")]
    try:
        with open_member(tar, members.text) as file:
            values = read_json(file.read().removeprefix(b"\xef\xbb\xbf"))
    except InputError as error:
        return [error]
    names = [f"{tar.name}/{name}" for name in members.pictures]
    image = names if len(names) > 1 else names[0]
    lines = values if isinstance(values, list) else [values]
    if not lines:
        return [InputError("its list of lines is empty")]
    return [json.dumps(one | {"image": image} if isinstance(one, dict) else one).encode() for one in lines]


class ShardItems(Sequence[Item], Generic[Item]):
    """What is made of lines in shards. In memory is only where each is; it is read when it is asked for.

    Args:
        read_line: from a line, its number and the folder of the tars.
    """

    def __init__(self, path: Path, read_line: Callable[[bytes, int, Path], Item]) -> None:
        self.folder, self.tars, self.read_line = folder_of(path), shards_of(path), read_line
        self.spots = array("Q")  # four numbers for each line: its spot, and its own

    def add(self, spot: Spot, number: int) -> None:
        """Take a line in; they come in the order of the tars."""
        self.spots.extend((*spot, number))

    def __len__(self) -> int:
        return len(self.spots) // 4

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = 4 * (index % len(self))
        which, nth, line, number = self.spots[start : start + 4]
        tar = self.tars[which]
        try:
            content = _contents(tar, samples_in(tar)[nth])[line]
        except IndexError:
            content = InputError(f"{tar} has changed since it was checked: begin again")
        return self.read_line(Line(number, "", content).read(), number, self.folder)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers of all items as an epoch shows them."""
        counts = np.bincount(np.array(self.spots[::4], dtype=np.int64), minlength=len(self.tars))
        return shuffled(counts.tolist(), rng, BUFFER)

    def digest(self) -> str:
        """Changes with any byte of the tars."""
        total = hashlib.sha256()
        for tar in self.tars:
            with tar.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()[:8]


def shuffled(counts: Sequence[int], rng: np.random.Generator, buffer: int) -> np.ndarray:
    """The numbers of all lines of tars with so many lines each, as they leave a shuffle buffer.

    The tars come in random order, and their lines one after the other. Once the buffer is full, each line
    that comes takes the place of a random one in it, which leaves. In the end the rest leaves, shuffled.
    """
    starts = np.cumsum([0, *counts])
    stream = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in rng.permutation(len(counts))])
    held, order = stream[:buffer].copy(), stream.copy()
    places = rng.integers(buffer, size=len(stream))
    for number in range(buffer, len(stream)):
        place = places[number]
        order[number - buffer], held[place] = held[place], stream[number]
    order[len(stream) - len(held) :] = rng.permutation(held)
    return order
