"""Folders whose decoder is rounded already: written once, and opened as fast as a plain one.

Rounding reads every weight each time that a model is loaded. A folder that is written after it holds half of
bf16's bytes or a third, which are mapped into memory and read when they are first used. Its answers are those
of rounding while loading, bit for bit.

config.json says so, beside all that it said before:

    "quantization_config": {"quant_method": "minivlm", "version": 1, "weights": "int8"}
    "quantization_config": {..., "weights": "int4", "group_size": 32, "order": [0, 2, 4, ...]}

The weights lie in a file of another name, under the names of our modules. transformers (5.23) warns of a
`quant_method` that it does not know, skips it, and would draw the matrices that it misses at random. So it
has to find no weights at all, and refuses; so does a minivlm from before these folders.

int4 is stored in the order that the kernel of one processor wants. Where it is that of this one, too, nothing
is copied; elsewhere the values are packed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivlm.checkpoints.weights import Rounding, rounded_by
from minivlm.errors import InputError
from minivlm.files import folder_aside
from minivlm.processing import AnswerProcessor
from minivlm.speed.int4 import GROUP, Int4Linear, Order, interleaved, quantize_decoder_to_int4
from minivlm.speed.int8 import Int8Embedding, Int8Linear, quantize_decoder

FORMS = ("int8", "int4")
SECTION, METHOD, VERSION = "quantization_config", "minivlm", 1
HEAD = "language_model.lm_head."


@dataclass(frozen=True)
class Quantization:
    """What a folder says about its rounded weights."""

    weights: str  # of `FORMS`
    group_size: int = GROUP  # of int4
    order: Order | None = None  # of int4

    @classmethod
    def from_dict(cls, name: object, values: Mapping[str, Any]) -> Quantization | None:
        """From the whole config.json of the folder `name`; None: its weights are not rounded.

        Raises InputError: they are rounded in a way that is not known here.
        """
        section = values.get(SECTION)
        if not section:
            return None
        found = section if isinstance(section, Mapping) else {}
        if found.get("quant_method") != METHOD:
            raise InputError(
                f"{name} holds quantized weights (quant_method {found.get('quant_method')!r}), "
                "which are not supported here: use the folder that they were made from, and quantize it when "
                "loading"
            )
        form, version = found.get("weights"), found.get("version")
        if version != VERSION or form not in FORMS:
            raise InputError(
                f"{name} holds weights in {form!r} of version {version!r}, and this minivlm knows "
                f"{' and '.join(FORMS)} of version {VERSION}: use the minivlm that wrote the folder, or a "
                "later one"
            )
        return cls(form) if form == "int8" else cls(form, *_int4_settings(name, found))

    def to_dict(self) -> dict[str, Any]:
        """The section of config.json."""
        values: dict[str, Any] = {"quant_method": METHOD, "version": VERSION, "weights": self.weights}
        if self.order is not None:
            values |= {"group_size": self.group_size, "order": self.order.place.tolist()}
        return values

    def applied(self, leave_out: tuple[str, ...] = ()) -> AbstractContextManager[None]:
        """A system that opens or writes its folder inside does so with a rounded decoder."""
        return rounded_by(Rounding(self._replace, self._finish, {SECTION: self.to_dict()}, leave_out))

    def _replace(self, model: nn.Module) -> None:
        """The same rounding on shapes alone. A tied head has no tensors of its own in the file."""
        decoder: Any = model.get_submodule("language_model")
        tied = decoder.lm_head is None
        if self.weights == "int8":
            quantize_decoder(model)
        else:
            quantize_decoder_to_int4(model, self.group_size)
        if tied:
            decoder.lm_head = None
        for layer in _layers(model) if self._is_foreign else ():
            assert self.order is not None
            layer.make_room(self.order)

    def _finish(self, model: nn.Module) -> None:
        decoder: Any = model.get_submodule("language_model")
        if decoder.lm_head is None:
            decoder.lm_head = Int8Linear(decoder.embed_tokens.weight, decoder.embed_tokens.scale)
        for layer in _layers(model) if self._is_foreign else ():
            assert self.order is not None
            layer.repack(self.order)

    @property
    def _is_foreign(self) -> bool:
        """Whether the values are packed for another processor."""
        return self.order is not None and not torch.equal(self.order.place, interleaved().place)


def _int4_settings(name: object, found: Mapping[str, Any]) -> tuple[int, Order]:
    group, place = found.get("group_size"), found.get("order")
    if not isinstance(group, int) or not isinstance(place, list) or sorted(place) != list(range(len(place))):
        raise InputError(
            f"{name} has a {SECTION} with group_size {group!r} and order {place!r}: download config.json "
            "again"
        )
    return group, Order(len(place), torch.tensor(place))


def _layers(model: nn.Module) -> list[Int4Linear]:
    return [module for module in model.modules() if isinstance(module, Int4Linear)]


def quantization_of(model: nn.Module) -> Quantization | None:
    """How the decoder of a loaded model is rounded, or None."""
    layers = _layers(model)
    if layers:
        return Quantization("int4", layers[0].group, interleaved())
    rounded = any(isinstance(module, Int8Linear | Int8Embedding) for module in model.modules())
    return Quantization("int8") if rounded else None


def require_plain(model: nn.Module, what: str) -> None:
    """Raises InputError: the model's weights are rounded; `what` needs them as they were."""
    found = quantization_of(model)
    if found is not None:
        raise InputError(
            f"{what} needs the weights as they were, and those of this model are in {found.weights}: use the "
            "folder that they were made from"
        )


def save_quantized(model: Any, processor: AnswerProcessor, folder: str | Path) -> None:
    """Write a new folder that `minivlm.load` opens: its decoder as it is, rounded.

    >>> model, processor = load("google/paligemma-3b-mix-224", dtype=None, quantize="int8")
    >>> save_quantized(model, processor, "paligemma-int8")

    It appears under its name when it is complete. Of another program or of training, it is of no use.

    Raises InputError: the model is not quantized, wears adapters, or is on another device than the CPU; there
    is something of this name already, or it cannot be written.
    """
    found = quantization_of(model)
    if found is None:
        raise InputError('the model is not quantized: load it with quantize="int8" or "int4"')
    if any(tensor.device.type != "cpu" for tensor in model.state_dict().values()):
        raise InputError("the model is not on the CPU: load it there, and write the folder from there")
    decoder = model.language_model
    tied = decoder.lm_head.weight is decoder.embed_tokens.weight
    with folder_aside(Path(folder)) as aside, found.applied(leave_out=(HEAD,) if tied else ()):
        processor.save_pretrained(aside)
        model.save_pretrained(aside)
