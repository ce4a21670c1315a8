"""int8 weights: every matrix of the decoder in half the bytes of bf16, with one scale per row.

Writing a token reads every weight of the decoder once and does little else, so its time is the number of
bytes divided by the memory bandwidth. Halving the bytes nearly doubles the speed. Only weights are rounded,
to 255 levels per row, without calibration: row i of a matrix is scale[i] times integers from -127 to 127.
Activations stay in the model's dtype, unlike in LLM.int8() (https://arxiv.org/abs/2208.07339), whose section
2 describes this rounding as row-wise absmax quantization.

A single scale for a whole matrix would be set by its largest weight and leave most rows with only a few
levels. The image tower is not quantized: it runs once per answer and is limited by arithmetic, not by memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.speed.one_row import TiedHead
from minivlm.speed.pages import give_back
from minivlm.speed.replacing import replace_linear_layers
from minivlm.speed.widened import product

FEW_ROWS = 8  # up to this many rows in bf16, the int8 kernel is faster than converting the weights back
WEIGHTS_PER_BLOCK = 2**21  # converted back at a time: 4 MiB in bf16, which stay in the processor's cache
KERNEL_STEP = 64  # inputs that the int8 kernel reads at a time, without checking where a row ends
SHORT_ROW = 8192  # inputs; up to here, compiled code is faster than the int8 kernel
ROWS_PER_PIECE = 256  # rounded at a time: rounding needs them in fp32, and this many stay in the cache
EPS = 1e-30  # keeps the scale of a row of zeros above 0


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to integers from -127 to 127 times its scale.

    Args:
        weight: [out, in].

    Returns:
        values [out, in] in int8, and scale [out] in the dtype of weight: values * scale[:, None] is at most
        half a step away from weight.
    """
    pieces = [_round(piece) for piece in weight.split(ROWS_PER_PIECE)]
    values, scales = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(scales)


def _round(rows: Tensor) -> tuple[Tensor, Tensor]:
    weight = rows.float()
    largest = weight.abs().amax(dim=1).clamp(min=EPS)
    scale = (largest / 127).to(rows.dtype)  # rounded first, so that the values match the stored scale
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per output. A bias stays as it is."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in] in int8 and scale [out], as `quantize_rows` returns them, and bias [out]."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = weight.shape

    def plain(self) -> Tensor:
        """The weight [out, in] in fp32."""
        return self.weight.float() * self.scale.float()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        rows = x.flatten(0, -2)  # [B * T, in]
        few = x.device.type == "cpu" and rows.dtype == torch.bfloat16 and len(rows) <= FEW_ROWS
        if torch.compiler.is_compiling() and len(rows) == 1 and rows.shape[1] <= SHORT_ROW:
            # torch.compile fuses this into one loop, which is faster than the kernel below for short rows.
            total = (self.weight.float() * rows.float()).sum(dim=-1)
            out = (total * self.scale.float()).to(rows.dtype)[None]
        elif few and rows.shape[1] % KERNEL_STEP == 0:
            # Reads each int8 weight once and never writes the matrix in a wider dtype. Slow in fp32.
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            # Integers up to 127 are exact in bf16, and an output can be scaled after it is summed.
            blocks = self.weight.split(max(1, WEIGHTS_PER_BLOCK // self.weight.shape[1]))
            out = torch.cat([product(rows, block.to(rows.dtype)) for block in blocks], dim=-1) * self.scale
        out = out if self.bias is None else out + self.bias
        return out.unflatten(0, x.shape[:-1])


class Int8Embedding(nn.Module):
    """An embedding table in int8. A tied head uses the same two tensors."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """weight [V, D] in int8 and scale [V], as `quantize_rows` returns them."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] -> embeddings [..., D]."""
        return self.weight[input_ids].to(self.scale.dtype) * self.scale[input_ids][..., None]


def bias_of(layer: nn.Linear) -> Tensor | None:
    """What is added after the product."""
    return None if layer.bias is None else layer.bias.detach()


def quantize_table(decoder: Any) -> None:
    """Convert the embedding table and the head to int8, in place. A tied head stays the table."""
    head = decoder.lm_head
    table = _rounded_rows(decoder.embed_tokens.weight.detach())
    give_back(decoder.embed_tokens.weight)
    decoder.embed_tokens = Int8Embedding(*table)
    if head is None or isinstance(head, TiedHead):
        decoder.lm_head = Int8Linear(*table)
    else:
        decoder.lm_head = _rounded(head)


def _rounded(layer: nn.Linear) -> Int8Linear:
    rounded = Int8Linear(*_rounded_rows(layer.weight.detach()), bias_of(layer))
    give_back(layer.weight)
    return rounded


def _rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows`; of a weight on the meta device, shapes alone."""
    if weight.is_meta:  # where rounding would import PyTorch's compiler, which takes seconds
        return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight))
    return quantize_rows(weight)


def decoder_to_quantize(model: nn.Module) -> Any:
    """`model.language_model`. Raises InputError: it scores words with more than a matrix."""
    decoder = model.get_submodule("language_model")
    if not hasattr(decoder, "lm_head"):
        raise InputError(f"{type(decoder).__name__} has no head to round: leave quantize out")
    return decoder


def quantize_decoder(model: nn.Module) -> None:
    """Convert the matrices of `model.language_model` to int8, in place and one at a time.

    The result is for inference only, and is saved by `minivlm.models.quantized`.

    Raises:
        InputError: the decoder is already quantized, or scores words in a way of its own.
    """
    decoder = decoder_to_quantize(model)
    if any(isinstance(module, Int8Linear) for module in decoder.modules()):
        raise InputError("the decoder is already in int8: quantize it only once, or load the folder again")
    quantize_table(decoder)  # first, while little else is held: it is the largest
    replace_linear_layers(decoder, _rounded)
