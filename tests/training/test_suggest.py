"""Settings that are suggested are settings that can be trained with, and follow the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from minivlm.data.samples import Sample
from minivlm.training import suggest as suggesting
from minivlm.training.suggest import suggest, suggestions_as_text

BOX = "<loc0000><loc0000><loc1023><loc1023> cup"


def values(count: int, weights: float = 1e6, answer: str = "cup", measured: bool = True) -> dict[str, str]:
    samples = [Sample(n, ("x.png",), (Path("x.png"),), "p", answer) for n in range(count)]
    file = Path("v.jsonl") if measured else None
    return {one.option: one.value for one in suggest(samples, int(weights), file, knows_world=True)}


def test_few_lines_are_shown_more_often() -> None:
    assert values(300)["--epochs"] == "40"
    assert values(10)["--epochs"] == "60"
    assert values(100_000)["--epochs"] == "3"
    assert "--augment" in values(300)
    assert "--augment" not in values(5000)


def test_what_is_measured_follows_the_answers() -> None:
    assert values(300)["--best"] == "exact"
    assert values(300, answer=BOX)["--best"] == "iou"
    none = values(300, measured=False)
    assert none["--validation"] == "FILE.jsonl"
    assert not {"--best", "--patience", "--measure-every"} & none.keys()


def test_a_model_that_does_not_fit_gets_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suggesting, "free_memory", lambda device: 16_000_000_000)
    assert "--lora" not in values(300)
    large = values(300, weights=3e9)
    assert large["--lora"] == "16"
    assert "--lr" not in large
    assert int(large["--epochs"]) < 40


def test_one_line_each() -> None:
    text = suggestions_as_text(
        [suggesting.Suggestion("--lr", "1", "why"), suggesting.Suggestion("--best", "iou", "")]
    )
    assert text == "  --lr 1      why\n  --best iou  "
