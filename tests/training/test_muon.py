"""Muon in fp32 makes the steps of PyTorch's, whose own matrices are rounded to bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minivlm.training import muon
from minivlm.training.muon import Muon, evened

SHAPES = ((24, 24), (12, 40), (40, 12))


def moved(optimizer_class: type[torch.optim.Optimizer], steps: int = 3, **settings: float) -> list[Tensor]:
    """How far some matrices go in a few steps of made-up gradients."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    before = [weight.detach().clone() for weight in weights]
    optimizer = optimizer_class(weights, lr=0.02, weight_decay=0.1, **settings)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape)
        optimizer.step()
    return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]


@pytest.fixture
def slow_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "bf16_pays", lambda device: False)


@pytest.mark.usefixtures("slow_in_bf16")
@pytest.mark.parametrize("settings", [{}, {"nesterov": False}, {"momentum": 0.5}, {"ns_steps": 3}])
def test_steps_are_those_of_pytorch(settings: dict[str, float]) -> None:
    for ours, theirs in zip(moved(Muon, **settings), moved(torch.optim.Muon, **settings), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02  # bf16 has about three digits


def test_where_bf16_pays_the_step_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "bf16_pays", lambda device: True)
    for ours, theirs in zip(moved(Muon), moved(torch.optim.Muon), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("slow_in_bf16")
def test_the_state_is_pytorchs() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    ours, theirs = Muon([weight]), torch.optim.Muon([weight])
    weight.grad = torch.randn(4, 6)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    theirs.step()
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u * torch.logspace(0, -1, len(vh)) @ vh  # from 1 to a tenth
    values = torch.linalg.svdvals(evened(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.usefixtures("slow_in_bf16")
def test_what_has_no_gradient_stays() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    Muon([weight]).step()
    assert torch.equal(weight, before)
