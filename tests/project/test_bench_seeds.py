"""bench/seeds.py gives cells other seeds, and says which claims do not hold with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import seeds

        yield seeds
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("seeds", None)


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("torch.manual_seed(0)", "torch.manual_seed(3)"),
        ("rng = np.random.default_rng(0)", "rng = np.random.default_rng(3)"),
        ("rng = np.random.default_rng([SMALL.seed, step])",) * 2,
        ('draw("train", seed=0, count=3000)', 'draw("train", seed=300, count=3000)'),
        ('draw("test", seed=1, count=400)',) * 2,
        ("TrainingConfig(\n    image_size=48,", "TrainingConfig(seed=3, \n    image_size=48,"),
        ("TrainingConfig()",) * 2,
    ],
)
def test_a_cell_gets_another_seed(bench: ModuleType, source: str, other: str) -> None:
    assert bench.reseeded(source, 3) == other


def test_every_claim_is_a_cell_that_prints_and_depends_on_a_seed(bench: ModuleType) -> None:
    for name, cells in bench.CLAIMS.items():
        notebook = nbformat.read(bench.NOTEBOOKS / f"{name}.ipynb", as_version=4)
        texts = bench.printed(notebook)
        assert all(texts[cell].strip() for cell in cells)
        sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert any(bench.reseeded(source, 1) != source for source in sources)


def test_what_differs_is_shown(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [new_output("stream", name="stdout", text="seed 0\nsame\n")]
    claim = new_code_cell('print("seed", seed)\nprint("same")', id="a", outputs=stored)
    failing = new_code_cell("1 / 0", id="b", metadata={"tags": ["check"]})
    seeding = new_code_cell("import random\nmanual_seed = lambda n: n\nseed = manual_seed(0)", id="c")
    nbformat.write(new_notebook(cells=[seeding, claim, failing]), tmp_path / "00_x.ipynb")
    monkeypatch.setattr(bench, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(bench, "CLAIMS", {"00_x": ("a",)})
    bench.main(["--notebooks", "00_x", "--seeds", "1", "--out", str(tmp_path / "seeds.txt")])
    assert (tmp_path / "seeds.txt").read_text().splitlines() == [
        "## 00_x, seed 0 and 1",
        "",
        "a  differs  seed 0",
        "                seed 1: seed 1",
        "a  same     same",
    ]
