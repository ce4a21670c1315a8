"""bench/experts.py trains a small mixture of experts. What it finds is not tested."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import minivlm

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import experts

        yield experts
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("experts", None)


def test_a_run_and_its_table(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PICTURES", 2)
    found = bench.rounded(bench.run(0, steps=1, measured=1))
    names = ["untrained", *bench.VARIANTS]
    assert list(found["variants"]) == list(found["routes"]) == names
    for measured in found["variants"].values():
        assert len(measured["load"]) == len(measured["information"]) == 4
        assert all(sum(shares) == pytest.approx(1, abs=0.01) for shares in measured["load"])
        assert all(0 <= bits <= 2 for bits in measured["information"])
    for routes in found["routes"].values():
        assert [len(layer) for layer in routes] == [64 + len(found["words"])] * 4
    table = [line for line in bench.as_text([found]).splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == names


def test_information(bench: ModuleType) -> None:
    """Nothing, if each kind goes everywhere; all of it, if each has an expert of its own."""
    kinds = torch.arange(4).repeat_interleave(4)
    assert bench.information(kinds, torch.arange(4).repeat(4)) == pytest.approx(0, abs=1e-6)
    assert bench.information(kinds, kinds) == pytest.approx(2)
    assert bench.information(kinds, kinds // 2) == pytest.approx(1)
    uneven = torch.tensor([0, 0, 0, 1]), torch.tensor([2, 2, 2, 3])
    entropy = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)
    assert bench.information(*uneven) == pytest.approx(entropy)


def test_the_table_is_that_of_the_stored_numbers(bench: ModuleType) -> None:
    path = Path(minivlm.__file__).parent / "assets" / "experts.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert tuple(stored["kinds"]) == bench.KINDS
    assert len(stored["seeds"]) == len(bench.SEEDS)
    table = (BENCH / "results" / "experts.txt").read_text(encoding="utf-8")
    assert bench.as_text(stored["seeds"]) + "\n" == table
