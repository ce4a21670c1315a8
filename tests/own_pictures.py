"""Small pictures on disk, and the lines that a source becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minivlm.data.annotated import Source
from minivlm.data.converting import LineForm, Report, convert

# 10, 10, 60, 40 in a picture of 100 x 50: y0 x0 y1 x1 of 1023
BOX = "<loc0205><loc0102><loc0818><loc0614>"


def save_pictures(folder: Path, *names: str, size: tuple[int, int] = (100, 50), turn: int = 1) -> None:
    """Pictures of noise, of which no two are alike. `turn`: the orientation that EXIF notes."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(pixels).save(path, exif=exif)


def lines_of(source: Source, out: Path, **wishes: Any) -> tuple[list[dict[str, str]], Report]:
    """What `convert` writes. The task is that of the source, unless it is said."""
    report = convert(source, LineForm(**{"task": source.task} | wishes), out)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]], report


def reasons(report: Report) -> dict[str, str]:
    """Why each bad entry is bad, by its name."""
    return {one.name: one.reason for one in report.bad}
