"""bench/attention.py calls every form, and says which one the package takes. Seconds are not tested."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import attention

        yield attention
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("attention", None)


@pytest.mark.parametrize(("backward", "expected"), [(True, "plain"), (False, "fused")])
def test_the_form_that_is_taken_is_named(bench: ModuleType, backward: bool, expected: str) -> None:
    case = bench.Case("small", B=2, H=4, K=1, T=3, S=5, Dh=8, prefix=2)
    assert bench.taken(case, torch.float32, backward) == expected
    times = bench.measure(bench.work(case, torch.float32, backward), rounds=3)
    assert [len(form) for form in times] == [3] * len(bench.FORMS)


def test_the_table_has_a_line_for_each_case(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CASES", bench.CASES[2:4])
    monkeypatch.setattr(sys, "argv", ["attention.py", "--rounds", "3"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert "bf16 instructions" in lines[0]
    assert [line.split(" | ")[0] for line in lines if " forward" in line] == (
        ["| tiny decoder, one picture"] * 4 + ["| tiny decoder, next token"] * 2
    )
