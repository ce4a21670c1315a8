"""int4 weights: the matrices of the decoder's blocks in a third of the bytes of bf16, rounded by groups.

Sixteen levels are few. So it is not a whole row that shares a scale, as in int8.py, but `GROUP` neighbors in
it. A group also has a middle, since its weights are seldom spread evenly around 0:

    w = scale * (value - 8) + middle          value from 0 to 15; the lowest weight becomes 0, the highest 15

With both numbers in bf16, a weight takes 5 bits. Rounding needs no calibration. The embedding table and the
head stay in int8: they are met by every token, and reading the table needs single rows. As a base that only
an adapter changes, this is the idea of QLoRA (https://arxiv.org/abs/2305.14314), whose levels are not evenly
spaced and whose scales are rounded as well.

The kernel of PyTorch for few rows wants the values of some rows interleaved, in an order that depends on the
processor. It is found out once, so that they can be read back as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.speed.int8 import (
    EPS,
    WEIGHTS_PER_BLOCK,
    Int8Linear,
    bias_of,
    decoder_to_quantize,
    quantize_table,
)
from minivlm.speed.pages import give_back
from minivlm.speed.replacing import replace_linear_layers
from minivlm.speed.widened import product

GROUP = 32  # weights with one scale; the kernel knows 32, 64, 128 and 256
GROUPS = (32, 64, 128, 256)
FEW_ROWS = 32  # up to this many rows in bf16, the kernel is faster than converting the weights back
ROWS_PER_PIECE = 256  # rounded and packed at a time; the order of values repeats within it


def quantize_groups(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group of neighbors in a row to 16 levels.

    Args:
        weight: [out, in], where `group` divides `in`.

    Returns:
        values [out, in] in uint8, from 0 to 15; scale and middle, both [out, in / group] in weight's dtype.
    """
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    # Both are rounded first, so that the values match what is stored.
    scale = ((high - low) / 15).to(weight.dtype)
    middle = (low + 8 * scale.float()).to(weight.dtype)
    steps = (groups - middle.float()[..., None]) / scale.float().clamp(min=EPS)[..., None]
    return (steps + 8).round().clamp(0, 15).to(torch.uint8).flatten(1), scale, middle


def dequantize_groups(values: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """The weight [out, in] that `quantize_groups` has rounded, in the dtype of scale."""
    steps = values.unflatten(1, (scale.shape[1], -1)).to(scale.dtype) - 8
    return torch.addcmul(middle[..., None], steps, scale[..., None]).flatten(1)


class Order(NamedTuple):
    """How a kernel wants values.

    In a block, those of a column follow each other, two to a byte, the lower half first.
    """

    size: int  # how many rows form a block
    place: Tensor  # [size], where among the values of a column each row comes


@cache
def interleaved() -> Order:
    """The order of this processor's kernel."""
    rows = torch.arange(64, dtype=torch.int32)[:, None].expand(64, 2)
    digits = [_pack(digit.contiguous()) for digit in (rows % 16, rows // 16)]
    low, high = (torch.stack([packed & 15, packed >> 4], dim=-1).flatten() for packed in digits)
    order = low + 16 * high
    size = 32 if int(order[:64].max()) < 32 else 64
    return Order(size, order[:size].argsort())


def _pack(values: Tensor) -> Tensor:
    """values [out, in] in int32 -> [out, in / 2], as the kernel wants them."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    return packed


def pack_values(values: Tensor) -> Tensor:
    """values [out, in] from 0 to 15 -> two to a byte, [out, in / 2]. Blocks of rows divide `out`."""
    return torch.cat([_pack(piece.int()) for piece in values.split(ROWS_PER_PIECE)])


def unpack_values(packed: Tensor, order: Order | None = None) -> Tensor:
    """The values [out, in] in uint8 of whole blocks of rows, packed in an order; None: this processor's."""
    size, place = interleaved() if order is None else order
    columns = 2 * packed.shape[1]
    by_column = packed.reshape(-1, columns, size // 2).transpose(1, 2).contiguous()  # [blocks, size / 2, in]
    rows = torch.stack([by_column & 15, by_column >> 4], dim=2).flatten(1, 2)  # [blocks, size, in]
    return rows[:, place.to(packed.device)].flatten(0, 1)


class Int4Linear(nn.Module):
    """A linear layer with int4 weights, and scale and middle of each group. A bias stays as it is.

    Outputs are filled up to whole blocks and inputs to whole groups, with zeros that nothing reads.
    """

    weight: Tensor  # [out, in / 2] in uint8, as the kernel wants it
    scales: Tensor  # [groups, out, 2]: scale and middle
    bias: Tensor | None

    def __init__(self, weight: Tensor, group: int = GROUP, bias: Tensor | None = None) -> None:
        """weight [out, in], to be rounded, and bias [out]. On the meta device, shapes are all that is made.

        Raises InputError: a group that the kernel does not know.
        """
        super().__init__()
        if group not in GROUPS:
            raise InputError(f"a group has {group} weights: choose from {', '.join(map(str, GROUPS))}")
        self.group = group
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)
        if weight.is_meta:
            self.register_buffer("weight", weight.new_empty(0, 0, dtype=torch.uint8))
            self.register_buffer("scales", weight.new_empty(0, 0, 2))
            self.make_room(interleaved())
            return
        size, _ = interleaved()
        weight = F.pad(weight, (0, -self.in_features % group, 0, -self.out_features % size))
        pieces = [self._round(piece) for piece in weight.split(ROWS_PER_PIECE)]
        self.register_buffer("weight", torch.cat([packed for packed, _ in pieces]))
        self.register_buffer("scales", torch.cat([scales for _, scales in pieces], dim=1).contiguous())

    def make_room(self, order: Order) -> None:
        """Take the shapes of a layer that is packed in an order, without values."""
        rows = self.out_features + -self.out_features % order.size
        columns = self.in_features + -self.in_features % self.group
        self.weight = self.weight.new_empty(rows, columns // 2)
        self.scales = self.scales.new_empty(columns // self.group, rows, 2)

    def repack(self, order: Order) -> None:
        """Pack values that another processor has packed as this one wants them."""
        filled = -self.out_features % interleaved().size
        values = unpack_values(self.weight, order)[: self.out_features]
        self.weight = pack_values(F.pad(values, (0, 0, 0, filled), value=8))
        self.scales = F.pad(self.scales[:, : self.out_features], (0, 0, 0, filled))

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        values, scale, middle = quantize_groups(weight, self.group)
        return pack_values(values), torch.stack([scale.T, middle.T], dim=-1)

    def plain(self) -> Tensor:
        """The weight [out, in], in the dtype of its scales."""
        return self._rows(0, len(self.weight))[: self.out_features, : self.in_features]

    def _rows(self, first: int, last: int) -> Tensor:
        scale, middle = self.scales[:, first:last].unbind(dim=-1)
        return dequantize_groups(unpack_values(self.weight[first:last]), scale.T, middle.T)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        rows = x.flatten(0, -2)  # [B * T, in]
        if rows.requires_grad:
            out: Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        else:
            out = self.multiply(rows)
        out = out if self.bias is None else out + self.bias
        return out.unflatten(0, x.shape[:-1])

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [n, in] -> [n, out], without a gradient."""
        rows = F.pad(rows, (0, -self.in_features % self.group))
        few = rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and len(rows) <= FEW_ROWS
        out = self._few_rows(rows) if few else self._many_rows(rows)
        return out[:, : self.out_features]

    def _few_rows(self, rows: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), self.weight, self.group, self.scales
        )
        return out

    def _many_rows(self, rows: Tensor) -> Tensor:
        size, _ = interleaved()
        step = max(1, WEIGHTS_PER_BLOCK // (2 * self.weight.shape[1]) // size) * size
        starts = range(0, len(self.weight), step)
        return torch.cat([product(rows, self._rows(start, start + step)) for start in starts], dim=-1)


class _Product(torch.autograd.Function):
    """The product with a gradient for the rows. Until then no weight is kept: it is converted back again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: Int4Linear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return product(gradient, ctx.layer.plain().T), None


def quantize_decoder_to_int4(model: nn.Module, group: int = GROUP) -> None:
    """Convert the matrices of `model.language_model` to int4, and its table and head to int8, in place.

    The result is saved by `minivlm.models.quantized`. Adapters can be trained on it, see `minivlm.adapters`.

    Raises:
        InputError: the decoder is already quantized, or scores words in a way of its own.
    """
    decoder = decoder_to_quantize(model)
    if any(isinstance(module, Int4Linear | Int8Linear) for module in decoder.modules()):
        raise InputError("the decoder is already quantized: do it only once, or load the folder again")

    def rounded(layer: nn.Linear) -> Int4Linear:
        new = Int4Linear(layer.weight.detach(), group, bias_of(layer))
        give_back(layer.weight)
        return new

    quantize_table(decoder)
    replace_linear_layers(decoder, rounded)


def bytes_in_int4(decoder: nn.Module, dtype: torch.dtype | None, group: int = GROUP) -> int:
    """What a decoder that is not rounded yet will take, with scales of a dtype; None: that of its weights."""
    matrices = [
        (name, module.weight) for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
    ]
    small = sum(weight.numel() for name, weight in matrices if name != "lm_head")
    scale = (dtype or next(decoder.parameters()).dtype).itemsize
    others = sum(weight.numel() for weight in decoder.parameters()) - small
    return others + round(small * (0.5 + 2 * scale / group))
