"""The checks of 00_tour accept right answers and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from minivlm.checks import NotYet, tour

Answer = Callable[..., Any]
PROMPT = "what color is the circle?"


def says(check: str, answer: Answer, hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(tour, check)(answer)


def ask(model: Any, processor: Any, picture: Any, prompt: str, **options: Any) -> Any:
    return processor.decode(model.generate(**processor([picture], [prompt]), **options))[0]


def ask_ids(model: Any, processor: Any, picture: Any, prompt: str) -> Any:
    return model.generate(**processor([picture], [prompt]))


def ask_raw(model: Any, processor: Any, picture: Any, prompt: str) -> Any:
    ids = ask_ids(model, processor, picture, prompt)
    return processor.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)


def ask_first_place(model: Any, processor: Any, picture: Any, prompt: str) -> Any:
    logits = model(**processor([picture], [prompt])).logits
    return processor.tokenizer.decode([int(logits[0, 0].argmax())])


ASKED: list[tuple[Answer, str]] = [
    (lambda m, p, i, t: p.decode(ask_ids(m, p, i, t)), "list"),
    (ask_ids, "processor.decode"),
    (lambda m, p, i, t: m.generate(p([i], [t])["input_ids"]), "stops with"),
    (ask_raw, "end of the sequence"),
    (lambda m, p, i, t: t + " " + ask(m, p, i, t), "repeats the prompt"),
    (lambda m, p, i, t: ask(m, p, i, t) + "\n", "spaces or a newline"),
    (ask_first_place, "image token"),
    (lambda m, p, i, t: ask(m, p, Image.new("RGB", (64, 64), (208, 208, 208)), t), "use no other"),
    (lambda m, p, i, t: ask(m, p, i, PROMPT), "every prompt"),
    (lambda m, p, i, t: ask(m, p, i, t, max_new_tokens=1), "goes on until <eos>"),
    (lambda m, p, i, t: ask(m, p, tour._red_circle(), t), "every picture"),
    (lambda m, p, i, t: print(ask(m, p, i, t)), "return"),
]


@pytest.mark.parametrize(("answer", "hint"), ASKED)
def test_ask_names_the_mistake(answer: Answer, hint: str) -> None:
    says("ask", answer, hint)


LENGTHS: list[tuple[Answer, str]] = [
    (lambda i, p, t: (i // p) ** 2 + t, "two tokens"),
    (lambda i, p, t: (i // p) ** 2 + t + 1, "one of the two"),
    (lambda i, p, t: (i // p) ** 2 + t + 3, "belongs to the answer"),
    (lambda i, p, t: i // p + t + 2, "so square the number"),
    (lambda i, p, t: i // p + t, "add <bos>"),
    (lambda i, p, t: (i // p) ** 2 + 2, "own tokens are missing"),
    (lambda i, p, t: (i // p) ** 2, "image tokens alone"),
    (lambda i, p, t: 3 * (i // p) ** 2 + t + 2, "three colors"),
    (lambda i, p, t: i * i + t + 2, "not for a pixel"),
    (lambda i, p, t: i * i // (p * p) + t + 2, "divided the areas"),
    (lambda i, p, t: (i / p) ** 2 + t + 2, "dropped"),
    (lambda i, p, t: [(i // p) ** 2, t + 2], "list"),
    (lambda i, p, t: (i // p) ** 2 * t, "count all of them"),
]


@pytest.mark.parametrize(("answer", "hint"), LENGTHS)
def test_sequence_length_names_the_mistake(answer: Answer, hint: str) -> None:
    says("sequence_length", answer, hint)


def outputs(model: Any, inputs: Any) -> dict[str, Any]:
    with torch.no_grad():
        tokens = model.vision_tower(inputs["pixel_values"])
        features = model.multi_modal_projector(tokens)
        merged = model.merge(inputs["input_ids"], features)
        return {"tower": tokens, "projector": features, "merge": merged, "decoder": model(**inputs).logits}


def differing(healthy: Any, broken: Any, inputs: Any) -> list[str]:
    a, b = outputs(healthy, inputs), outputs(broken, inputs)
    return [name for name in a if not torch.equal(a[name], b[name])]


def by_shape(healthy: Any, broken: Any, inputs: Any) -> str:
    a, b = outputs(healthy, inputs), outputs(broken, inputs)
    return next((name for name in a if a[name].shape != b[name].shape), "decoder")


def by_weights(healthy: Any, broken: Any, inputs: Any) -> str:
    a, b = healthy.state_dict(), broken.state_dict()
    (name, *_) = [name for name in a if not torch.equal(a[name], b[name])] or ["language_model"]
    return {"vision_tower": "tower", "multi_modal_projector": "projector"}.get(name.split(".")[0], "decoder")


def without(step: str) -> Answer:
    """Nobody compares this step."""
    return lambda h, b, i: next(name for name in differing(h, b, i) if name != step)


def renamed(names: dict[str, str]) -> Answer:
    return lambda h, b, i: names.get(differing(h, b, i)[0], differing(h, b, i)[0])


STEPS: list[tuple[Answer, str]] = [
    (lambda h, b, i: "tower", "'tower' of four models"),
    (lambda h, b, i: "projector", "do not judge by the answer"),
    (lambda h, b, i: differing(h, b, i)[-1], "'decoder' of four models"),
    (by_shape, "'decoder' of four models"),
    (by_weights, "has none of its own"),
    (without("tower"), "The first difference counts"),
    (without("projector"), "for a fault in the projector you say 'merge'"),
    (differing, "return the name of a step"),
    (lambda h, b, i: tour.STEPS.index(differing(h, b, i)[0]), "return the name"),
    (lambda h, b, i: "vision_tower", "one of tower, projector"),
    (lambda h, b, i: differing(h, b, i)[0].title(), "'Tower'"),
    (renamed({"merge": "projector"}), "gives the same numbers in both"),
    (renamed({"decoder": "merge"}), "for a fault in the decoder you say 'merge'"),
    (lambda h, b, i: differing(b, b, i)[0], "stops with IndexError"),
]


@pytest.mark.parametrize(("answer", "hint"), STEPS)
def test_broken_step_names_the_mistake(answer: Answer, hint: str) -> None:
    says("broken_step", answer, hint)


BOXES: list[tuple[Answer, str]] = [
    (lambda b, w, h: [b[0] / 1023 * w, b[1] / 1023 * h, b[2] / 1023 * w, b[3] / 1023 * h], "swap"),
    (lambda b, w, h: [b[0] / 1023 * h, b[1] / 1023 * w, b[2] / 1023 * h, b[3] / 1023 * w], "swap"),
    (lambda b, w, h: [b[1] / 1024 * w, b[0] / 1024 * h, b[3] / 1024 * w, b[2] / 1024 * h], "1024"),
    (lambda b, w, h: [b[1] / 1000 * w, b[0] / 1000 * h, b[3] / 1000 * w, b[2] / 1000 * h], "1000"),
    (
        lambda b, w, h: [b[1] / 1023 * w, b[0] / 1023 * w, b[3] / 1023 * w, b[2] / 1023 * w],
        "share of the height",
    ),
    (
        lambda b, w, h: [b[1] / 1023 * h, b[0] / 1023 * h, b[3] / 1023 * h, b[2] / 1023 * h],
        "share of the width",
    ),
    (lambda b, w, h: [b[1] / 1023 * h, b[0] / 1023 * w, b[3] / 1023 * h, b[2] / 1023 * w], "mixed up"),
    (lambda b, w, h: [b[1] / 1023, b[0] / 1023, b[3] / 1023, b[2] / 1023], "shares from 0 to 1"),
    (lambda b, w, h: [b[1], b[0], b[3], b[2]], "numbers of the words"),
    (lambda b, w, h: [round(v) for v in tour.solutions.to_pixels(b, w, h)], "leave the fractions"),
    (lambda b, w, h: [int(v) for v in tour.solutions.to_pixels(b, w, h)], "rounded down"),
    (lambda b, w, h: [v + 0.5 for v in tour.solutions.to_pixels(b, w, h)], "125.1"),
    (lambda b, w, h: tour.solutions.to_pixels(b, w, h)[:2], "2 numbers"),
    (lambda b, w, h: b[1] / 1023 * w, "four numbers"),
]


@pytest.mark.parametrize(("answer", "hint"), BOXES)
def test_to_pixels_names_the_mistake(answer: Answer, hint: str) -> None:
    says("to_pixels", answer, hint)


def predicted(**changes: Any) -> Answer:
    return lambda: tour.solutions.predictions() | {k.replace("_", " "): v for k, v in changes.items()}


PREDICTED: list[tuple[Answer, str]] = [
    (predicted(another_picture="none"), "right by luck"),
    (predicted(another_picture="equal"), "ignore the picture"),
    (predicted(another_picture="above"), "nothing there helps"),
    (predicted(gray_picture="none"), "0 or no"),
    (predicted(gray_picture="equal"), "an empty scene"),
    (predicted(gray_picture="above"), "the questions alone tell little"),
    (predicted(photograph="a person"), "nothing but colored shapes"),
    (predicted(photograph="no idea"), "I do not know"),
    (predicted(gray_picture="lower"), "not one of the choices"),
    (predicted(gray_picture=0.4), "not one of the choices"),
    (predicted(another_picture="equal", gray_picture="equal"), "another picture: not .*gray picture: not"),
    (lambda: {"another picture": "below"}, "no prediction for 'gray picture'"),
    (lambda: "below", "dictionary"),
]


@pytest.mark.parametrize(("answer", "hint"), PREDICTED)
def test_predictions_are_explained(answer: Answer, hint: str) -> None:
    says("predictions", answer, hint)


RIGHT: list[tuple[str, Answer]] = [
    ("ask", lambda m, p, i, t: p.decode(torch.stack(list(m.stream(**p([i], [t]))), dim=1))[0]),
    ("sequence_length", lambda i, p, t: float(int(i / p) * int(i / p) + t + 2)),
    ("broken_step", lambda h, b, i: differing(h, b, i)[0]),
    ("to_pixels", lambda b, w, h: tuple(torch.tensor(tour.solutions.to_pixels(b, w, h)))),
    ("predictions", lambda: tour.solutions.predictions() | {"right picture": "above"}),
]


@pytest.mark.parametrize(("check", "solution"), RIGHT)
def test_other_right_answers_pass(check: str, solution: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(tour, check)(solution)
    getattr(tour, check)(getattr(tour.solutions, check))
    assert capsys.readouterr().out.count("Right: ") == 2
