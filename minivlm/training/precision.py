"""Weights in fp32 that the optimizers hold, and a copy that computes, in bf16 where it helps.

bf16 has 8 bits for the digits of a number. That is fine enough for multiplying, and halves the work where the
processor multiplies bf16 in hardware. It is too coarse for learning: a step of a thousandth of a weight is
rounded away. So the optimizers change the weights in fp32 (the masters), and the copy follows them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def bf16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def collect_gradients(masters: nn.Module, working: nn.Module) -> None:
    """Add the gradients of the working copy to those of the masters, in fp32, and clear them in the copy.

    If both are the same module, there is nothing to do. Likewise in `follow_masters`.
    """
    if working is masters:
        return
    for master, copied in zip(masters.parameters(), working.parameters(), strict=True):
        if copied.grad is not None:
            gradient = copied.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            copied.grad = None


def follow_masters(masters: nn.Module, working: nn.Module) -> None:
    """Give the working copy the weights of the masters, rounded to its dtype."""
    if working is masters:
        return
    copies: list[Tensor] = list(working.parameters())
    with torch.no_grad():
        torch._foreach_copy_(copies, list(masters.parameters()))
