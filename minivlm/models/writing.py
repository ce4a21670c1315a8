"""What every system that writes has beside its formula: the loss of the next token, and generation.

PaliGemma does not use this file and says the same in its own words, since notebook 06 builds it line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.generate import generate, last_token_indices, stream
from minivlm.models.protocols import ContextLength


@dataclass
class WritingOutput:
    """logits [B, S, V], and the loss if labels were given."""

    logits: Tensor
    loss: Tensor | None = None


class WritingConfig(Protocol):
    """Where an answer ends, and how much a decoder reads."""

    @property
    def pad_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int | tuple[int, ...]: ...
    @property
    def text(self) -> ContextLength: ...


class ImageTokens(WritingConfig, Protocol):
    """And how a picture stands in a row of input_ids."""

    @property
    def num_image_tokens(self) -> int: ...  # placeholders of one picture
    @property
    def image_token_id(self) -> int: ...


class Writes(nn.Module):
    """A model with `prefill`, `decode` and `logits`, and what follows from them."""

    config: WritingConfig

    def prefill(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As `minivlm.generate.Decodable`."""
        raise NotImplementedError

    def decode(self, token_ids: Tensor, unfinished: Tensor, cache: Any) -> Tensor:
        """As `minivlm.generate.Decodable`."""
        raise NotImplementedError

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., D] -> scores [..., V]."""
        raise NotImplementedError

    def output(self, hidden_states: Tensor, labels: Tensor | None) -> WritingOutput:
        """Scores of all positions, and the loss if there are labels [B, S], -100 where there is none."""
        logits = self.logits(hidden_states)
        return WritingOutput(logits, None if labels is None else next_token_loss(logits, labels))

    def loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """The loss of `output` alone, without the scores of places whose next token has no label.

        hidden_states [B, S, D], labels [B, S]. A picture's places and a prompt's are most of a row.
        """
        following = labels[:, 1:]
        wanted = following != -100
        return F.cross_entropy(self.logits(hidden_states[:, :-1][wanted]).float(), following[wanted])

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, **kwargs: Any) -> Tensor:
        """New tokens only, [B, n], padded after each row's end. Arguments as in `minivlm.generate.stream`."""
        return generate(self, input_ids, max_new_tokens=max_new_tokens, **self._limits(), **kwargs)

    def stream(self, input_ids: Tensor, max_new_tokens: int = 64, **kwargs: Any) -> Iterator[Tensor]:
        """The same, token by token: yields [B] as soon as it is known."""
        return stream(self, input_ids, max_new_tokens=max_new_tokens, **self._limits(), **kwargs)

    def _limits(self) -> dict[str, Any]:
        return {
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id,
            "max_length": self.config.text.max_position_embeddings,
        }


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, over the positions whose label is not -100.

    logits [B, S, V] at position t are compared with labels [B, S] at t + 1.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def last_hidden_states(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Of each row's last real token, whichever side is padded: [B, S, D], [B, S] -> [B, D]."""
    last = last_token_indices(attention_mask)
    return hidden_states[torch.arange(len(last), device=last.device), last]
