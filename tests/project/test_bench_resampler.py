"""bench/resampler.py trains readers behind frozen features. Its numbers are not tested."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import resampler

        yield resampler
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("resampler", None)


def test_a_run_and_its_table(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HELD_OUT", 4)
    found = bench.run(0, steps=2, scenes=16)
    assert found.keys() == set(bench.TRIALS)
    assert all(0.0 <= share <= 1.0 for pair in found.values() for share in pair)
    told = bench.as_text([dict.fromkeys(found, (0.25, 0.5)), dict.fromkeys(found, (0.75, 0.5))])
    table = [line for line in told.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(bench.TRIALS)
    assert all("| 0.50 (0.25 to 0.75) | 0.50 (0.50 to 0.50) |" in line for line in table[2:])


def test_boxes_overlap(bench: ModuleType) -> None:
    box, half, apart = torch.tensor([[0, 0, 2, 2], [0, 0, 1, 2], [3, 3, 4, 4]]).float()
    assert bench.overlap(box, torch.stack([box, half, apart])).tolist() == [1.0, 0.5, 0.0]


def test_scenes_have_no_color_twice(bench: ModuleType) -> None:
    scenes = bench.distinct_scenes(20, 0)
    shapes, boxes = bench.labels_of(scenes)
    assert (shapes > 0).sum(dim=1).tolist() == [len(scene.things) for scene in scenes]
    assert torch.equal(boxes.sum(dim=2) > 0, shapes > 0)


def test_the_notebook_repeats_the_stored_table(bench: ModuleType) -> None:
    stored = (BENCH / "results" / "resampler.txt").read_text(encoding="utf-8")
    cells = read_cells(ROOT / "notebooks" / "15_qwen_vl.ipynb")
    prose = "\n".join(cell.source for cell in cells if cell.kind == "markdown")
    for name in bench.TRIALS:
        (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", stored, re.MULTILINE)
        assert row in prose
