"""Faithfulness, neglect and hallucination, on models that are known to do one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import minivlm.evaluation.answers as answers_file
from minivlm.evaluation import faithfulness as faithfulness_file
from minivlm.evaluation import hallucination, neglect
from minivlm.evaluation.composed import conclusions_right, make_composed
from minivlm.evaluation.continued import continue_answers
from minivlm.evaluation.faithfulness import agreement, exchange, faithfulness, gray_picture
from minivlm.evaluation.hallucination import WAYS, pope, pope_numbers, pope_questions
from minivlm.evaluation.neglect import biased, faded, gray_thing, swapped
from minivlm.evaluation.scoring import Question
from minivlm.models.load import load_answering
from minivlm.world.questions import Example
from minivlm.world.scenes import HELD_OUT_PAIRS, make_scene
from minivlm.world.thinking import boxes_of, conclude, conclusion, evidence

THOUGHT = make_composed("vertical", 60, thinks=True)
DIRECT = make_composed("vertical", 60)


def scene_of(picture: Any, questions: list[Question]) -> Any:
    """The scene that a picture shows; None for a gray one."""
    return next((q.scene for q in questions if q.picture is picture), None)


@pytest.fixture
def thinking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The table of a model that is two functions: what it answers, and how it goes on after boxes."""

    def run(answers: Callable[[Question], str], after: Callable[[Any, str, str], str]) -> dict[str, Any]:
        def all_answers(model: Any, processor: Any, pictures: Any, *args: Any, **kwargs: Any) -> list[str]:
            return [answers(question) for question in THOUGHT]

        def goes_on(model: Any, processor: Any, pictures: Any, prompts: Any, beginnings: Any) -> list[str]:
            return [
                after(scene_of(picture, THOUGHT), prompt, beginning)
                for picture, prompt, beginning in zip(pictures, prompts, beginnings, strict=True)
            ]

        monkeypatch.setattr(answers_file, "answer_all", all_answers)
        monkeypatch.setattr(faithfulness_file, "continue_answers", goes_on)
        table = faithfulness(None, None, THOUGHT)  # type: ignore[arg-type]
        return {name: round(metric.value, 3) for name, metric in table.items()}

    return run


def by_boxes(scene: Any, prompt: str, beginning: str) -> str:
    return " " + str(conclude(prompt, evidence(beginning)))


def by_picture(scene: Any, prompt: str, beginning: str) -> str:
    return "yes" if scene is None else str(conclude(prompt, boxes_of(scene)))


def test_a_model_that_follows_its_boxes(thinking: Callable[..., dict[str, Any]]) -> None:
    table = thinking(lambda question: question.example.suffix, by_boxes)
    assert table["right"] == table["consistent with its boxes"] == 1
    assert table["IoU of its boxes"] > 0.95
    assert table["boxes exchanged: follows them"] == 1
    assert table["boxes exchanged: follows the picture"] == 0
    assert table["true boxes, gray picture: right"] == 1


def test_a_model_that_goes_around_them(thinking: Callable[..., dict[str, Any]]) -> None:
    table = thinking(lambda question: question.example.suffix, by_picture)
    assert table["boxes exchanged: follows them"] == 0
    assert table["boxes exchanged: follows the picture"] == table["true boxes: right"] == 1
    assert 0.3 < table["true boxes, gray picture: right"] < 0.7


def test_a_model_that_contradicts_itself(thinking: Callable[..., dict[str, Any]]) -> None:
    def other(question: Question) -> str:
        boxes, _, end = question.example.suffix.rpartition(" ; ")
        return f"{boxes} ; {'no' if end == 'yes' else 'yes'}"

    table = thinking(other, by_boxes)
    assert table["right"] == table["consistent with its boxes"] == 0
    assert table["wrong against its own boxes"] == 1
    assert table["IoU of its boxes"] > 0.95


def test_exchanged_boxes_say_the_other_answer() -> None:
    for question in THOUGHT:
        first, second = question.example.things
        boxes = exchange(question)
        assert [box.name for box in boxes] == [first.name, second.name]
        assert [box[:4] for box in boxes] == [second.box, first.box]
        said = conclude(question.example.prefix, boxes)
        assert {said, conclusion(question.example.suffix)} == {"yes", "no"}


def test_agreement_by_frequency() -> None:
    assert agreement(["yes"] * 4, ["yes", "yes", "no", "no"]) == 0.5
    assert agreement(["yes", "no"], ["yes", "no"]) == 0.5
    assert agreement(["yes"], ["yes"]) == 1


# In a real model


def test_an_answer_goes_on_where_it_was_left() -> None:
    """The rest of its own answers, in batches, whatever the lengths."""
    model, processor = load_answering()
    questions = make_composed("color", 3) + make_composed("relation", 2)
    pictures, prompts = [q.picture for q in questions], ["caption en"] * 5
    whole = processor.decode(model.generate(**processor(pictures, prompts), max_new_tokens=40))
    cuts = [" ".join(text.split()[: 1 + number]) for number, text in enumerate(whole)]
    rests = continue_answers(model, processor, pictures, prompts, cuts, max_new_tokens=40, batch_size=2)
    for text, cut, rest in zip(whole, cuts, rests, strict=True):
        assert (cut + rest).replace(" ", "") == text.replace(" ", "")


def test_conclusions_right() -> None:
    questions = [
        Question(None, None, Example("vertical", "q", f"<loc0001> red star ; {end}"))
        for end in ("yes", "yes", "no")
    ]  # type: ignore[arg-type]
    metric = conclusions_right(questions, ["yes", "anything ; yes", "yes"])
    assert (metric.value, metric.baseline, metric.cases) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)


# Neglect


def looking(model: Any, processor: Any, pictures: Any, prompts: Any, **kwargs: Any) -> list[str]:
    """Answers of who looks, and says yes where nothing can be seen."""
    scenes = [scene_of(picture, DIRECT) for picture in pictures]
    return [
        "yes" if scene is None else str(conclude(prompt, boxes_of(scene)))
        for scene, prompt in zip(scenes, prompts, strict=True)
    ]


@pytest.mark.parametrize("looks", [True, False])
def test_who_looks_and_who_does_not(looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = {q.example.prefix: q.example.suffix for q in DIRECT}

    def answers(model: Any, processor: Any, pictures: Any, prompts: Any, **kwargs: Any) -> list[str]:
        return (
            looking(model, processor, pictures, prompts) if looks else [blind[prompt] for prompt in prompts]
        )

    monkeypatch.setattr(answers_file, "answer_all", answers)
    table = neglect.neglect(None, None, DIRECT)  # type: ignore[arg-type]
    assert table["right"].value == 1
    assert (table["as before, gray picture"].value < 0.7) == looks
    assert (table["right, swapped picture"].value == 1) == looks
    assert (table["as before, swapped picture"].value == 1) == (not looks)


def test_swapped_pictures_have_another_answer() -> None:
    asked = make_composed("existence", 60)
    pairs = swapped(asked)
    assert len(pairs) > 40
    for number, question in pairs:
        assert asked[number].example.prefix == question.example.prefix
        assert asked[number].example.suffix != question.example.suffix
        name = question.example.prefix.removesuffix("?").split(maxsplit=3)[3]
        assert question.example.suffix == ("yes" if question.scene.find(name) else "no")


def test_bias() -> None:
    stars: list[str] = []
    for number in range(400):
        rng = np.random.default_rng(number)
        scene = make_scene(rng)
        seen = biased(scene, rng)
        assert [thing.shape for thing in seen.things] == [thing.shape for thing in scene.things]
        stars += [thing.color for thing in seen.things if thing.shape == "star"]
        others = [thing.color for thing in seen.things if thing.shape != "star"]
        assert others == [thing.color for thing in scene.things if thing.shape != "star"]
        spread = [max(thing.rgb) - min(thing.rgb) for thing in seen.things]
        whole = [max(thing.rgb) - min(thing.rgb) for thing in scene.things]
        if seen.things[0].color == scene.things[0].color and seen.things[0].shape != "star":
            assert 0.05 * whole[0] < spread[0] < 0.6 * whole[0]
    assert stars.count("cyan") / len(stars) == pytest.approx(0.91, abs=0.04)


def test_gray_things() -> None:
    scene = next(s for s in map(make_scene, map(np.random.default_rng, range(99))) if s.find("red star"))
    for thing in gray_thing(scene, "star").things:
        assert (thing.rgb == (128, 128, 128)) == (thing.shape == "star")  # whatever its color was
    assert faded(scene, 1.0) == scene
    assert np.asarray(gray_picture(scene.draw())).std() == 0


# Hallucination


@pytest.mark.parametrize("way", WAYS)
def test_questions_are_balanced_and_true(way: str) -> None:
    questions = pope_questions(way, 120)
    answers = [q.example.suffix for q in questions]
    assert answers.count("yes") == answers.count("no") > 100
    for question in questions:
        name = question.example.prefix.removesuffix("?").split(maxsplit=3)[3]
        color, shape = name.split()
        assert (color, shape) not in HELD_OUT_PAIRS
        assert question.example.suffix == ("yes" if question.scene.find(name) else "no")
        if way == "mixed" and question.example.suffix == "no":
            assert color in {thing.color for thing in question.scene.things}
            assert shape in {thing.shape for thing in question.scene.things}


def test_popular_and_adversarial_names_are_what_they_say() -> None:
    """In scenes of which nearly all have a red circle, and a blue square beside green stars."""
    plain = [make_scene(np.random.default_rng(n)) for n in range(3)]
    thing = plain[0].things[0]

    def scene(*names: str) -> Any:
        things = [replace(thing, color=name.split()[0], shape=name.split()[1]) for name in names]
        return replace(plain[0], things=tuple(things))

    scenes = [*[scene("red circle")] * 6, *[scene("green star", "blue square")] * 3, scene("green star")]
    drawn = iter(scenes * 2)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(hallucination, "make_scene", lambda rng, split: next(drawn))
        asked = {
            way: pope_questions(way, len(scenes))[-1].example.prefix for way in ("popular", "adversarial")
        }
    assert asked == {"popular": "is there a red circle?", "adversarial": "is there a blue square?"}


def test_numbers_of_pope() -> None:
    numbers = pope_numbers([True, True, True, False], [True, True, False, False])
    assert {name: round(metric.value, 3) for name, metric in numbers.items()} == {
        "accuracy": 0.75,
        "precision": 0.667,
        "recall": 1.0,
        "F1": 0.8,
        "says yes": 0.75,
    }


def test_the_shipped_model_sees_what_is_there() -> None:
    model, processor = load_answering()
    with torch.no_grad():
        table = pope(model, processor, scenes=6)
    assert set(table) == set(WAYS)
    assert table["random"]["accuracy"].value > 0.9
    assert table["random"]["accuracy"].baseline == 0.5
