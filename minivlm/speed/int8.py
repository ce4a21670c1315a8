"""int8 weights: every matrix of the decoder in half the bytes of bf16, with one scale for each row.

Writing a token reads every weight of the decoder once and does little else with it, so that its time is the
number of bytes divided by the speed of memory. Half the bytes are nearly twice the speed. Only weights are
rounded, to 255 steps a row, and nothing is calibrated: row i of a matrix is scale[i] times whole numbers from
-127 to 127. Activations stay in the model's dtype, unlike in LLM.int8() (https://arxiv.org/abs/2208.07339),
whose section 2 has this rounding under the name of row-wise absmax quantization.

One scale for a whole matrix would be ruled by its largest number, and all other rows would be left with few
steps. The image tower is left as it is: it runs once an answer, and its time is operations, not bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.speed.one_row import TiedHead

FEW_ROWS = 8  # up to here the product is faster with whole numbers than after turning them back
BLOCK = 2**21  # numbers turned back at a time: 4 MiB in bf16, which stay in the processor's cache
STEP = 64  # the kernel for few rows reads so many inputs at a time, and does not look where a row ends
SHORT = 8192  # inputs
PIECE = 256  # rows rounded at a time: rounding needs them in fp32, and so they stay in the cache
TINY = 1e-30  # for a row of zeros


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to whole numbers from -127 to 127 times its scale.

    Args:
        weight: [out, in].

    Returns:
        values [out, in] in int8, and scale [out] in the dtype of weight: weight is about
        values * scale[:, None], at most half a step away.
    """
    pieces = [_round(piece) for piece in weight.split(PIECE)]
    values, scales = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(scales)


def _round(rows: Tensor) -> tuple[Tensor, Tensor]:
    weight = rows.float()
    largest = weight.abs().amax(dim=1).clamp(min=TINY)
    scale = (largest / 127).to(rows.dtype)  # rounded first, so that the values fit the scale that is kept
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer without bias whose weight is int8, with a scale for each output."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """weight [out, in] in int8 and scale [out], as `quantize_rows` gives them."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        rows = x.flatten(0, -2)  # [B * T, in]
        few = x.device.type == "cpu" and len(rows) <= FEW_ROWS and rows.shape[1] % STEP == 0
        out = self._of_few(rows) if few else self._of_many(rows)
        return out.unflatten(0, x.shape[:-1])

    def _of_few(self, rows: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and len(rows) == 1 and rows.shape[1] <= SHORT:
            # A compiler makes one loop of this, which is faster than the kernel below for short rows.
            total = (self.weight.float() * rows.float()).sum(dim=-1)
            return (total * self.scale.float()).to(rows.dtype)[None]
        # Reads each whole number once and never writes the matrix out in a longer dtype.
        return torch._weight_int8pack_mm(rows, self.weight, self.scale)

    def _of_many(self, rows: Tensor) -> Tensor:
        # Whole numbers up to 127 are exact in bf16, and the scale of an output can wait until it is summed.
        blocks = self.weight.split(max(1, BLOCK // self.weight.shape[1]))
        return torch.cat([F.linear(rows, block.to(rows.dtype)) for block in blocks], dim=-1) * self.scale


class Int8Embedding(nn.Module):
    """An embedding table in int8. The same two tensors serve as the head where the two are tied."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """weight [V, D] in int8 and scale [V], as `quantize_rows` gives them."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] -> embeddings [..., D]."""
        return self.weight[input_ids].to(self.scale.dtype) * self.scale[input_ids][..., None]


def quantize_decoder(model: nn.Module) -> None:
    """Turn the matrices of `model.language_model` into int8, in place and one after the other.

    The result is for answering: it cannot be trained or saved.

    Raises:
        InputError: the decoder is quantized already.
    """
    decoder: Any = model.get_submodule("language_model")
    if any(isinstance(module, Int8Linear) for module in decoder.modules()):
        raise InputError("the decoder is in int8 already: quantize it once, or load the folder again")
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(*quantize_rows(child.weight.detach())))
    table = quantize_rows(decoder.embed_tokens.weight.detach())
    decoder.embed_tokens = Int8Embedding(*table)
    if decoder.lm_head is None or isinstance(decoder.lm_head, TiedHead):  # tied: the head is the table
        decoder.lm_head = Int8Linear(*table)
