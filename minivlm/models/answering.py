"""From a picture and a prompt to an answer in words, and how sure the model is of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minivlm.models.load import load_answering
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, Tokenizer, to_device
from minivlm.processing.inputs import Picture

Loaded = tuple[Answers, AnswerProcessor]  # what `load` returns


def answer(picture: Picture, prompt: str, using: Loaded | None = None, **choices: Any) -> str:
    """The answer to one prompt about one picture.

    >>> answer("photo.jpg", "caption en")
    >>> answer("photo.jpg", "caption en", load("google/paligemma-3b-mix-224"), max_new_tokens=20)

    Args:
        picture: a PIL image or a path.
        using: a model and its processor, as `load` returns them; None: the shipped model.
        **choices: of `minivlm.generate.stream`: max_new_tokens, temperature, top_k, top_p, seed.

    Raises InputError: as the processor and `minivlm.generate.stream`.
    """
    model, processor = _shipped() if using is None else using
    return "".join(AnswerStream(model, processor, picture, prompt, **choices))


@cache
def _shipped() -> Loaded:
    return load_answering()


class AnswerStream:
    """An answer while it is written: iterate over its pieces of text.

    Afterwards `confidence` is the probability of the answer's least sure token, its end included: from 0 to
    1, as the model sees it before any temperature. Neighboring coordinates share their probability, and so do
    shape codes, so such a token counts as sure as the model is that one of its kind comes here. That says
    whether there is a thing, not how well its edges are met. None: the model told nothing.
    """

    def __init__(
        self, model: Answers, processor: AnswerProcessor, picture: Picture, prompt: str, **choices: Any
    ) -> None:
        self.model, self.processor, self.choices = model, processor, choices
        self.inputs: dict[str, Any] = to_device(processor([picture], [prompt]), model.device)
        self.confidence: float | None = None

    def __iter__(self) -> Iterator[str]:
        ids: list[int] = []
        shown = ""
        with _noting_logits(self.model) as noted:
            for token in self.model.stream(**self.inputs, **self.choices):
                ids.append(int(token[0]))
                if noted:
                    sure = _probability(noted.pop()[0], ids[-1], self.processor.tokenizer)
                    self.confidence = min(sure, 1.0 if self.confidence is None else self.confidence)
                text = self.processor.decode(torch.tensor([ids]))[0]
                # Half of a character that takes several byte tokens decodes to U+FFFD: wait for the rest.
                if not text.endswith("\ufffd"):
                    yield text[len(shown) :]
                    shown = text
        yield text[len(shown) :]


@contextmanager
def _noting_logits(model: Any) -> Iterator[list[Tensor]]:
    """Keep what the model scores on the way: [1, V] for each new token, so that nothing is read twice."""
    noted: list[Tensor] = []
    logits = model.logits

    def noting(hidden_states: Tensor) -> Tensor:
        noted[:] = [logits(hidden_states)]
        return noted[0]

    model.logits = noting
    try:
        yield noted
    finally:
        del model.logits


def _probability(logits: Tensor, token_id: int, tokenizer: Tokenizer) -> float:
    """Of a token, or of all of its kind, after scores [V]."""
    kinds = (tokenizer.loc_ids, tokenizer.seg_ids)
    alike = next((kind for kind in kinds if token_id in kind), [token_id])
    return float(logits.float().softmax(dim=-1)[alike].sum())
