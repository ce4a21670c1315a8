"""The numbers of a model that a plan of its training needs, from its folder, without room for its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from minivlm.distributed.plan import Model
from minivlm.models.load import load_answering
from minivlm.models.quantized import require_plain
from minivlm.speed.checkpointing import blocks_of
from minivlm.training.finetuning import PARTS


def size_of(name: str | Path, freeze: Iterable[str] = ()) -> Model:
    """Of a model that answers. Its weights stay in the file, which is mapped and not read.

    freeze: of PARTS, what does not learn.

    Raises InputError: its weights are rounded; as `load_answering`.
    """
    model: Any = load_answering(name, dtype=None)[0]
    require_plain(model, "training")
    return numbers_of(
        model, [getattr(model, part) for each in freeze for part in PARTS[each] if hasattr(model, part)]
    )


def numbers_of(model: Any, frozen: Iterable[nn.Module] = ()) -> Model:
    """Of a model that answers, which may have been built on the meta device; `frozen` are parts of it."""
    text = model.language_model.config
    return Model(
        weights=_weights(model),
        learning=_weights(model) - sum(map(_weights, frozen)),
        block=max(map(_weights, blocks_of(model))),
        blocks=len(list(blocks_of(model))),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
    )


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
