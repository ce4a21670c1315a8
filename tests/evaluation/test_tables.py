"""The table: the same questions in every column, none of them from training, and each column what it says."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import randomize
from PIL import Image

from minivlm.errors import InputError
from minivlm.evaluation import answers, evaluate, make_questions, score
from minivlm.evaluation.answers import questions_of
from minivlm.evaluation.baselines import text_only_answers
from minivlm.evaluation.columns import CHANGES, COLUMNS, EVALUATION_STREAM
from minivlm.evaluation.scoring import Question
from minivlm.evaluation.tables import Metric, as_json, as_text
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.training.recipe import TrainingConfig, build
from minivlm.world.questions import TASKS, detection_text, segmentation_text
from minivlm.world.renderers import draw_with_matplotlib, find_browser
from minivlm.world.scenes import HELD_OUT_PAIRS, Scene

SAME_SCENES = [name for name in COLUMNS if name != "unseen_pairs"]
needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


# Questions


def test_questions_are_the_same_for_the_same_seed() -> None:
    first, again = make_questions(5, 1, "test", 32), make_questions(5, 1, "test", 32)
    assert [(q.scene, q.example) for q in first] == [(q.scene, q.example) for q in again]
    assert all(a.picture.tobytes() == b.picture.tobytes() for a, b in zip(first, again, strict=True))
    for other in (make_questions(5, 2, "test", 32), make_questions(5, 1, "unseen", 32)):
        assert not {q.scene for q in first} & {q.scene for q in other}
    # The first scenes stay the same when there are more.
    assert [q.example for q in make_questions(9, 1, "test", 32)][: len(first)] == [q.example for q in first]


def test_questions_ask_each_task_once_about_each_scene() -> None:
    asked = make_questions(50, 1, "test", 32)
    by_scene: dict[Scene, list[str]] = {}
    for q in asked:
        by_scene.setdefault(q.scene, []).append(q.example.task)
    assert len(by_scene) == 50
    assert all(len(set(tasks)) == len(tasks) for tasks in by_scene.values())
    assert {task for tasks in by_scene.values() for task in tasks} == set(TASKS)
    assert all(q.picture.size == (32, 32) for q in asked)
    assert all(q.picture.tobytes() == q.scene.draw(32).tobytes() for q in asked[::20])


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_evaluation_never_draws_from_a_stream_of_training(seed: int) -> None:
    """Same seed or not: the numbers that start a generator differ from all that training can use."""

    def start(*numbers: int) -> tuple[int, ...]:
        return tuple(np.random.SeedSequence(numbers).generate_state(4).tolist())

    last = TrainingConfig().total_steps
    training = {start(seed, step) for step in range(last)}
    assert len(training) == last
    streams = range(EVALUATION_STREAM, EVALUATION_STREAM + CHANGES + 1)
    evaluated = {start(seed, stream, number) for stream in streams for number in range(1000)}
    assert len(evaluated) == len(streams) * 1000
    assert training.isdisjoint(evaluated)
    # Zeros at the end make no difference, so it is the stream's number that keeps them apart.
    assert start(seed, 5, 0) == start(seed, 5)
    assert last < EVALUATION_STREAM


def test_evaluation_scenes_are_no_training_scenes() -> None:
    from minivlm.world.batches import SceneBatches

    drawn: list[Scene] = []

    class Spy(SceneBatches):
        def _batch(self, scenes: list[Scene], *rest: Any) -> Any:
            drawn.extend(scenes)

    _, processor = build(TrainingConfig())
    batches = Spy(processor, 8, seed=1, steps=40, pictures=50, questions=1)
    for step in range(40):
        batches[step]
    assert len({scene.things for scene in drawn}) == 2000
    places = {(thing.x, thing.y) for scene in drawn for thing in scene.things}
    evaluated = {q.scene for q in make_questions(500, 1, "test", 8)}
    assert places.isdisjoint((thing.x, thing.y) for scene in evaluated for thing in scene.things)


# Columns


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Question]]:
    """The questions of every column; those of the browser where there is one."""
    names = [name for name in COLUMNS if name != "browser" or find_browser() is not None]
    return {name: questions_of(COLUMNS[name], 60, 3, 64) for name in names}


def test_unseen_pairs_are_in_their_column_only(asked: dict[str, list[Question]]) -> None:
    for name, questions in asked.items():
        scenes = {q.scene for q in questions}
        has_pair = [bool(HELD_OUT_PAIRS & {(t.color, t.shape) for t in scene.things}) for scene in scenes]
        assert len(scenes) == 60
        assert all(has_pair) if name == "unseen_pairs" else not any(has_pair)
    sizes = [[len(q.scene.things) for q in asked[name]] for name in ("held_out", "unseen_pairs")]
    assert sizes[0] != sizes[1]  # other scenes, and not the same ones with other pairs


@pytest.mark.parametrize("name", SAME_SCENES)
def test_columns_ask_the_same_questions(name: str, asked: dict[str, list[Question]]) -> None:
    """With the same answers, but for boxes and masks of turned things."""
    if name not in asked:
        pytest.skip("there is no Chromium here")
    assert len(asked[name]) == len(asked["held_out"])
    moved = 0
    for q, plain in zip(asked[name], asked["held_out"], strict=True):
        assert (q.example.task, q.example.prefix) == (plain.example.task, plain.example.prefix)
        straight = [replace(thing, angle=0) for thing in q.scene.things]
        assert straight == list(plain.scene.things)
        assert (q.scene.noise, q.scene.noise_seed) == (plain.scene.noise, plain.scene.noise_seed)
        if name == "turned" and q.example.task in ("detect", "segment"):
            text = {"detect": detection_text, "segment": segmentation_text}[q.example.task]
            assert q.example.suffix == text(q.scene.find(q.example.prefix.split(" ", 1)[1]))
            assert all(thing in q.scene.things for thing in q.example.things)
            moved += q.example.suffix != plain.example.suffix
        else:
            assert q.example.suffix == plain.example.suffix
    assert moved > 30 if name == "turned" else moved == 0


def test_columns_look_as_they_are_called(asked: dict[str, list[Question]]) -> None:
    grounds = [q.scene.background for q in asked["other_grays"]]
    assert 40 <= min(grounds) < 50
    assert 150 < max(grounds) <= 160
    angles = [thing.angle for q in asked["turned"] for thing in q.scene.things]
    assert (min(angles), max(angles)) == (-15, 15)
    assert {q.scene.ground for q in asked["black"]} == {(0, 0, 0)}
    assert len({q.scene.ground for q in asked["tinted"]}) == len(
        {q.scene.noise_seed for q in asked["tinted"]}
    )
    for name, questions in asked.items():
        if name not in ("other_grays", "tinted", "black"):
            assert all(q.scene.background >= 165 for q in questions)
        assert name == "tinted" or not any(any(q.scene.tint) for q in questions)
    for name in ("held_out", "unseen_pairs", "other_grays", "tinted", "black", "turned", "text_only"):
        assert all(q.picture.tobytes() == q.scene.draw(64).tobytes() for q in asked[name][::25])
    scenes = [q.scene for q in asked["matplotlib"][::25]]
    drawn = draw_with_matplotlib(scenes, 64)
    assert [q.picture.tobytes() for q in asked["matplotlib"][::25]] == [one.tobytes() for one in drawn]
    for q in asked["jpeg"][::25]:
        file = io.BytesIO()
        q.scene.draw(64).save(file, format="JPEG", quality=50)
        assert np.array_equal(levels(q.picture), levels(Image.open(file)))


def test_other_programs_draw_other_pixels(asked: dict[str, list[Question]]) -> None:
    for name in ("jpeg", "matplotlib", "browser"):
        for q, plain in zip(asked.get(name, []), asked["held_out"], strict=False):
            difference = np.abs(levels(q.picture) - levels(plain.picture)).mean()
            assert 0.01 < difference < 12, name


# The table


@pytest.fixture(scope="module")
def untrained() -> tuple[PaliGemma, Processor]:
    config = replace(TrainingConfig(), image_size=16, tower_layers=1, text_layers=1)
    model, processor = build(config)
    randomize(model)  # larger weights, for answers that differ
    return model, processor


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Answers without a model: right about the first column, and to every later one wrong."""
    prompts_of: list[list[str]] = []

    def answer(model: Any, processor: Any, pictures: Any, prompts: Any, **options: Any) -> list[str]:
        prompts_of.append(prompts)
        assert all(picture.size == (16, 16) for picture in pictures)
        assert len(options["expected"]) == len(prompts)
        return options["expected"] if len(prompts_of) == 1 else ["?"] * len(prompts)

    monkeypatch.setattr(answers, "answer_all", answer)
    return prompts_of


def test_the_whole_table(
    untrained: tuple[PaliGemma, Processor], right: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "find_browser", lambda: None)  # test_renderers starts a real one
    table = evaluate(*untrained, scenes=6, seed=3, progress=False)
    assert list(table) == list(COLUMNS)
    shown = [name for name in table if table[name]]
    assert set(COLUMNS) - set(shown) <= {"browser"}
    assert table["held_out"]["all questions"].value == 1
    assert all(table[name]["all questions"].value == 0 for name in shown[1:-1])
    assert right[0] == [q.example.prefix for q in make_questions(6, 3, "test", 16)]
    assert right[1] == [q.example.prefix for q in make_questions(6, 3, "unseen", 16)]
    assert all(prompts == right[0] for prompts in right[2:])
    assert len(right) == len(shown) - 1  # text only is not the model's
    held_out = make_questions(6, 3, "test", 16)
    assert table["text_only"] == score(held_out, text_only_answers([q.example for q in held_out]))

    plain = json.loads(json.dumps(as_json(table)))
    assert plain["held_out"]["exact caption"] == {"value": 1.0, "majority": 0.1667, "cases": 6}
    assert list(plain) == list(table)
    assert list(plain["held_out"]) == list(table["held_out"])


def metrics(value: float, majority: float = 0.25, cases: int = 3) -> dict[str, Metric]:
    return {"color": Metric(value, majority, cases), "mask mean IoU": Metric(value / 2, 0.125, 7)}


def test_the_table_as_text() -> None:
    table = {name: metrics(number / 10, 0.25 + number) for number, name in enumerate(COLUMNS)}
    assert as_text(table).splitlines() == [
        "| | held-out scenes | unseen pairs | other grays | tinted grounds | on black | turned | JPEG "
        "| matplotlib | browser | majority | text only | cases |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| color | 0.000 | 0.100 | 0.200 | 0.300 | 0.400 | 0.500 | 0.600 | 0.700 | 0.800 | 0.250 "
        "| 0.900 | 3 |",
        "| mask mean IoU | 0.000 | 0.050 | 0.100 | 0.150 | 0.200 | 0.250 | 0.300 | 0.350 | 0.400 | 0.125 "
        "| 0.450 | 7 |",
    ]


def test_some_columns_as_text() -> None:
    assert as_text({"turned": metrics(0.5)}).splitlines() == [
        "| | turned | majority | cases |",
        "|---|---|---|---|",
        "| color | 0.500 | 0.250 | 3 |",
        "| mask mean IoU | 0.250 | 0.125 | 7 |",
    ]


def test_a_column_without_a_browser_is_left_out(
    untrained: tuple[PaliGemma, Processor], right: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "find_browser", lambda: None)
    table = evaluate(*untrained, scenes=2, columns=("held_out", "browser"), progress=False)
    assert table["browser"] == {}
    assert as_json(table)["browser"] == {}
    lines = as_text(table).splitlines()
    assert lines[0] == "| | held-out scenes | majority | cases |"
    assert lines[-2:] == [
        "",
        "The column browser is left out: no chromium, chromium-browser, google-chrome was found, and "
        "MINIVLM_CHROMIUM is not set.",
    ]
    assert "left out" not in as_text({"held_out": table["held_out"]})  # nobody asked for it


def test_a_browser_that_fails_does_so_before_any_answer(
    untrained: tuple[PaliGemma, Processor], right: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIVLM_CHROMIUM", "true")
    with pytest.raises(InputError, match="true drew nothing"):
        evaluate(*untrained, scenes=2, progress=False)
    monkeypatch.setenv("MINIVLM_CHROMIUM", "/no/such/program")
    with pytest.raises(InputError, match="which is not a program"):
        evaluate(*untrained, scenes=2, progress=False)
    assert right == []
    evaluate(*untrained, scenes=2, progress=False, columns=("held_out",))  # which does not need it
    assert len(right) == 1


def test_columns_of_another_name(untrained: tuple[PaliGemma, Processor]) -> None:
    with pytest.raises(
        InputError, match="there is no column 'heldout': choose from held_out, unseen_pairs, "
    ):
        evaluate(*untrained, scenes=2, columns=("held_out", "heldout"))


def test_one_column_costs_nothing_more(
    untrained: tuple[PaliGemma, Processor], right: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training run uses it: no browser is looked for, no training scene is drawn."""

    def refuse(*_: Any) -> Any:
        raise AssertionError

    for name in ("find_browser", "text_only_answers"):
        monkeypatch.setattr(answers, name, refuse)
    table = evaluate(*untrained, scenes=3, columns=("held_out",), progress=False)
    assert list(table) == ["held_out"]
    assert len(right) == 1


def test_boxes_are_scored_by_the_model(
    untrained: tuple[PaliGemma, Processor], right: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of `detect`, and each score stands with its answer."""
    passed: list[Any] = []

    def scores(model: Any, processor: Any, pictures: Any, prompts: Any, answers: Any) -> list[list[float]]:
        assert all(prompt.startswith("detect ") for prompt in prompts)
        assert len(pictures) == len(prompts) == len(answers)
        return [[float(len(prompt))] for prompt in prompts]

    def spy(questions: Any, answers: Any, sureness: Any) -> dict[str, Metric]:
        passed.extend(zip(questions, sureness, strict=True))
        return score(questions, answers)

    monkeypatch.setattr(answers, "box_scores", scores)
    monkeypatch.setattr(answers, "score", spy)
    evaluate(*untrained, scenes=4, columns=("held_out",), progress=False)
    assert len(passed) > 20
    for q, sureness in passed:
        assert sureness == ([len(q.example.prefix)] if q.example.task == "detect" else [])


def test_an_evaluation_is_deterministic(untrained: tuple[PaliGemma, Processor]) -> None:
    columns = ("held_out", "turned", "jpeg")
    first, again = (evaluate(*untrained, scenes=2, columns=columns, progress=False) for _ in range(2))
    assert first == again
