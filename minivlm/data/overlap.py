"""Which lines of one file show a picture of another: a model that has learned it would look good on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from minivlm.data.samples import Sample
from minivlm.errors import InputError
from minivlm.processing.images import open_file


def overlap(samples: Sequence[Sample], learned: Sequence[Sample]) -> list[Sample]:
    """Those of `samples` that show a picture of `learned`, by whatever name: files with the same bytes.

    Copies that were saved again are not found here; `minivlm data split` compares pixels.
    """
    shown = {_content(path) for sample in samples for path in sample.paths}
    # What training shows may be in shards, and more than fits into memory.
    paths = (path for sample in learned for path in sample.paths) if shown else ()
    known = {content for path in paths if (content := _content(path)) in shown}
    return [sample for sample in samples if any(_content(path) in known for path in sample.paths)]


def name_overlap(shared: Sequence[Sample], most: int = 3) -> str:
    """For a message."""
    named = ", ".join(f"line {one.line} ({one.images[0]})" for one in shared[:most])
    return named + (f" and {len(shared) - most} more" if len(shared) > most else "")


@lru_cache(2**17)
def _content(path: Path) -> str:
    try:
        with open_file(path, "picture") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except InputError:  # gone since it was checked: its batch will say so
        return f"{path}"
