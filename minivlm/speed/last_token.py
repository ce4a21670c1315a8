"""A prompt's last block computes its MLP for one token a row.

Reading a prompt fills the cache and ends with the hidden state of each row's last token, which chooses the
first word. The last block still has to attend for all tokens, since their keys and values are stored before.
Its MLP, two thirds of a block's work or more, is needed for the last tokens alone: 4 % of a prompt's
operations in PaliGemma (`minivlm.models.sizes.prefill_operations`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.speed.pieces import GatedMLPInPieces
from minivlm.speed.replacing import replaced

_places: ContextVar[Tensor | None] = ContextVar("places", default=None)


class LastTokenMLP(GatedMLPInPieces):
    """The MLP of the last block. While a prompt is read, other tokens than the last ones get zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        places = _places.get()  # [B]
        if places is None:
            return super().forward(x)
        rows, out = torch.arange(len(x), device=x.device), torch.zeros_like(x)
        out[rows, places] = super().forward(x[rows, places])
        return out


def last_places(attention_mask: Tensor) -> Tensor:
    """Where the last token of each row is, on whichever side it is padded: [B, T] -> [B]."""
    return torch.where(attention_mask.bool(), attention_mask.cumsum(dim=1), 0).argmax(dim=1)


def skip_unread(model: nn.Module) -> nn.Module:
    """The model with a `prefill` that leaves out what nobody reads; other models come back as they are."""
    decoder: Any = getattr(model, "language_model", None)
    if not hasattr(model, "prefill") or decoder is None:
        return model
    last: Any = decoder.layers[-1]
    if type(last.mlp) is not GatedMLPInPieces:
        return model
    last.mlp = replaced(last.mlp, LastTokenMLP)
    return replaced(model, _that_skips(type(model)))


def _that_skips(kind: Any) -> type[nn.Module]:
    """The class of a model, with another `prefill`."""

    def prefill(self: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **inputs: Any) -> Any:
        """As in the class below, without the last MLP of the tokens before the last."""
        with _reading_only(last_places(attention_mask)):
            return kind.prefill(self, input_ids, attention_mask, *args, **inputs)

    names = {name: getattr(kind, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(kind.__name__, (kind,), {"prefill": prefill, **names})


@contextmanager
def _reading_only(places: Tensor) -> Iterator[None]:
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)
