"""What is said while it takes long, by a clock that the test moves."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import pytest

import minivlm
from minivlm.evaluation import answers
from minivlm.evaluation.waiting import Bar, duration, evenly_spread


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def add(seconds: float) -> None:
        now[0] += seconds

    return add


def wait(
    monkeypatch: pytest.MonkeyPatch,
    tick: Callable[[float], None],
    err: io.StringIO,
    seconds: float,
    items: int,
    **options: object,
) -> str:
    """What is said while each item takes so long."""
    monkeypatch.setattr(sys, "stderr", err)
    bar = Bar(range(items), unit="step", **options)  # type: ignore[arg-type]
    with bar:
        assert [(item, tick(seconds))[0] for item in bar] == list(range(items))
    return err.getvalue()


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tick: Callable[[float], None]
) -> None:
    lines = wait(monkeypatch, tick, io.StringIO(), 2, 100, label="JPEG").splitlines()
    assert lines[0] == "minivlm: at this pace, it takes about 3 minutes on this machine"
    assert lines[1] == "minivlm: JPEG: step 15 of 100, about 3 minutes left"
    assert 5 <= len(lines) <= 8  # 200 seconds
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_losses_are_in_the_lines(monkeypatch: pytest.MonkeyPatch, tick: Callable[[float], None]) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    bar = Bar(range(4), unit="step", rounds=0)
    for _ in bar:
        tick(40)
        bar.set_postfix(loss=0.5)
    lines = err.getvalue().splitlines()
    assert lines[0] == "minivlm: step 2 of 4, loss=0.5, about 80 seconds left"
    assert len(lines) == 3


def test_what_is_short_is_not_told(monkeypatch: pytest.MonkeyPatch, tick: Callable[[float], None]) -> None:
    assert wait(monkeypatch, tick, io.StringIO(), 0.2, 100) == ""
    assert wait(monkeypatch, tick, io.StringIO(), 5, 100, progress=False) == ""


@pytest.mark.parametrize(("rounds", "told"), [(0, None), (1, "3 minutes"), (7, "23 minutes")])
def test_a_bar_on_a_terminal_with_an_estimate(
    rounds: int, told: str | None, monkeypatch: pytest.MonkeyPatch, tick: Callable[[float], None]
) -> None:
    shown = wait(monkeypatch, tick, Terminal(), 2, 100, rounds=rounds)
    assert "100/100" in shown
    assert ("at this pace" in shown) == (told is not None)
    assert told is None or f"about {told} on this machine" in shown


def test_what_was_done_before_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tick: Callable[[float], None]
) -> None:
    """A run that is resumed."""
    said = wait(monkeypatch, tick, io.StringIO(), 3, 50, initial=9950, total=10_000)
    assert said.startswith("minivlm: at this pace, it takes about 2 minutes on this machine\n")
    assert " of 10000, about" in said


def test_the_first_column_says_how_long_all_take(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def spy(items: list[int], label: str, **options: object) -> list[int]:
        asked.append((label, options["rounds"]))
        return items

    monkeypatch.setattr(answers, "Bar", spy)
    answers.evaluate(*minivlm.load(), scenes=1, columns=("text_only", "held_out", "jpeg"))
    assert asked == [("held-out scenes", 2), ("JPEG", 0)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 seconds"), (119, "119 seconds"), (1500, "25 minutes"), (86400, "24 hours")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("count", [0, 1, 2, 10, 283])
def test_the_beginning_has_some_of_everything(count: int) -> None:
    order = evenly_spread(count)
    assert sorted(order) == list(range(count))
    if count == 283:
        first = sorted(order[:10])
        assert max(b - a for a, b in zip([0, *first], [*first, count], strict=True)) < 60
