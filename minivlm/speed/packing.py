"""Packed weights: every matrix in the order in which the processor's bf16 product reads it.

In a file, and in `nn.Linear`, a matrix lies row after row. The kernels of oneDNN, which multiply bf16 on x86
processors, want it in tiles, with the numbers of two neighboring inputs side by side, and rearrange it before
every product. With the hundreds of rows of a prompt that is about a tenth of the time, with the eight rows
of a batch that writes its answers a third (bench/results/inference.txt). Packed once, when the model is
loaded, it costs nothing any more.

The price is a copy: seconds of loading, and memory for weights that otherwise are pages of the mapped file.
The numbers stay the same, and so do results up to rounding. A single row, one answer being written, goes on
reading the file's own order where that is faster. The embedding table stays as it is, since words are looked
up in it, and where it is the head as well, so does the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.speed.one_row import is_one_row, linear, onednn_has_bf16

ROWS = 256  # that the tiles are chosen for: a prompt's. They serve fewer rows as well
SHORT = 8192  # inputs up to which PyTorch's own kernel reads a matrix faster for one row than tiles are read


class PackedLinear(nn.Module):
    """A linear layer in bf16 for answering: it cannot be trained, moved to another device or saved."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, ROWS))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        # No copy: these are pages of the mapped file, if the model computes in the file's dtype.
        self.in_rows = weight if linear.in_features <= SHORT else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.in_rows is not None and is_one_row(x):
            return linear(x, self.in_rows, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def check_packing(dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Raises InputError: a model in this dtype on this device cannot be packed; None is the file's dtype."""
    if torch.device(device).type != "cpu" or dtype not in (None, torch.bfloat16):
        raise InputError(
            f"packing is for bfloat16 on a CPU, and the model is to be {dtype or 'as its file is'} on "
            f"{device}: leave it out, or choose these"
        )
    if not onednn_has_bf16():
        raise InputError(
            "packing needs a processor with bf16 instructions and a PyTorch with oneDNN, and this machine "
            "lacks one of them: leave it out"
        )


def pack_matrices(model: nn.Module) -> None:
    """Pack the matrices of a model in place, one after the other.

    Raises:
        InputError: a matrix is not in bf16, or is not on the CPU; no bf16 kernels; packed already.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("the model is packed already: pack it once, or load the folder again")
    for matrix in matrices(model):
        check_packing(matrix.weight.dtype, matrix.weight.device)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child))


def matrices(model: nn.Module) -> list[nn.Linear]:
    """What `pack_matrices` copies."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
