"""bench/fine_tuning.py trains the shipped model in several ways. Its numbers are not tested."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from minivlm.models.load import SHIPPED

BENCH = Path(__file__).parents[2] / "bench"
STORED = BENCH / "results" / "fine_tuning.json"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import fine_tuning

        yield fine_tuning
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("fine_tuning", None)


def test_a_run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", 8)
    monkeypatch.setattr(bench, "HELD_OUT", 4)
    monkeypatch.setattr(bench, "OLD_SCENES", 1)
    found = bench.run(4, 0, steps=1)
    assert 0 <= found["new"] <= 1
    assert 0 <= found["old"] <= 1
    assert found["trained"] == 4 * bench.trained_numbers(bench.prepare(1, 0)[0])


def test_what_is_trained(bench: ModuleType) -> None:
    projector, decoder, everything = (
        bench.trained_numbers(bench.prepare(way, 0)[0]) for way in ("projector", "decoder", "everything")
    )
    assert projector < decoder < everything
    assert everything == sum(weight.numel() for weight in bench.load()[0].parameters())


def test_the_table(bench: ModuleType) -> None:
    runs = [{"trained": 1000, "new": 0.25, "old": 0.5}, {"trained": 1000, "new": 0.75, "old": 0.5}]
    assert "| the decoder | 1,000 | 0.50 (0.25 to 0.75) | 0.50 (0.50 to 0.50) |" in bench.as_text(
        {"the decoder": runs}
    )


def test_the_course_shows_what_is_stored(bench: ModuleType) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert json.loads((SHIPPED.parent / "fine_tuning.json").read_text(encoding="utf-8")) == stored
    assert list(stored["ways"]) == [bench.name_of(way) for way in bench.WAYS]
    assert list(stored["curves"]) == list(bench.CURVES)
    assert STORED.with_suffix(".txt").read_text(encoding="utf-8") == bench.as_text(stored["ways"]) + "\n"
