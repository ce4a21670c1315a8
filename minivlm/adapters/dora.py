"""DoRA (https://arxiv.org/abs/2402.09353): a change of the direction of each row, and of its length.

    W' = m (W + s B A) / ||W + s B A||          one norm and one number of m for each row, an output

m starts as the norms of W, so that the model answers as without at first. For the gradient, the norm is a
constant, as the paper has it in section 4.3. The paper writes of columns: its W is transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minivlm.adapters.lora import LowRank, Rows
from minivlm.errors import InputError
from minivlm.speed.int4 import Int4Linear
from minivlm.speed.int8 import Int8Linear


def plain_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer in fp32, [out, in]. Raises InputError: it is packed."""
    weight: Any = layer.weight
    if isinstance(layer, Int8Linear | Int4Linear):
        return layer.plain().float()
    if weight.is_mkldnn:
        raise InputError("the weights are packed, and cannot be read: load the model without packing")
    return weight.float()


class DoraChange(LowRank):
    """A change of low rank, after which every row gets a length of its own."""

    def __init__(self, in_features: int, out_features: int, *args: Any, **options: Any) -> None:
        super().__init__(in_features, out_features, *args, **options)
        self.magnitude = nn.Parameter(torch.ones(out_features))
        self._kept: dict[int, tuple[tuple[int, ...], Tensor]] = {}

    @torch.no_grad()
    def start_at(self, weight: Tensor, rows: Rows) -> None:
        """Lengths with which nothing changes yet."""
        self.magnitude[rows] = (weight + self.change(rows)).norm(dim=1)

    def adapt(self, y: Tensor, x: Tensor, base: nn.Module, rows: Rows) -> Tensor:
        """y = W x + b -> m / ||W + s B A|| (W x + s B A x) + b."""
        bias = getattr(base, "bias", None)
        plain = y if bias is None else y - bias
        adapted = self.factor(base, rows) * (plain + self(x, rows))
        return adapted if bias is None else adapted + bias

    def merged(self, weight: Tensor, rows: Rows) -> Tensor:
        """m (W + s B A) / ||W + s B A||."""
        changed = weight + self.change(rows)
        return self.magnitude[rows, None] * changed / changed.norm(dim=1, keepdim=True)

    def factor(self, base: nn.Module, rows: Rows) -> Tensor:
        """m / ||W + s B A||, [rows].

        The norm reads the whole matrix, which writing a token does only once otherwise. So without gradients
        it is computed once, and again when one of its tensors was written to.
        """
        weight: Any = base.weight
        tensors = (weight, self.lora_A, self.lora_B, self.magnitude)
        unknown = torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors)
        if torch.is_grad_enabled() or unknown:
            return self._factor(base, rows)
        now = (id(weight), *(tensor._version for tensor in tensors))
        kept = self._kept.get(id(base))
        if kept is None or kept[0] != now or kept[1].device != self.magnitude.device:
            kept = self._kept[id(base)] = (now, self._factor(base, rows))
        return kept[1]

    def _factor(self, base: nn.Module, rows: Rows) -> Tensor:
        with torch.no_grad():
            norm = (plain_weight(base) + self.change(rows)).norm(dim=1)
        return self.magnitude[rows] / norm
