"""Divide a file of lines into parts for training, validation and testing, by what the pictures show.

All lines about one picture go to the same part, also if it lies in several files: a model that has learned a
picture by heart would look good on its copy. The order of the pictures is that of a hash of the seed and
their pixels, so it depends on neither names nor the order of the lines.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minivlm.data.fingerprints import Fingerprint, fingerprint, look_alike
from minivlm.data.lines import BadLines, check_picture, read_lines
from minivlm.data.objects import images_of, read_object
from minivlm.data.shards import is_shards
from minivlm.errors import InputError
from minivlm.files import check_output, write_aside


@dataclass(frozen=True)
class Part:
    """One of the files that were written."""

    path: Path
    lines: int
    pictures: int  # different ones


@dataclass(frozen=True)
class Divided:
    """What became of a file."""

    parts: list[Part]
    apart: list[tuple[Path, Path]]  # pictures that look alike, but are in different parts


def split_lines(
    path: Path,
    shares: Mapping[str, float],
    seed: int = 0,
    warn: Callable[[BadLines], object] | None = None,
    watch: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> Divided:
    """Write the parts beside the file: of my.jsonl, my-train.jsonl and so on, with the lines as they are.

    Args:
        shares: of the pictures, for each part, of at most 1 in all. What is left over becomes "train".
        warn: told about bad lines, which are then left out; without it they are refused.
        watch: iterates over the pictures, and may show how far it is.

    Raises:
        BadLines: a line is no object, or its picture is missing or damaged.
        InputError: the file cannot be read; there are fewer pictures than parts; a part exists already.
    """
    if is_shards(path):
        raise InputError(
            f"{path} is shards: divide the file of lines before it is packed, or write one with "
            "`minivlm data unpack`"
        )
    names = ["train", *shares]
    outs = {name: path.with_name(f"{path.stem}-{name}.jsonl") for name in names}
    for out in outs.values():
        check_output(out, [path], replace=False)
    if not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise InputError(f"the parts are {dict(shares)}: expected shares above 0, and less than 1 in all")
    lines = read_lines(path, partial(_read, known=set()), ("image",), warn)
    prints: dict[Path, Fingerprint] = {}
    for picture in watch(list(dict.fromkeys(picture for _, pictures in lines for picture in pictures))):
        prints[picture] = fingerprint(picture)
    part_of = _deal(
        _groups([[prints[one].content for one in pictures] for _, pictures in lines]), shares, seed
    )
    written: dict[str, list[bytes]] = {name: [] for name in names}
    for line, pictures in lines:
        written[part_of[prints[pictures[0]].content]].append(line)
    with ExitStack() as stack:
        for name, out in outs.items():
            temporary = stack.enter_context(write_aside(out))
            temporary.write_bytes(b"".join(line + b"\n" for line in written[name]))
    counts = Counter(part_of.values())
    parts = [Part(outs[name], len(written[name]), counts[name]) for name in names]
    apart = [
        (one, other)
        for one, other in look_alike(prints)
        if part_of[prints[one].content] != part_of[prints[other].content]
    ]
    return Divided(parts, apart)


def _read(line: bytes, number: int, folder: Path, known: set[Path]) -> tuple[bytes, list[Path]]:
    pictures = [folder / name for name in images_of(read_object(line, ("image",)))]
    for picture in pictures:
        check_picture(picture, known)
    return line.rstrip(b"\r"), pictures


def _groups(lines: Iterable[Sequence[str]]) -> list[list[str]]:
    """Contents that have to stay together, since a line shows both."""
    group_of: dict[str, list[str]] = {}
    for contents in lines:
        together = list(
            dict.fromkeys(one for content in contents for one in group_of.get(content, [content]))
        )
        group_of |= dict.fromkeys(together, together)
    return list({id(group): group for group in group_of.values()}.values())


def _deal(groups: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """The part of each content. Raises InputError: too few for a picture in each part."""

    def place(group: Sequence[str]) -> str:
        return hashlib.sha256(f"{seed} {min(group)}".encode()).hexdigest()

    waiting = sorted(groups, key=place)
    total = sum(map(len, groups))
    part_of: dict[str, str] = {}
    for name, share in shares.items():
        wanted = max(1, round(share * total))
        while wanted > 0 and waiting:
            group = waiting.pop(0)
            part_of |= dict.fromkeys(group, name)
            wanted -= len(group)
    if not waiting:
        raise InputError(
            f"there are {total} different pictures, too few for {len(shares) + 1} parts: ask for fewer or "
            "smaller parts"
        )
    return part_of | {content: "train" for group in waiting for content in group}
