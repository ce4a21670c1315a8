"""From a file of lines to shards, and back. The form is described in shards.py.

Lines about the same pictures become one sample, so that each picture is written once. Samples come in random
order: a file often has one class after the other, and a shuffle buffer mixes only what lies close together.
Names, times and owners of the files are left behind, so equal lines give equal tars.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.data.annotated import picture_endings, usual_ending
from minivlm.data.lines import BadLines, check_picture, read_lines
from minivlm.data.objects import images_of, read_object
from minivlm.data.shards import folder_of, is_shards
from minivlm.errors import InputError
from minivlm.files import check_output, folder_aside, write_aside
from minivlm.processing.images import open_file, open_header

Line = tuple[dict[str, Any], tuple[Path, ...]]  # what it says, and its pictures


@dataclass(frozen=True)
class Written:
    """What became of a file."""

    lines: int
    pictures: int
    tars: int


def write_shards(
    path: Path,
    out: Path,
    size: int = 1000,
    seed: int | None = 0,
    warn: Callable[[BadLines], object] | None = None,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Written:
    """Write the lines of a JSONL file and their pictures into a new folder of tars.

    Args:
        size: samples in a tar.
        seed: of the order of samples; None: as in the file.
        warn: told about bad lines, which are then left out; without it they are refused.
        watch: iterates over the tars, and may show how far it is.

    Raises:
        BadLines: a line is no object, or its picture is missing or damaged.
        InputError: the file cannot be read; the folder exists or cannot be written.
    """
    if os.path.lexists(out):  # said before the work
        raise InputError(f"{out} exists: choose another folder, or remove it first")
    if is_shards(path):
        raise InputError(f"{path} is shards already: name a file with lines of JSON")
    lines = read_lines(path, partial(_read, known=set()), ("image",), warn)
    by_pictures: dict[tuple[Path, ...], list[dict[str, Any]]] = {}
    for values, pictures in lines:
        by_pictures.setdefault(pictures, []).append(values)
    samples = list(by_pictures.items())
    if seed is not None:
        samples = [samples[n] for n in np.random.default_rng(seed).permutation(len(samples)).tolist()]
    starts = range(0, len(samples), size)
    with folder_aside(out) as folder:
        for number, start in enumerate(watch(starts)):
            with tarfile.open(folder / f"{path.stem}-{number:06d}.tar", "w") as tar:
                for key, (pictures, about) in enumerate(samples[start : start + size], start=start):
                    _add_sample(tar, f"{key:08d}", pictures, about)
    return Written(len(lines), sum(len(pictures) for pictures, _ in samples), len(starts))


def _read(line: bytes, number: int, folder: Path, known: set[Path] | None) -> Line:
    """A line, checked unless `known` is None. Raises InputError: as `read_object` and `check_picture`."""
    values = read_object(line, ("image",))
    pictures = tuple(folder / name for name in images_of(values))
    if known is not None:
        for picture in pictures:
            check_picture(picture, known)
    _as_json(values)
    return values, pictures


def _as_json(values: object) -> bytes:
    """Raises InputError: it holds what UTF-8 cannot."""
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError("its text contains half a surrogate pair: change it") from error


def _add_sample(
    tar: tarfile.TarFile, key: str, pictures: Sequence[Path], lines: Sequence[dict[str, Any]]
) -> None:
    names = []
    for number, picture in enumerate(pictures):
        names.append(f"{key}{f'.{number:02d}' * (len(pictures) > 1)}{_ending(picture)}")
        with open_file(picture, "picture") as file:
            _add(tar, names[-1], file.read())
    image = names if len(names) > 1 else names[0]
    written = [values | {"image": image} for values in lines]
    _add(tar, f"{key}.json", _as_json(written if len(written) > 1 else written[0]))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # of nobody, from 1970
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _ending(picture: Path) -> str:
    """That of the file, or if it says nothing, one for what is in it."""
    own = picture.suffix.lower()
    if own in picture_endings():
        return own
    with open_header(picture) as image:
        return usual_ending(image.format)


def write_lines(
    path: Path,
    out: Path,
    warn: Callable[[BadLines], object] | None = None,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Written:
    """Write the lines of shards into a new JSONL file, and their pictures into a new folder beside it.

    Of my.jsonl, the folder is my-pictures, with a folder for each tar.

    Args:
        warn: as in `write_shards`.
        watch: iterates over the lines, and may show how far it is.

    Raises:
        BadLines: as `write_shards`; a picture without lines, or lines without a picture.
        InputError: there are no shards, or they are damaged; the file or the folder exists.
    """
    if not is_shards(path):
        raise InputError(f"{path} is no shards: name a folder of tars, a tar, or a pattern of tars")
    check_output(out, replace=False)
    folder, pictures = folder_of(path), out.with_name(f"{out.stem}-pictures")
    lines = read_lines(path, partial(_read, known=set()), ("image",), warn, again=partial(_read, known=None))
    tars, count = set(), 0
    with write_aside(out) as temporary, folder_aside(pictures) as aside, temporary.open("wb") as file:
        for values, paths in watch(lines):
            names = []
            for picture in paths:
                tar, *inner = picture.relative_to(folder).parts
                name = Path(tar).with_suffix("").joinpath(*inner)
                names.append((pictures.name / name).as_posix())
                tars.add(tar)
                if not (aside / name).exists():
                    (aside / name).parent.mkdir(parents=True, exist_ok=True)
                    with open_file(picture, "picture") as content:
                        (aside / name).write_bytes(content.read())
                    count += 1
            file.write(_as_json(values | {"image": names if len(names) > 1 else names[0]}) + b"\n")
    return Written(len(lines), count, len(tars))
