"""From a picture and a prompt to an answer in words, and how sure the model is of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import InputError
from minivlm.models.contrastive_decoding import Contrastive, distorted
from minivlm.models.load import load_answering
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, BaseTokenizer, Video, to_device
from minivlm.processing.inputs import Picture

MOST_REPEATS = 8  # of one token in a row; after them an answer is stopped

Loaded = tuple[Answers, AnswerProcessor]  # what `load` returns


def answer(picture: Picture | Video, prompt: str, using: Loaded | None = None, **choices: Any) -> str:
    """The answer to one prompt about one picture, or about one video where the model reads videos.

    >>> answer("photo.jpg", "caption en")
    >>> answer("photo.jpg", "caption en", load("google/paligemma-3b-mix-224"), max_new_tokens=20)

    Args:
        picture: a PIL image, the path of a picture, or what `open_video` returns.
        using: a model and its processor, as `load` returns them; None: the shipped model.
        **choices: of `minivlm.generate.stream`: max_new_tokens, temperature, top_k, top_p, seed; and contrast
            with a distorted picture, as in `AnswerStream`.

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

    With `contrast` above 0, words are those that the picture makes more probable than a distorted picture
    does, see `minivlm.models.contrastive_decoding`, and so is the confidence.

    A model that is lost may write one token again and again. Such an answer is stopped: `repeats` is True.
    """

    def __init__(
        self,
        model: Answers,
        processor: AnswerProcessor,
        picture: Picture | Video,
        prompt: str,
        contrast: float = 0.0,
        **choices: Any,
    ) -> None:
        if not 0 <= contrast < math.inf:
            raise InputError(f"contrast is {contrast}: choose 0 for none, or a number above, such as 1")
        self.model, self.processor, self.contrast, self.choices = model, processor, contrast, choices
        self.inputs: dict[str, Any] = to_device(processor([picture], [prompt]), model.device)
        self.confidence: float | None = None
        self.repeats = False

    def __iter__(self) -> Iterator[str]:
        ids: list[int] = []
        shown = ""
        scoring: Any = self.model
        if self.contrast:
            scoring = Contrastive(self.model, distorted(self.inputs), self.contrast)
        noting, seg_ids = _Noting(scoring), self.processor.tokenizer.seg_ids
        # Called on the class: the model's own loop, which asks `noting` for logits.
        for token in type(self.model).stream(noting, **self.inputs, **self.choices):
            ids.append(int(token[0]))
            if noting.last is not None:
                sure = _probability(noting.last[0], ids[-1], self.processor.tokenizer)
                self.confidence = min(sure, 1.0 if self.confidence is None else self.confidence)
            text = self.processor.decode(torch.tensor([ids]))[0]
            # Half of a character that takes several byte tokens decodes to U+FFFD: wait for the rest.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
            # A mask may well have one shape code in many of its places.
            self.repeats = ids[-1] not in seg_ids and ids[-MOST_REPEATS:] == [ids[-1]] * MOST_REPEATS
            if self.repeats:
                break
        yield text[len(shown) :]


class _Noting:
    """A model that keeps what it scores on the way, so that nothing is read twice.

    It stands beside the model and changes nothing in it: another thread may use the same one.
    """

    def __init__(self, model: Answers) -> None:
        self.model = model
        self.last: Tensor | None = None  # [1, V]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def logits(self, hidden_states: Tensor) -> Tensor:
        self.last = self.model.logits(hidden_states)
        return self.last


def _probability(logits: Tensor, token_id: int, tokenizer: BaseTokenizer) -> float:
    """Of a token, or of all of its kind, after scores [V]."""
    kinds = (tokenizer.loc_ids, tokenizer.seg_ids)
    alike = next((kind for kind in kinds if token_id in kind), [token_id])
    return float(logits.float().softmax(dim=-1)[alike].sum())
