"""bench/losses.py measures what it says, and its parts run. How fast anything is, is not tested."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from minivlm import distributed

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """bench/losses.py, imported as it is run: with its folder on the path."""
    sys.path.insert(0, str(BENCH))
    try:
        import losses

        yield losses
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("losses", None)
        sys.modules.pop("attention", None)


def test_memory_is_that_of_the_loss(bench: ModuleType) -> None:
    """At 2,048 pairs a matrix has 16 MiB: far above what a process grows by itself."""
    n = 2048
    matrix = 4 * n * n
    costs = {name: distributed.run(1, "losses:measure", name, n)[0] for name in bench.LOSSES}
    # A process may grow by more than the loss needs, as far as its allocator likes.
    assert bench.MATRICES - 1.5 < costs["softmax"].bytes / matrix < bench.MATRICES + 4
    assert bench.MATRICES - 1 < costs["sigmoid"].bytes / matrix < bench.MATRICES + 4
    assert costs["chunked sigmoid"].bytes / matrix < 2
    for cost in costs.values():
        assert min(cost.seconds) > 0
        assert len(cost.seconds) <= bench.ROUNDS


def test_what_does_not_fit_is_left_out(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.free_bytes() > 2**20
    monkeypatch.setattr(bench, "free_bytes", lambda: 2**30)
    assert bench.fits("sigmoid", 4096)
    assert not bench.fits("sigmoid", 8192)
    assert not bench.fits("softmax", 8192)
    assert bench.fits("chunked sigmoid", 10**6)
    assert "left out: needs about 2 GiB, 1 are free" in bench.row("sigmoid", 8192, None)


def test_table_and_figure(bench: ModuleType, tmp_path: Path) -> None:
    costs = [
        bench.Cost(name, batch, (1e-6 * batch, 2e-6 * batch, 4e-6 * batch), 4 * batch**2)
        for name in bench.LOSSES
        for batch in (1024, 2048)
    ]
    lines = [bench.row(cost.name, cost.batch, cost) for cost in costs]
    assert lines[0] == "| 1,024 | softmax | 2.0 (1.0 to 4.1) | 4.0 | 1.00 |"
    lines += [*bench.HEADING.splitlines(), bench.row("sigmoid", 10**6, None)]
    assert len({line.count("|") for line in lines}) == 1
    bench.draw(costs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 5000
