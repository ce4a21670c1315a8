"""bench/reasoning.py trains on rewards, and looks at what is looked at. Its numbers are not tested."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from minivlm.models.load import SHIPPED, load_answering
from minivlm.world.thinking import conclusion

BENCH = Path(__file__).parents[2] / "bench"
STORED = BENCH / "results" / "reasoning.txt"
NUMBERS = SHIPPED.parent / "reasoning.json"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        import reasoning

        yield reasoning
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("reasoning", None)
        sys.modules.pop("reasoning_tables", None)


@pytest.fixture
def short(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With a step of each kind, and few questions."""
    for name, few in {
        "ASKED": 6,
        "THOUGHT": 4,
        "OLD_SCENES": 1,
        "STEPS_OF_BIAS": 1,
        "ROWS_OF_BIAS": 2,
    }.items():
        monkeypatch.setattr(bench, name, few)
    few = {"prompts": 2, "group": 2, "rows": 2, "max_new_tokens": 4}
    steps = {"supervised_steps": 1, "rewarded_steps": 0}
    on_rewards = {"supervised_steps": 0, "rewarded_steps": 2}
    monkeypatch.setattr(
        bench,
        "RUNS",
        {
            "first": (None, {"task": "larger"} | few | steps),
            "second": ("first", {"task": "vertical", "think": True} | few | on_rewards),
        },
    )
    return bench


def test_runs_that_go_on_from_each_other(short: ModuleType, tmp_path: Path) -> None:
    first, second = (short.train(name, 0, tmp_path) for name in ("first", "second"))
    assert first["steps"] == 1
    assert first["stopped"] is None
    assert "curves" not in first
    assert second["curves"].keys() == {"step", *short.CURVES}
    assert second["faithfulness"]["right"]["cases"] == 4
    assert set(second["old"]) == {"questions", "captions", "boxes"}
    with safe_open(tmp_path / "second_0" / "state.safetensors", framework="pt") as state:
        assert json.loads(state.metadata()["config"])["model"] == str(tmp_path / "first_0")


def test_lessons_on_evidence_of_others(
    short: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run learns from the kinds of rows that its name says."""
    monkeypatch.setattr(short, "STEPS_ON_EVIDENCE", 1)
    monkeypatch.setattr(short, "ROWS_ON_EVIDENCE", 2)
    rows: list[Any] = []
    loss = short.conclusion_loss
    monkeypatch.setattr(short, "conclusion_loss", lambda *given: (rows.append(given[2]), loss(*given))[1])
    shutil.copytree(SHIPPED, tmp_path / "thinking_0")
    for name, kinds in short.ON_EVIDENCE.items():
        found = short.learn_from_evidence(name, 0, tmp_path)
        assert found["faithfulness"]["right"]["cases"] == 4
        assert found["steps"] == 1
        grays = [len(row.picture.getcolors(64 * 64) or ()) == 1 for row in rows.pop()]
        assert grays == [False, False] * ("exchanged" in kinds) + [True, True] * ("gray" in kinds)


def test_what_follows_from_exchanged_boxes(bench: ModuleType) -> None:
    for question in bench.make_composed("larger", 20, thinks=True):
        answer = bench.after_exchange(question)
        assert sorted(answer.split(" ; ")[:-1]) != sorted(question.example.suffix.split(" ; ")[:-1])
        assert {conclusion(answer), conclusion(question.example.suffix)} == {"yes", "no"}


def test_a_conclusion_alone_is_learned(bench: ModuleType) -> None:
    """Of an answer of many tokens, the loss is that of the last two: a word and the end."""
    model, processor = load_answering()
    question = bench.make_composed("larger", 1, thinks=True)[0]
    row = bench.as_shown(question, question.example.suffix)
    tokens, real = bench.answer_ids(processor, [row.prompt], [row.answer])
    logits = bench.answer_logits(model, processor, [row.picture], [row.prompt], tokens, real)
    end = torch.nn.functional.cross_entropy(logits[-2:], tokens[real][-2:])
    torch.testing.assert_close(bench.conclusion_loss(model, processor, [row]), end)


def test_what_a_star_is_asked(bench: ModuleType) -> None:
    for number in range(30):
        question = bench.star_question(np.random.default_rng(number), "train", bench.biased)
        (star,) = (thing for thing in question.scene.things if thing.shape == "star")
        assert question.example.suffix == star.color


def test_looking(short: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "STARS", 5)
    monkeypatch.setattr(short, "FADED", (0.3,))
    found = short.look("biased", 0, tmp_path)
    assert list(found) == ["0.3"]
    assert len(found["0.3"]) == 1 + 2 * len(short.ALPHAS)
    assert list(short.look("without bias", 0, tmp_path)["0.3"]) == ["plain"]


def test_every_run_begins_where_another_ended(bench: ModuleType) -> None:
    seen: set[str | None] = {None}
    for name, (start, changes) in bench.RUNS.items():
        assert start in seen
        bench.ReasoningConfig(**changes)
        seen.add(name)
    assert len({bench.folder_of(name, 0) for name in bench.UNITS}) == len(bench.UNITS)


def test_the_course_shows_what_is_stored(bench: ModuleType) -> None:
    results = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert list(results) == list(bench.UNITS)
    assert STORED.read_text(encoding="utf-8") == bench.as_text(results, bench.IN_TABLES) + "\n"
