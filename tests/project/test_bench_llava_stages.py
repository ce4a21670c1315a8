"""bench/llava_stages.py trains its trials and makes its table. What the numbers are, is not tested."""

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
        import llava_stages

        yield llava_stages
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("llava_stages", None)


def test_a_run_and_its_table(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PICTURES": 6,
        "HELD_OUT": 3,
        "TEXT": 2,
        "ALIGN": 2,
        "TOGETHER": 2,
        "ROWS": 2,
    }.items():
        monkeypatch.setattr(bench, name, value)
    found = bench.run(0)
    assert found.keys() == set(bench.TRIALS)
    assert len({losses["own"] for losses in found.values()}) == len(found)  # every trial is another one
    other = {trial: {"own": losses["own"], "other": losses["own"]} for trial, losses in found.items()}
    lines = bench.as_text([found, other]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(bench.TRIALS)
    assert len({line.count("|") for line in table}) == 1
