"""Answers about clips: what is asked, and what a perfect and a constant answer get."""

from __future__ import annotations

import pytest

from minivlm.evaluation import clips as evaluation
from minivlm.evaluation.clips import evaluate_clips, make_clip_questions
from minivlm.training.moving import build
from minivlm.world.clip_batches import CLIP_TASKS


def test_questions_are_the_same_for_the_same_seed_and_of_every_task() -> None:
    first, again, other = (make_clip_questions(12, seed) for seed in (1, 1, 2))
    assert [example for _, example in first] == [example for _, example in again]
    assert [example for _, example in first] != [example for _, example in other]
    assert {example.task for _, example in first} == set(CLIP_TASKS)
    assert {clip.fps for clip, _ in first} == {1, 2}
    at_three = make_clip_questions(4, frames=(6,), rates=(3,))
    assert {(clip.fps, clip.seconds) for clip, _ in at_three} == {(3, 2)}


def test_right_answers_count_and_wrong_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build("qwen2_vl", 0)

    def all_but_counts(*_: object, expected: list[str], **__: object) -> list[str]:
        return ["" if answer.isdigit() else answer for answer in expected]

    monkeypatch.setattr(evaluation, "answer_all", all_but_counts)
    table = evaluate_clips(model, processor, 12)
    assert table["direction"].value == table["caption"].value == 1.0
    assert table["count"].value == table["seconds"].value == 0.0
    assert 0.0 < table["presence"].baseline < 1.0
    assert table["caption"].cases == 12


def test_an_untrained_model_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = build("qwen2_5_vl", 0)
    table = evaluate_clips(model, processor, 2, tasks=("direction", "count"), progress=False)
    assert table.keys() == {"direction", "count"}
    assert capsys.readouterr().err == ""
