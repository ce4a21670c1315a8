"""bench/mlp.py calls every way. Seconds are not tested."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import mlp

        yield mlp
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("mlp", None)


def test_the_table_has_a_line_for_each_case(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = [case._replace(hidden_size=16, intermediate_size=32, tokens=600) for case in bench.CASES[::2]]
    monkeypatch.setattr(bench, "CASES", small)
    monkeypatch.setattr(bench, "GIGABYTES", 1e-6)
    monkeypatch.setattr(sys, "argv", ["mlp.py", "--rounds", "2", "--out", str(tmp_path / "mlp.txt")])
    bench.main()
    lines = (tmp_path / "mlp.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in lines[-3:]] == [case.name.split(",")[0] for case in small]
    assert all("in place, pieces of 256" in line and "as used" in line for line in lines[-3:])
