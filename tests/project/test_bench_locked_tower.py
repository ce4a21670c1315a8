"""bench/locked_tower.py trains towers of one size and makes its table. Its numbers are not tested."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import locked_tower

        yield locked_tower
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("locked_tower", None)


def test_a_run_and_its_table(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivlm.training.contrastive.MEASURED_SCENES", 4)
    found = bench.run(0, steps=2)
    assert found.keys() == set(bench.TRIALS)
    assert all(0.0 <= share <= 1.0 for share in found.values())
    told = bench.as_text([dict.fromkeys(found, 0.25), dict.fromkeys(found, 0.75)])
    table = [line for line in told.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(bench.TRIALS)
    assert all("| 0.50 | 0.25 to 0.75 |" in line for line in table[2:])


def test_towers_of_another_size_are_no_control(bench: ModuleType) -> None:
    with pytest.raises(AssertionError, match="hidden_size=48"):
        bench.check_sizes(bench.ContrastiveConfig(steps=200, tower_width=48))
