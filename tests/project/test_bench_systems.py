"""bench/systems.py trains, goes on, measures and makes its table. What the numbers are, is not tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from minivlm.training.systems import SystemConfig
from minivlm.training.ways import WAYS

BENCH = Path(__file__).parents[2] / "bench"
SMALL = SystemConfig("clipcap", text_steps=1, steps=1, text_rows=2, rows=2, warmup_steps=1)


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import systems

        yield systems
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("systems", None)


def test_a_run_is_done_once(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run(SMALL, tmp_path / "run", scenes=2)
    assert first["text loss before"] == first["text loss after"] > 1  # the language model is frozen
    assert 0 <= first["all questions"] <= 1
    monkeypatch.setattr(bench, "train_system", lambda *_, **__: pytest.fail("trained again"))
    assert bench.run(SMALL, tmp_path / "run", scenes=2) == first
    with pytest.raises(SystemExit, match="holds a run with other numbers"):
        bench.run(SMALL, tmp_path / "run", scenes=3)


def test_costs_are_of_the_way(bench: ModuleType) -> None:
    small, large = bench.costs(SMALL), bench.costs(SystemConfig("clipcap-mlp", warmup_steps=1))
    assert small["trainable"] < large["trainable"]  # the language model learns, too
    assert 0 < small["answer"] < small["step"] < large["step"]


def test_the_table(bench: ModuleType, tmp_path: Path) -> None:
    result = bench.run(SMALL, tmp_path / "run", scenes=2)
    other = json.loads(json.dumps(result))
    other["config"] |= {"seed": 1}
    other["color"] = result["color"] + 0.5
    lines = bench.as_text([result, other]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| clipcap", "| majority"]
    middle, low = result["color"] + 0.25, result["color"]
    assert f"{middle:.2f} ({low:.2f}-{low + 0.5:.2f})" in lines[2]
    assert lines[2].endswith("| 2 |")
    assert set(WAYS) >= {"clipcap"}
