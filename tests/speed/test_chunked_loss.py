"""The chunked sigmoid loss equals the plain one in value and gradients, without a matrix of all pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_differs, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minivlm.losses import siglip_loss
from minivlm.speed.chunked_loss import chunked_siglip_loss

BENCH = Path(__file__).parents[2] / "bench"


def inputs(n: int = 10, m: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, 8, generator=generator) * 3
    texts = torch.randn(m or n, 8, generator=generator) * 3
    values = (images, texts, torch.tensor([2.0]), torch.tensor([-4.0]))
    return [x.to(dtype).requires_grad_() for x in values]


@given(st.integers(1, 12), st.integers(1, 14))
def test_it_equals_the_plain_form(n: int, chunk: int) -> None:
    leaves = inputs(n)
    plain = siglip_loss(*leaves)
    ours = chunked_siglip_loss(*leaves, chunk=chunk)
    assert_equal(ours, plain)
    for found, expected in zip(
        torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, leaves), strict=True
    ):
        assert found.shape == expected.shape
        assert_equal(found, expected)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 9), (9, 6), (1, 4)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_blocks_without_a_right_pair(n: int, m: int, chunk: int) -> None:
    leaves = inputs(n, m)
    plain = siglip_loss(*leaves, negative_only=True)
    ours = chunked_siglip_loss(*leaves, True, chunk)
    assert_equal(ours, plain)
    for found, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        assert_equal(found, expected)
    if n == m:
        assert_differs(ours, chunked_siglip_loss(*leaves, chunk=chunk))


def test_scalars_serve_as_scale_and_bias() -> None:
    leaves = inputs()
    scalars = [*leaves[:2], *(x.detach()[0].requires_grad_() for x in leaves[2:])]
    loss = chunked_siglip_loss(*scalars, chunk=3)
    assert_equal(loss, siglip_loss(*leaves))
    for found, expected in zip(
        torch.autograd.grad(loss, scalars), torch.autograd.grad(siglip_loss(*leaves), leaves), strict=True
    ):
        assert_equal(found, expected.reshape(found.shape))


def test_without_gradients() -> None:
    leaves = inputs()
    with torch.no_grad():
        loss = chunked_siglip_loss(*leaves, chunk=3)
    assert not loss.requires_grad
    assert_equal(loss, siglip_loss(*leaves))
    locked = [leaves[0], leaves[1].detach(), *leaves[2:]]
    chunked_siglip_loss(*locked, chunk=3).backward()
    expected = torch.autograd.grad(siglip_loss(*leaves), leaves[0])[0]
    assert leaves[0].grad is not None
    assert_equal(leaves[0].grad, expected)


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("factor", [-9.0, 5.0, 14.0])
def test_extreme_logits_stay_finite_and_equal(offset: float, factor: float) -> None:
    images, texts, _, _ = inputs()
    leaves = [images, texts, torch.tensor([factor]).requires_grad_(), torch.tensor([offset]).requires_grad_()]
    plain, ours = siglip_loss(*leaves), chunked_siglip_loss(*leaves, chunk=4)
    torch.testing.assert_close(ours, plain)
    for found, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    exact = inputs()
    low = inputs(dtype=dtype)
    loss = chunked_siglip_loss(*low, chunk=4)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.float(), siglip_loss(*exact).detach(), rtol=0.03, atol=0.03)
    expected = torch.autograd.grad(siglip_loss(*exact), exact)
    for found, wanted in zip(torch.autograd.grad(loss, low), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.03)


def test_in_double_precision_the_gradient_is_the_slope() -> None:
    leaves = inputs(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: chunked_siglip_loss(*x, chunk=2), leaves)


def test_a_second_derivative_is_refused() -> None:
    leaves = inputs()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(chunked_siglip_loss(*leaves), leaves[0], create_graph=True)


@pytest.mark.parametrize(("n", "m"), [(3, 4), (4, 3)])
def test_what_does_not_pair_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"{n} pictures and {m} texts"):
        chunked_siglip_loss(*inputs(n, m))
    with pytest.raises(ValueError, match="chunk is 0: expected"):
        chunked_siglip_loss(*inputs(), chunk=0)


def test_nothing_is_left_on_the_cpu() -> None:
    assert chunked_siglip_loss(*(x.detach().to("meta") for x in inputs())).device.type == "meta"


@pytest.fixture
def live_bytes() -> Iterator[Any]:
    """The counter of bench/exchanges.py."""
    sys.path.insert(0, str(BENCH))
    try:
        import exchanges

        yield exchanges.LiveBytes
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("exchanges", None)
        sys.modules.pop("attention", None)


def test_memory_grows_with_the_batch_and_not_with_its_square(live_bytes: Any) -> None:
    peaks: dict[str, list[int]] = {"plain": [], "chunked": []}
    for n in (256, 512):
        for name, loss in (("plain", siglip_loss), ("chunked", lambda *x: chunked_siglip_loss(*x, chunk=32))):
            leaves = inputs(n)
            with live_bytes(leaves) as memory:
                loss(*leaves).backward()
            peaks[name].append(memory.peak)
    assert peaks["plain"][1] / peaks["plain"][0] > 3.5
    assert peaks["chunked"][1] / peaks["chunked"][0] < 2.1
    assert peaks["plain"][1] > 10 * peaks["chunked"][1]
