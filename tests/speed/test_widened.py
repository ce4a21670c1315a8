"""Many rows in bf16 are multiplied in fp32 where the processor lacks bf16, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.models.load import load_answering
from minivlm.speed import widened
from minivlm.speed.widened import FEW_ROWS, product
from minivlm.world.demo import SAMPLES

BF16 = torch.bfloat16
MANY = FEW_ROWS + 1


@pytest.fixture
def widens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product that was widened, on a processor without bf16 or one that pretends to be."""
    monkeypatch.setattr(widened, "onednn_has_bf16", lambda: False)
    seen: list[int] = []
    right = widened._Product.apply

    def watched(rows: Tensor, weight: Tensor) -> Any:
        seen.append(len(rows))
        return right(rows, weight)

    monkeypatch.setattr(widened._Product, "apply", watched)
    return seen


@pytest.mark.parametrize(
    ("x", "dtype", "expected"),
    [
        (torch.zeros(MANY, 8, dtype=BF16), BF16, [MANY]),
        (torch.zeros(2, MANY, 8, dtype=BF16), BF16, [2 * MANY]),
        (torch.zeros(FEW_ROWS, 8, dtype=BF16), BF16, []),
        (torch.zeros(MANY, 8), torch.float32, []),
        (torch.zeros(MANY, 8, dtype=BF16, device="meta"), BF16, []),
    ],
)
def test_only_many_rows_of_bf16(x: Tensor, dtype: torch.dtype, expected: list[int], widens: list[int]):
    product(x, torch.zeros(12, 8, dtype=dtype, device=x.device))
    assert widens == expected


def test_not_where_the_processor_multiplies_bf16(widens: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(widened, "onednn_has_bf16", lambda: True)
    product(torch.zeros(MANY, 8, dtype=BF16), torch.zeros(12, 8, dtype=BF16))
    assert widens == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [1, 24, 2**19])
@pytest.mark.parametrize("turned", [False, True])
def test_equal_to_the_exact_product(
    bias: bool, block: int, turned: bool, widens: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Also its gradients, to one rounding of bf16 each; blocks of one row, of three, and of all."""
    monkeypatch.setattr(widened, "WEIGHTS_PER_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 8, generator=generator).to(BF16)
    weight = (weight.T.contiguous().T if turned else weight).requires_grad_(True)
    x = torch.randn(2, MANY, 8, generator=generator).to(BF16).requires_grad_(True)
    b = torch.randn(10, generator=generator).to(BF16).requires_grad_(True) if bias else None
    given = [tensor for tensor in (x, weight, b) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_(True) for tensor in given]
    out, right = product(x, weight, b), F.linear(*exact)
    assert widens == [2 * MANY]
    assert out.shape == (2, MANY, 10)
    assert out.dtype == BF16
    assert torch.allclose(out.double(), right, rtol=2**-7, atol=2**-5 if bias else 1e-3)
    side = torch.randn(out.shape, generator=generator).to(BF16)
    gradients = torch.autograd.grad(out, given, side)
    for found, expected in zip(gradients, torch.autograd.grad(right, exact, side.double()), strict=True):
        assert found.dtype == BF16
        assert torch.allclose(found.double(), expected, rtol=2**-7, atol=0.05)


def test_no_gradient_where_none_is_needed(widens: list[int]):
    """A frozen matrix gets none, and rows that nothing before them learns from get none."""
    x, weight = torch.ones(MANY, 8, dtype=BF16), torch.ones(12, 8, dtype=BF16)
    product(x.requires_grad_(True), weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    product(x.detach(), weight.requires_grad_(True)).sum().backward()
    assert torch.equal(weight.grad, torch.full((12, 8), float(MANY), dtype=BF16))


def test_what_is_kept_for_the_backward_pass(widens: list[int]):
    """The rows and the weight as they are, and no block in fp32."""
    x = torch.ones(MANY, 8, dtype=BF16, requires_grad=True)
    weight = torch.ones(12, 8, dtype=BF16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        product(x, weight)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


def test_what_does_not_fit_is_an_error_of_pytorch(widens: list[int]):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(torch.zeros(MANY, 7, dtype=BF16), torch.zeros(12, 8, dtype=BF16))


def test_a_prompt_is_read_with_it(widens: list[int]):
    """By a loaded model in bf16: a prompt has many rows, and a word that was written is one."""
    model, processor = load_answering(dtype=BF16)
    batch = processor([SAMPLES / "scene_1.png"], ["caption en"])
    with torch.no_grad():
        _, cache = model.prefill(**batch)
        places = batch["input_ids"].shape[1]
        assert widens
        assert max(widens) >= places
        widens.clear()
        model.decode(torch.tensor([5]), torch.tensor([True]), cache)
    assert widens == []
