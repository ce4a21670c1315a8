"""The checks of 14_llava accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.processing.tiles import GRIDS

EXERCISES = ("predict_loss", "label_chat", "two_stages", "choose_grid", "find_fault")
llava = checks.llava


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def changed(name: str, *replacements: tuple[str, str]) -> Callable[..., Any]:
    """A solution with some of its code replaced, as somebody could have written it."""
    source = textwrap.dedent(inspect.getsource(getattr(llava.solutions, name)))
    source = source.removeprefix("@staticmethod\n")
    for old, new in replacements:
        assert old in source, old
        source = source.replace(old, new)
    scope = dict(vars(llava)) | {"torch": torch}
    exec(source, scope)
    function: Callable[..., Any] = scope[name]
    return function


def refused(exercise: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(llava, exercise)(answer)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_solutions_are_accepted(exercise: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(llava, exercise)(getattr(llava.solutions, exercise))
    assert capsys.readouterr().out.startswith("Right: ")


@pytest.mark.parametrize("exercise", EXERCISES)
def test_blanks_and_missing_returns(exercise: str) -> None:
    refused(exercise, blank, "still blank")
    refused(exercise, lambda *args, **kwargs: None, "returns nothing")


# Exercise 1


@pytest.mark.parametrize("name", llava.solutions.predict_loss())
def test_each_wrong_prediction_is_explained(name: str) -> None:
    truth = llava.solutions.predict_loss()
    answer = truth | {name: not truth[name]}
    with pytest.raises(NotYet) as error:
        llava.predict_loss(lambda: answer)
    count, *lines = str(error.value).splitlines()
    assert count == f"{len(truth) - 1} of {len(truth)} predictions are right"
    assert lines == [f"  {name}: {llava.WHY[name]}"]


def test_predictions_of_another_form() -> None:
    truth = llava.solutions.predict_loss()
    refused("predict_loss", lambda: list(truth), "the dict of predictions, not a list")
    without = dict(list(truth.items())[1:])
    refused("predict_loss", lambda: without, "True or False for: stage one: the picture$")
    refused("predict_loss", lambda: dict.fromkeys(truth, 1), "predict True or False for: ")


# Exercise 2

QUESTION_LOST = ("*[-100] * len(question)", "*question")
LABELS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "no end of an answer": (
        (
            (" *answer, end]\n        labels", " *answer]\n        labels"),
            ("*answer, end]\n    return", "*answer]\n    return"),
        ),
        "no answer ends with </s>",
    ),
    "the last end only": (
        (
            (" *answer, end]\n        labels", " *answer]\n        labels"),
            ("*answer, end]\n    return ids", "*answer]\n    return [*ids, end]"),
        ),
        "only the last answer ends with </s>",
    ),
    "an opening for each turn": (
        (("ids += [*question", "ids += [*(opening if len(ids) > 4 else []), *question"),),
        "the opening stands before every turn",
    ),
    "no opening": (
        (("ids, labels = list(opening), [-100] * len(opening)", "ids, labels = [], []"),),
        "opening is missing",
    ),
    "the answer first": (
        (("[*question, *answer, end]", "[*answer, *question, end]"),),
        "in another order: opening, question, answer, end",
    ),
    "a loss everywhere": (
        (QUESTION_LOST, ("[-100] * len(opening)", "list(opening)")),
        "every token has a loss",
    ),
    "a loss on questions": ((QUESTION_LOST,), "questions have a loss: the model would learn to ask"),
    "no loss on the end": (
        (("*answer, end]\n    return", "*answer, -100]\n    return"),),
        "the end of an answer has no loss",
    ),
    "zeros": ((("-100", "0"),), "0 is the id of a token"),
    "a label missing": (
        (("*answer, end]\n    return", "*answer]\n    return"),),
        "there are 19 ids and 16 labels",
    ),
    "the last answer only": (
        (("return ids, labels", "return ids, [-100] * (len(ids) - 4) + labels[-4:]"),),
        "only the last answer has a loss",
    ),
    "all after the first question": (
        (("return ids, labels", "return ids, [-100] * 7 + ids[7:]"),),
        "later questions too",
    ),
    "shifted": ((("return ids, labels", "return ids, [*labels[1:], -100]"),), "shifted already"),
    "late": ((("return ids, labels", "return ids, [-100, *labels[:-1]]"),), "one place too late"),
    "one answer without": (
        (("return ids, labels", "return ids, [*labels[:7], -100, *labels[8:]]"),),
        "place 7 is part of an answer, its label is -100, and should be 20",
    ),
    "changes its argument": ((("list(opening)", "opening"),), "changes the lists that it was given"),
    "ids alone": ((("return ids, labels", "return ids"),), "return two lists"),
    "another word": ((("*answer, end]\n        labels", "*answer, 3]\n        labels"),), "the ids are"),
}


@pytest.mark.parametrize("name", LABELS)
def test_wrong_labels(name: str) -> None:
    replacements, hint = LABELS[name]
    refused("label_chat", changed("label_chat", *replacements), hint)


def test_labels_as_tensors() -> None:
    llava.label_chat(lambda *args: tuple(map(torch.tensor, llava.solutions.label_chat(*args))))


def test_labels_of_one_chat_alone() -> None:
    known = llava.solutions.label_chat(llava.OPENING, llava.TURNS, llava.END)
    refused("label_chat", lambda *args: known, "not for another with one turn")


# Exercise 3

STAGES: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "everything in stage one": (
        (("((PROJECTOR,), stage_one)", "((PROJECTOR, DECODER, TOWER), stage_one)"),),
        "the language model has learned in stage one",
    ),
    "the tower in stage one": (
        (("((PROJECTOR,), stage_one)", "((PROJECTOR, TOWER), stage_one)"),),
        "the tower has learned in stage one",
    ),
    "only the tower": ((("((PROJECTOR,), stage_one)", "((), stage_one)"),), "stops with"),
    "never unfrozen": (
        (("((PROJECTOR, DECODER), stage_two)", "((PROJECTOR,), stage_two)"),),
        "the language model has not learned in stage two",
    ),
    "the projector frozen in stage two": (
        (("((PROJECTOR, DECODER), stage_two)", "((DECODER,), stage_two)"),),
        "the projector has not learned in stage two",
    ),
    "the tower in stage two": (
        (("((PROJECTOR, DECODER), stage_two)", "((PROJECTOR, DECODER, TOWER), stage_two)"),),
        "the tower has learned in stage two",
    ),
    "no step": ((("optimizer.step()", "pass"),), "the projector has not learned in stage one"),
    "no zero": (
        (("optimizer.zero_grad()", "pass"),),
        "step 2 used gradients that are not those of its batch",
    ),
    "rates exchanged": ((("rates, strict=True", "rates[::-1], strict=True"),), r"rates\[0\] = 0.003"),
    "one rate": ((("lr=rate", "lr=rates[0]"),), r"in stage two: take rates\[0\]"),
    "left over from stage one": (
        (
            ("requires_grad_(name.startswith(parts))", "requires_grad_(True)"),
            (
                "[weight for weight in model.parameters() if weight.requires_grad]",
                "[weight for name, weight in model.named_parameters() if name.startswith(parts)]",
            ),
            ("            optimizer.zero_grad()\n", ""),
            ("optimizer.step()", "optimizer.step(); optimizer.zero_grad()"),
        ),
        "step 4 used gradients that are not those of its batch",
    ),
    "no model": ((("return model", "return 1"),), "return the model, not a int"),
}


@pytest.mark.parametrize("name", STAGES)
def test_wrong_stages(name: str) -> None:
    replacements, hint = STAGES[name]
    refused("two_stages", changed("two_stages", *replacements), hint)


def test_one_step_for_a_whole_stage() -> None:
    answer = changed("two_stages", ("            optimizer.step()", "        optimizer.step()"))
    refused("two_stages", answer, "five batches came, and 2 steps were taken")


def test_gradients_may_be_clipped_and_all_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    answer = changed(
        "two_stages",
        ("optimizer.zero_grad()", "model.zero_grad()"),
        ("optimizer.step()", "nn.utils.clip_grad_norm_(learning, 0.1); optimizer.step()"),
    )
    llava.two_stages(answer)
    assert "Right: " in capsys.readouterr().out


# Exercise 4

KEY = "kept, kept - rows * columns * side * side"
GRID_MISTAKES: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "swapped": ((("rows, columns = grid\n", "columns, rows = grid\n"),), "rows and columns are swapped"),
    "enlarged": (
        (
            (
                "min(int(width * scale) * int(height * scale), width * height)",
                "int(width * scale) * int(height * scale)",
            ),
        ),
        "enlarging adds no pixels",
    ),
    "first of equals": (((KEY, "kept, 0"),), "you take the first"),
    "largest of equals": (((KEY, "kept, rows * columns"),), "the larger area: it wastes more"),
    "shape alone": (((KEY, "-abs(columns / rows - width / height), 0"),), "by the shape alone"),
    "waste alone": (
        ((KEY, "kept - rows * columns * side * side, 0"),),
        "the fewest pixels left empty",
    ),
    "smallest": ((("max(grids", "min(grids"),), "keeps the least"),
    "larger scale": ((("scale = min(", "scale = max("),), "the larger of the two scales"),
    "largest grid": (((KEY, "rows * columns, 0"),), "always the largest grid"),
    "area of the grid": (
        (("min(int(width * scale) * int(height * scale), ", "min(rows * columns * side * side, "),),
        "a grid's pixels are counted",
    ),
    "fixed side": ((("side / width", "336 / width"), ("side / height", "336 / height")), "side and grids"),
    "the number": (
        (("return max(grids, key=kept_and_wasted)", "return 2"),),
        "return one of the grids, a pair",
    ),
    "no grid": ((("return max(grids, key=kept_and_wasted)", "return (2, 3)"),), "is none of the grids"),
}


@pytest.mark.parametrize("name", GRID_MISTAKES)
def test_wrong_grids(name: str) -> None:
    replacements, hint = GRID_MISTAKES[name]
    refused("choose_grid", changed("choose_grid", *replacements), hint)


def test_one_wrong_grid() -> None:
    def answer(width: int, height: int, side: int, grids: Any) -> Any:
        return (2, 2) if width == 40 else llava.solutions.choose_grid(width, height, side, grids)

    refused("choose_grid", answer, r"a picture of 40 x \d+ gets \(2, 2\), expected")
    assert set(llava.TRIED) == set(GRIDS)


# Exercise 5


@pytest.mark.parametrize("fault", [*llava.FAULTS, "nothing"])
def test_the_solution_finds_each_fault(fault: str) -> None:
    sound, patient, pixels = llava.clinic(fault)
    assert llava.solutions.find_fault(sound, patient, pixels) == fault


EXAMINATIONS: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "class token unknown": (
        (('"class token" if moved_on else "layer"', '"layer"'),),
        "the class token stands first, and the last patch is gone",
    ),
    "layer unknown": (
        (('"class token" if moved_on else "layer"', '"class token"'),),
        "these are the tower's last ones, not the second-last",
    ),
    "places not compared": ((("ids != their_ids", "False"),), "the picture stands at another place"),
    "labels not compared": ((("written == their_written", "True"),), "what has a loss is not"),
    "projector not compared": (
        (("not torch.allclose(patient.project(features), sound.project(features), atol=1e-4)", "False"),),
        "give both projectors the same features",
    ),
    "features not compared": (
        (("not torch.allclose(theirs, features, atol=1e-4)", "False"),),
        "the fault is 'layer'",
    ),
    "the projector's own input": (
        (
            (
                "    if not torch.allclose(theirs, features, atol=1e-4):",
                "    if not torch.allclose(patient.project(theirs), sound.project(features), atol=1e-4):",
            ),
        ),
        "a sound tower was called broken",
    ),
    "exact": (
        (
            (
                "torch.allclose(patient.project(features), sound.project(features), atol=1e-4)",
                "torch.equal(patient.project(features), sound.project(features))",
            ),
        ),
        "both are sound, up to rounding",
    ),
    "always nothing": (
        (("features = sound", "return 'nothing'\n    features = sound"),),
        "the fault is 'layer'",
    ),
    "another name": (
        (("features = sound", "return 'tower'\n    features = sound"),),
        "return one of layer, class token",
    ),
    "labels before places": (
        (('        return "place"\n', '        return "labels"\n'),),
        "the fault is 'place', and you say 'labels'",
    ),
}


@pytest.mark.parametrize("name", EXAMINATIONS)
def test_incomplete_examinations(name: str) -> None:
    replacements, hint = EXAMINATIONS[name]
    refused("find_fault", changed("find_fault", *replacements), hint)


def test_a_patient_answers_with_tensors() -> None:
    sound, _, pixels = llava.clinic()
    features: Tensor = sound.features(pixels)
    assert features.shape == (2, 4, 16)
    assert sound.project(features).shape == (2, 4, 16)
