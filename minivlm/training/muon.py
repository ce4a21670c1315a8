"""Muon (https://kellerjordan.github.io/posts/muon/) on machines that are slow in bf16.

Muon gives each step of a matrix the same size in all directions: it replaces the gradient, which is large in
a few of them, by the nearest matrix whose singular values are all about 1. `torch.optim.Muon` computes it in
bf16. On a CPU without instructions for bf16 this takes as long as the rest of a training step, so there it is
computed in fp32 here, by the same formula; everywhere else the step is PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minivlm.training.precision import bf16_pays


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with the same arguments and the same state."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of optimization."""
        if closure is not None or bf16_pays(self.param_groups[0]["params"][0].device):
            return torch.optim.Muon.step(self, closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)
        return None

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rate, momentum = self.state[weight], group["lr"], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        step = torch.lerp(gradient, mean, momentum) if group["nesterov"] else mean
        step = evened(step, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = weight.shape
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(step, alpha=-rate * math.sqrt(max(1, rows / columns)))


def evened(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The matrix with singular values of about 1, by Newton-Schulz iterations in its own dtype.

    Each step applies a x + b x^3 + c x^5 to all singular values x at once.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller square is cheaper
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
