"""Packed weights: every matrix in the memory layout that the processor's bf16 kernel reads.

In a file and in `nn.Linear`, a matrix is stored row by row. oneDNN's kernels, which multiply bf16 on x86
processors, need tiles, with the weights of two neighboring inputs side by side, and rearrange the matrix
before every product. That takes about a tenth of the time with the hundreds of rows of a prompt, and a third
with a batch of eight rows that write their answers (bench/results/inference.txt). Packing once, when the
model is loaded, removes this cost.

The price is a copy: seconds of loading, and memory for weights that otherwise are pages of the memory-mapped
file. The weights stay the same, and results agree up to rounding. Without AMX, a single row (one answer being
written) is faster with the file's order, which then is kept as well. With AMX, tiles do for every number of
rows, and the file's pages are given back. The embedding table is not packed, since tokens are looked up in
it, and neither is a head that is tied to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlm.attention import has_amx, onednn_has_bf16
from minivlm.errors import InputError
from minivlm.speed.one_row import is_one_row, linear
from minivlm.speed.pages import give_back
from minivlm.speed.replacing import replace_linear_layers

ROWS_PER_PRODUCT = 256  # a prompt's: the tiles are chosen for this many rows, and also work for fewer
SHORT_ROW = 8192  # inputs; up to here, a single row is faster without tiles on a processor without AMX


class PackedLinear(nn.Module):
    """A bf16 linear layer for inference only: it cannot be trained, moved to another device or saved."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_PER_PRODUCT))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        # No copy: these are pages of the memory-mapped file if the model runs in the file's dtype.
        self.row_major = weight if linear.in_features <= SHORT_ROW and not has_amx() else None
        if self.row_major is None:
            give_back(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.row_major is not None and is_one_row(x):
            return linear(x, self.row_major, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def check_packing(dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Raise InputError if a model in this dtype on this device cannot be packed; None is the file's dtype."""
    if torch.device(device).type != "cpu" or dtype not in (None, torch.bfloat16):
        raise InputError(
            f"packing is for bfloat16 on a CPU, but the model is {dtype or 'in the dtype of its file'} on "
            f"{device}: do not pack it, or load it that way"
        )
    if not onednn_has_bf16():
        raise InputError(
            "packing needs a processor with bf16 instructions and a PyTorch with oneDNN, but this machine "
            "lacks one of them: do not pack the model"
        )


def pack_matrices(model: nn.Module) -> None:
    """Pack the matrices of a model in place, one at a time.

    Raises:
        InputError: a matrix is not in bf16, or not on the CPU; no bf16 kernels; already packed.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("the model is already packed: pack it only once, or load the folder again")
    for matrix in matrices(model):
        check_packing(matrix.weight.dtype, matrix.weight.device)
    replace_linear_layers(model, PackedLinear)


def matrices(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that `pack_matrices` copies."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
