"""Answers about your own pictures: hand-made ones get the scores that can be worked out with a pencil."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minivlm
from minivlm.data.samples import Sample, make_inputs, read_samples
from minivlm.evaluation.confusion import OTHER, confusions, confusions_as_text
from minivlm.evaluation.kinds import MOST_KINDS, OTHERS, kinds_of
from minivlm.evaluation.own import OwnAnswers, answer_own, own_metrics, score_of, surprise
from minivlm.evaluation.repeats import LONGEST_PATTERN, write_until_repeats
from minivlm.evaluation.tables import Metric
from minivlm.models.answering import MOST_REPEATS
from minivlm.processing import Box, boxes_to_text
from minivlm.world.questions import segmentation_text
from minivlm.world.scenes import COLORS, Thing

Lines = list[tuple[str, str, str]]  # prompt, true answer, answer


def given(lines: Lines) -> OwnAnswers:
    samples = [
        Sample(number, ("x.png",), (Path("x.png"),), prompt, wanted)
        for number, (prompt, wanted, _) in enumerate(lines, start=1)
    ]
    answers = [answer for *_, answer in lines]
    sureness = [[1.0] * answer.count("<loc") for answer in answers]
    sureness = [row[::4] for row in sureness]
    return OwnAnswers(samples, kinds_of([prompt for prompt, *_ in lines]), answers, sureness)


def boxes(*named: tuple[float, float, float, float, str]) -> str:
    return boxes_to_text([Box(*box) for box in named], 100, 100)


# Words


def test_exact_answers_by_kind_beside_the_most_frequent_one() -> None:
    lines = [
        ("what?", "cup", "cup"),
        ("what?", "cup", "can"),
        ("what?", "can", "can"),
        ("how many?", "1", "2"),
    ]
    assert own_metrics(given(lines)) == {
        "exact, all lines": Metric(0.5, 0.75, 4),
        "exact, what?": Metric(pytest.approx(2 / 3), pytest.approx(2 / 3), 3),
        "exact, how many?": Metric(0.0, 1.0, 1),
    }


def test_one_line_is_enough() -> None:
    assert own_metrics(given([("what?", "cup", "cup")])) == {"exact, all lines": Metric(1.0, 1.0, 1)}


def test_kinds_are_prompts_or_their_beginnings() -> None:
    assert kinds_of(["what is it?", "name it"] * 9) == ["what is it?", "name it"] * 9
    many = [f"what color is thing {number}?" for number in range(20)]
    found = [f"detect thing {number}" for number in range(20)]
    assert set(kinds_of([*many, *found, "caption en"])) == {"what color is ...", "detect ...", "caption en"}
    rare = [f"{chr(97 + number)} cat" for number in range(20)]
    kinds = kinds_of(["often so", "often this", *rare])
    assert len(set(kinds)) == MOST_KINDS
    assert kinds[:2] == ["often ..."] * 2
    assert OTHERS in kinds


def test_confusions() -> None:
    kinds = ["what?"] * 4 + ["caption"] * 2 + ["one"]
    wanted = ["cup", "cup", "a|b", "a|b", "a long sentence about things", "another", "x"]
    answers = ["cup", "a|b", "a|b", "fork", "", "", ""]
    tables = confusions(kinds, wanted, answers)
    assert tables == {"what?": {"a|b": {"a|b": 1, "cup": 0, OTHER: 1}, "cup": {"a|b": 1, "cup": 1, OTHER: 0}}}
    assert confusions_as_text(tables).splitlines()[2:] == [
        "| true \\ answered | a\\|b | cup | (other) |",
        "|---|---|---|---|",
        "| a\\|b | 1 | 0 | 1 |",
        "| cup | 1 | 1 | 0 |",
    ]


# Boxes and masks


def test_boxes_of_a_name_are_compared_with_each_other() -> None:
    """The same box under another name is no hit, and the constant is the mean box of each name."""
    cat, dog = boxes((0, 0, 50, 100, "cat")), boxes((50, 0, 100, 100, "dog"))
    lines = [("detect cat ; dog", cat, cat), ("detect cat ; dog", dog, boxes((50, 0, 100, 100, "cat")))]
    lines.append(("detect cat ; dog", "none", "none"))
    metrics = own_metrics(given(lines))
    assert metrics["box mean IoU"] == Metric(0.5, 1.0, 2)  # here the constant is as good as the truth
    assert metrics["box precision at 0.5"] == Metric(0.5, pytest.approx(2 / 6), 2)
    assert metrics["average precision at 0.5"].value == pytest.approx(0.5, abs=0.01)  # cat 1, dog 0
    assert metrics["nothing to detect"] == Metric(1.0, 0.0, 1)
    assert metrics["exact, all lines"].value == pytest.approx(2 / 3)


def test_no_boxes_no_rows_about_them() -> None:
    assert list(own_metrics(given([("what?", "cup", boxes((0, 0, 9, 9, "cup")))]))) == ["exact, all lines"]


def test_masks_are_compared_as_their_words_draw_them() -> None:
    thing = Thing("circle", "red", "large", 32.0, 32.0, 16.0, COLORS["red"])
    star = Thing("star", "red", "large", 32.0, 32.0, 16.0, COLORS["red"])
    wanted, other = segmentation_text([thing]), segmentation_text([star]).replace("star", "circle")
    right = own_metrics(given([("segment it", wanted, wanted)]))["mask mean IoU"]
    wrong = own_metrics(given([("segment it", wanted, other)]))["mask mean IoU"]
    assert right.value == 1
    assert 0.2 < wrong.value < 0.9
    assert 0.6 < right.baseline < 0.9  # the box of a circle, filled: pi / 4
    named = own_metrics(given([("segment it", wanted, wanted.replace("red circle", "moon"))]))
    assert named["mask mean IoU"].value == 0


def test_masks_stand_in_the_order_of_their_boxes_sureness() -> None:
    """Of two masks the wrong one is the surer. A box without a mask comes first, and is none of theirs."""
    thing = Thing("circle", "red", "large", 32.0, 32.0, 16.0, COLORS["red"])
    elsewhere = replace(thing, x=14.0, y=14.0, radius=8.0)
    wanted, wrong = segmentation_text([thing]), segmentation_text([elsewhere])
    bare = boxes((0, 0, 50, 100, "red circle"))

    def ap(sureness: list[float]) -> float:
        one = given([("segment it", wanted, f"{bare} ; {wrong} ; {wanted}")])
        return own_metrics(replace(one, sureness=[sureness]))["mask average precision at 0.5"].value

    assert ap([0.9, 0.1, 0.5]) == pytest.approx(1)
    assert ap([0.1, 0.9, 0.5]) == pytest.approx(1 / 2)


def test_scores_for_the_order_of_the_worst() -> None:
    whole, half = boxes((0, 0, 100, 100, "cat")), boxes((0, 0, 50, 100, "cat"))
    assert score_of("cup", "cup") == score_of(whole, whole) == 1
    assert score_of("cup", "cups") == score_of("none", whole) == score_of(whole, "none") == 0
    assert score_of(whole, half) == pytest.approx(0.5, abs=0.01)
    assert score_of(half, f"{half} ; {whole}") == 0.5  # one too many


# A model


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return minivlm.load()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, loaded: tuple[Any, Any]) -> list[Sample]:
    folder = tmp_path_factory.mktemp("own")
    for color in ("red", "blue"):
        picture = Image.new("RGB", (64, 64), (220, 220, 220))
        picture.paste(COLORS[color], (16, 16, 48, 48))
        picture.save(folder / f"{color}.png")
    lines = [
        {"image": f"{color}.png", "prefix": prompt, "suffix": answer}
        for color in ("red", "blue")
        for prompt, answer in (
            ("what color is the square?", color),
            ("what shape is the blue object?", "teapot"),
            (f"detect {color} square", boxes((25, 25, 75, 75, f"{color} square"))),
        )
    ]
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_samples(path, loaded[1], 512)


def test_a_model_is_asked(loaded: tuple[Any, Any], samples: list[Sample]) -> None:
    answered = answer_own(*loaded, samples, progress=False)
    metrics = own_metrics(answered)
    assert metrics["exact, what color is the square?"] == Metric(1.0, 0.5, 2)
    assert metrics["exact, what shape is the blue object?"].value == 0
    assert metrics["box recall at 0.5"].value >= 0.5
    assert [len(row) for row in answered.sureness] == [one.count("<loc") // 4 for one in answered.answers]
    again = answer_own(*loaded, samples[:2], batch_size=1, progress=False)
    assert list(again.answers) == list(answered.answers[:2])


def test_surprise_is_the_loss_of_each_line(loaded: tuple[Any, Any], samples: list[Sample]) -> None:
    losses = surprise(*loaded, samples, batch_size=4)
    for sample, loss in zip(samples, losses, strict=True):
        assert loss == pytest.approx(loaded[0](**make_inputs(loaded[1], [sample])).loss.item(), rel=1e-4)
    assert losses[1] > 2 > 0.2 > losses[0]


class Stuck:
    """Writes tokens that are told."""

    device = torch.device("cpu")

    def __init__(self, *rows: list[int]) -> None:
        self.rows = torch.tensor(rows)
        self.asked = 0

    def stream(self, max_new_tokens: int, **inputs: Any) -> Any:
        for column in self.rows.T[:max_new_tokens]:
            self.asked += 1
            yield column


@pytest.mark.parametrize("length", range(1, LONGEST_PATTERN + 1))
def test_a_batch_ends_once_every_row_repeats_itself(length: int) -> None:
    pattern = list(range(5, 5 + length))
    stuck: Any = Stuck([1, 2, 3, 4] + pattern * 50, [9, 8] + [0] * (2 + 50 * length))  # 0: padding
    written = write_until_repeats(stuck, 200, [])
    assert stuck.asked == written.shape[1] == max(4 + MOST_REPEATS * length, 2 + MOST_REPEATS)
    patient: Any = Stuck([5] * 60, [*range(1, 60), 0])
    assert write_until_repeats(patient, 60, []).shape == (2, 60)
    mask: Any = Stuck([5] * 30)
    assert write_until_repeats(mask, 20, [5, 6]).shape == (1, 20)
