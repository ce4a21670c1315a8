"""The checks of 00_tour accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minivlm import checks
from minivlm.checks import NotYet


def ask_list(model: Any, processor: Any, picture: Any, prompt: str) -> Any:
    return processor.decode(model.generate(**processor([picture], [prompt])))


def ask_ids(model: Any, processor: Any, picture: Any, prompt: str) -> Any:
    return model.generate(**processor([picture], [prompt]))


def ask_one_prompt(model: Any, processor: Any, picture: Any, prompt: str) -> Any:
    return checks.tour.solutions.ask(model, processor, picture, "what color is the circle?")


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("ask", ask_list, "list"),
    ("ask", ask_ids, "processor.decode"),
    ("ask", ask_one_prompt, "every prompt"),
    ("sequence_length", lambda i, p, t: (i // p) ** 2 + t, "two tokens"),
    ("sequence_length", lambda i, p, t: (i // p) ** 2 + t + 1, "one of the two"),
    ("sequence_length", lambda i, p, t: i // p + t + 2, "so square the number"),
    ("sequence_length", lambda i, p, t: (i / p) ** 2 + t + 2, "dropped"),
    (
        "to_pixels",
        lambda b, w, h: [b[0] / 1023 * w, b[1] / 1023 * h, b[2] / 1023 * w, b[3] / 1023 * h],
        "swap",
    ),
    (
        "to_pixels",
        lambda b, w, h: [b[1] / 1024 * w, b[0] / 1024 * h, b[3] / 1024 * w, b[2] / 1024 * h],
        "1024",
    ),
    (
        "to_pixels",
        lambda b, w, h: [b[1] / 1023 * w, b[0] / 1023 * w, b[3] / 1023 * w, b[2] / 1023 * w],
        "height",
    ),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.tour, name)(answer)
