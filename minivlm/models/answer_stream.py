"""An answer while it is written, and how sure the model is of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import InputError
from minivlm.models.contrastive_decoding import Contrastive, distorted
from minivlm.models.protocols import Answers
from minivlm.processing import AnswerProcessor, BaseTokenizer, Video, to_device
from minivlm.processing.inputs import Picture

MOST_REPEATS = 8  # of one token in a row; after them an answer is stopped


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
        scoring: Any = self.model
        if self.contrast:
            scoring = Contrastive(self.model, distorted(self.inputs), self.contrast)
        noting, row, shown = Noting(scoring), Row(self.processor.tokenizer), ""
        # Called on the class: the model's own loop, which asks `noting` for logits.
        for token in type(self.model).stream(noting, **self.inputs, **self.choices):
            row.add(int(token[0]), None if noting.last is None else noting.last[0])
            self.confidence, self.repeats = row.confidence, row.repeats
            text = self.processor.decode(torch.tensor([row.ids]))[0]
            # Half of a character that takes several byte tokens decodes to U+FFFD: wait for the rest.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
            if row.repeats:
                break
        yield text[len(shown) :]


class Row:
    """The tokens of an answer so far, and what is known about it; see `AnswerStream`."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.confidence: float | None = None
        self.repeats = False

    def add(self, token_id: int, scores: Tensor | None) -> None:
        """A token, and the scores [V] that it was chosen by."""
        self.ids.append(token_id)
        if scores is not None:
            sure = _probability(scores, token_id, self.tokenizer)
            self.confidence = min(sure, 1.0 if self.confidence is None else self.confidence)
        # A mask may well have one shape code in many of its places.
        is_shape = token_id in self.tokenizer.seg_ids
        self.repeats = not is_shape and self.ids[-MOST_REPEATS:] == [token_id] * MOST_REPEATS


class Noting:
    """A model that keeps what it scores on the way, so that nothing is read twice.

    It stands beside the model and changes nothing in it: another thread may use the same one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.last: Tensor | None = None  # [B, V]
        self.unfinished: Tensor | None = None  # [B], which rows have not ended; None: nothing is read on yet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """As the model's, and noted."""
        self.last = self.model.logits(hidden_states)
        return self.last

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: Any) -> Tensor:
        """As the model's, and noted which rows go on."""
        self.unfinished = unfinished
        hidden: Tensor = self.model.decode(token_ids, unfinished, cache)
        return hidden


def _probability(logits: Tensor, token_id: int, tokenizer: BaseTokenizer) -> float:
    """Of a token, or of all of its kind, after scores [V]."""
    kinds = (tokenizer.loc_ids, tokenizer.seg_ids)
    alike = next((kind for kind in kinds if token_id in kind), [token_id])
    return float(logits.float().softmax(dim=-1)[alike].sum())
