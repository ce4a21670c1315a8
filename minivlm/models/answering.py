"""From a picture and prompts to answers in words, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, overload

from minivlm.models.answer_stream import MOST_REPEATS, AnswerStream
from minivlm.models.load import load_answering
from minivlm.models.many_answers import answers_about
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, Video
from minivlm.processing.inputs import Picture

__all__ = ["MOST_REPEATS", "AnswerStream", "Loaded", "answer"]

Loaded = tuple[Answers, AnswerProcessor]  # what `load` returns


@overload
def answer(picture: Picture | Video, prompt: str, using: Loaded | None = None, **choices: Any) -> str: ...
@overload
def answer(
    picture: Picture | Video, prompt: Sequence[str], using: Loaded | None = None, **choices: Any
) -> list[str]: ...


def answer(
    picture: Picture | Video, prompt: str | Sequence[str], using: Loaded | None = None, **choices: Any
) -> str | list[str]:
    """The answer to a prompt about a picture, or about a video where the model reads videos.

    >>> answer("photo.jpg", "caption en")
    >>> answer("photo.jpg", "caption en", load("google/paligemma-3b-mix-224"), max_new_tokens=20)
    >>> answer("photo.jpg", ["caption en", "what color is the star?"])  # a list, and faster than one by one

    Args:
        picture: a PIL image, the path of a picture, or what `open_video` returns.
        prompt: one, or several, for which the picture is read once (`minivlm.models.many_answers`).
        using: a model and its processor, as `load` returns them; None: the shipped model.
        **choices: of `minivlm.generate.stream`: max_new_tokens, temperature, top_k, top_p, seed; and contrast
            with a distorted picture, as in `AnswerStream`.

    Raises InputError: as the processor and `minivlm.generate.stream`.
    """
    model, processor = _shipped() if using is None else using
    if isinstance(prompt, str):
        return "".join(AnswerStream(model, processor, picture, prompt, **choices))
    return [one.text for one in answers_about(model, processor, picture, prompt, **choices)]


@cache
def _shipped() -> Loaded:
    return load_answering()
