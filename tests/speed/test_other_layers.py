"""Where a matrix is put on from outside, as packing does, each system still computes the same.

This machine's processor may lack the instructions for packing; what stands in for a packed matrix here has
what a packed one has, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable

import deepseek_vl
import llama_vision
import pytest
import qwen2_5_vl
import qwen2_vl
import torch
import torch.nn.functional as F
from helpers import make_batch, tiny_paligemma, without_labels
from torch import Tensor, nn

Call = Callable[[], Tensor]


class OnlyForward(nn.Module):
    """A linear layer's weights, without its numbers of inputs and outputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def replace_matrices(model: nn.Module) -> int:
    """Returns how many there were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, OnlyForward(child))
                count += 1
    return count


def _paligemma() -> tuple[nn.Module, Call]:
    model, batch = tiny_paligemma(), without_labels(make_batch([3, 5], [2, 1], [True, False]))
    return model, lambda: model(**batch).logits


def _qwen2_vl() -> tuple[nn.Module, Call]:
    model, _ = qwen2_vl.pair()
    return model, lambda: model(**qwen2_vl.pictures()).logits


def _qwen2_5_vl() -> tuple[nn.Module, Call]:
    model, _ = qwen2_5_vl.pair()
    return model, lambda: model(**qwen2_vl.pictures()).logits


def _deepseek_vl() -> tuple[nn.Module, Call]:
    model, _ = deepseek_vl.hybrid_pair()
    return model, lambda: model.encode_image(**deepseek_vl.PICTURES)


def _llama_vision() -> tuple[nn.Module, Call]:
    model, _ = llama_vision.pair()
    ids = llama_vision.IDS
    return model, lambda: model.encode_image(llama_vision.pixels(), ids)


SYSTEMS = {
    "paligemma": _paligemma,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "deepseek_vl": _deepseek_vl,
    "llama_vision": _llama_vision,
}


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_a_matrix_is_asked_for_its_product_only(name: str) -> None:
    model, compute = SYSTEMS[name]()
    before = compute()
    assert replace_matrices(model.eval()) > 10
    torch.testing.assert_close(compute(), before)
