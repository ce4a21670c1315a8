"""bench/tuning_settings.py draws the same pictures every time, with true boxes, and keeps its results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from minivlm.processing import text_to_boxes
from minivlm.training.finetuning import FinetuningConfig

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import tuning_settings

        yield tuning_settings
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("tuning_settings", None)


@pytest.mark.parametrize(("name", "lines"), [("digits", (300, 100)), ("shapes", (120, 120))])
def test_the_same_set_every_time(
    bench: ModuleType, name: str, lines: tuple[int, int], tmp_path: Path
) -> None:
    first, again = bench.write_set(tmp_path / "1", name), bench.write_set(tmp_path / "2", name)
    for one, other, count in zip(first, again, lines, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert len(one.read_text().splitlines()) == count
    for path in (tmp_path / "1").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    answers = [json.loads(line)["suffix"] for line in first[1].read_text().splitlines()]
    assert len(set(answers)) == (10 if name == "digits" else 62)


def test_boxes_are_around_the_shapes(bench: ModuleType, tmp_path: Path) -> None:
    _, path = bench.write_set(tmp_path, "shapes")
    for line in map(json.loads, path.read_text().splitlines()):
        for box in text_to_boxes(line["suffix"], 64, 64):
            pixels = np.asarray(Image.open(tmp_path / line["image"]).convert("RGB")).astype(int)
            inside = (abs(pixels - pixels[0, 0]).sum(axis=2) > 30).nonzero()
            edges = (inside[1].min(), inside[0].min(), inside[1].max() + 1, inside[0].max() + 1)
            assert np.allclose(box[:4], edges, atol=1.5)


def test_settings_and_results(bench: ModuleType, tmp_path: Path) -> None:
    for setting in bench.SETTINGS.values():
        FinetuningConfig(**setting)
    kept = tmp_path / "digits, defaults"
    kept.mkdir()
    (kept / "result.json").write_text('{"exact": 0.4, "constant": 0.1}')
    results = {("digits", "defaults"): bench.result_of(tmp_path, "digits", "defaults")}
    assert bench.table(results).splitlines()[2] == "| digits | defaults | 0.40 | 0.10 |  |  |"
