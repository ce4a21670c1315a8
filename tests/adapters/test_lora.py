"""The formula, how it begins, and what learns: LoRA, rsLoRA and DoRA beside peft's, on one layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapters_with_peft import peft_layer
from helpers import assert_differs, assert_equal, tiny_paligemma
from torch import nn

from minivlm.adapters import LoraConfig, new_adapter, put_on, switch_to, take_off
from minivlm.adapters.dora import DoraChange, plain_weight
from minivlm.adapters.lora import AdaptedLinear, LowRank
from minivlm.speed.int8 import Int8Linear, quantize_rows

ALL = slice(None)
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(7))
both = pytest.mark.parametrize("kind", [LowRank, DoraChange])


def layer(kind: type[LowRank], base: nn.Module | None = None, **options: Any) -> tuple[AdaptedLinear, Any]:
    """A layer of 24 inputs and 16 outputs that wears a random change."""
    torch.manual_seed(1)
    base = base or nn.Linear(24, 16)
    change = kind(24, 16, 3, 5, **options)
    change.reset()
    nn.init.normal_(change.lora_B, std=0.2)
    if isinstance(change, DoraChange):
        nn.init.uniform_(change.magnitude, 0.5, 1.5)
    adapted = AdaptedLinear(base, ALL)
    adapted.changes["default"], adapted.active = change, "default"
    return adapted, change


def test_it_begins_as_in_peft() -> None:
    ours, theirs = LowRank(24, 16, 3, 5), peft_layer()
    torch.manual_seed(0)
    ours.reset()
    torch.manual_seed(0)
    theirs.reset_lora_parameters("default", True)
    assert torch.equal(ours.lora_A, theirs.lora_A["default"].weight)
    assert torch.equal(ours.lora_B, theirs.lora_B["default"].weight)
    assert ours.scale == theirs.scaling["default"] == 5 / 3
    assert 0.9 / math.sqrt(24) < ours.lora_A.abs().max() <= 1 / math.sqrt(24)
    assert (ours.lora_B == 0).all()


def test_rslora_divides_by_the_root() -> None:
    assert (
        LowRank(24, 16, 4, 6, rslora=True).scale
        == 3
        == peft_layer(r=4, lora_alpha=6, use_rslora=True).scaling["default"]
    )
    assert LowRank(24, 16, 4, 6).scale == 1.5


def test_dora_begins_with_the_norms_of_the_rows() -> None:
    base = nn.Linear(24, 16)
    change = DoraChange(24, 16, 3, 5)
    change.reset()
    change.start_at(base.weight, ALL)
    assert_equal(change.magnitude, base.weight.norm(dim=1))
    adapted = AdaptedLinear(base, ALL)
    adapted.changes["default"], adapted.active = change, "default"
    assert_equal(adapted(X), base(X))
    assert_equal(change.merged(base.weight, ALL).norm(dim=1), change.magnitude)


@both
def test_gradients_are_those_of_peft(kind: type[LowRank]) -> None:
    """Of DoRA as well, whose norm is a constant for them."""
    ours, change = layer(kind)
    theirs = peft_layer(use_dora=kind is DoraChange)
    with torch.no_grad():
        theirs.base_layer.weight.copy_(ours.base.weight)
        theirs.base_layer.bias.copy_(ours.base.bias)
        theirs.lora_A["default"].weight.copy_(change.lora_A)
        theirs.lora_B["default"].weight.copy_(change.lora_B)
        if kind is DoraChange:
            theirs.lora_magnitude_vector["default"].weight.copy_(change.magnitude)
    assert_equal(ours(X), theirs(X))
    ours(X).square().sum().backward()
    theirs(X).square().sum().backward()
    pairs = [
        (change.lora_A, theirs.lora_A["default"].weight),
        (change.lora_B, theirs.lora_B["default"].weight),
    ]
    if kind is DoraChange:
        pairs.append((change.magnitude, theirs.lora_magnitude_vector["default"].weight))
    for mine, other in pairs:
        assert_equal(mine.grad / other.grad.abs().max(), other.grad / other.grad.abs().max())


@both
def test_rows_of_a_fused_matrix(kind: type[LowRank]) -> None:
    """Three layers that are one matrix elsewhere share A, and each takes its rows of B."""
    whole, change = layer(kind)
    parts = []
    for rows in (slice(0, 4), torch.arange(4, 10), slice(10, 16)):
        part = nn.Linear(24, len(whole.base.weight[rows]))
        part.weight.data, part.bias.data = whole.base.weight[rows], whole.base.bias[rows]
        adapted = AdaptedLinear(part, rows)
        adapted.changes["default"], adapted.active = change, "default"
        parts.append(adapted)
    assert_equal(torch.cat([part(X) for part in parts], dim=-1), whole(X))


@torch.no_grad()
@both
def test_what_is_kept_follows_every_change(kind: type[LowRank]) -> None:
    """DoRA keeps its norms while nothing is written; each of its tensors counts, and the base."""
    adapted, change = layer(kind)
    for tensor in (adapted.base.weight, *change.parameters()):
        assert torch.equal(adapted(X), adapted(X))
        tensor *= 1.5
        assert_equal(adapted(X), X @ change.merged(adapted.base.weight, ALL).T + adapted.base.bias)


@torch.no_grad()
@both
def test_a_base_in_bf16_and_an_adapter_in_fp32(kind: type[LowRank]) -> None:
    adapted, change = layer(kind)
    exact = adapted(X)
    adapted.base.to(torch.bfloat16)
    assert adapted(X.bfloat16()).dtype == torch.bfloat16
    assert change.lora_A.dtype == torch.float32
    assert (adapted(X.bfloat16()) - exact).abs().max() < 0.02 * exact.abs().max()


@torch.no_grad()
@both
@pytest.mark.parametrize("rows", [3, 40])  # both ways to multiply
def test_on_an_int8_base(kind: type[LowRank], rows: int) -> None:
    """As on the rounded weights in fp32."""
    torch.manual_seed(2)
    base = Int8Linear(*quantize_rows(torch.randn(16, 64)))
    plain = nn.Linear(64, 16, bias=False)
    plain.weight.copy_(plain_weight(base))
    x = torch.randn(rows, 64)
    results = []
    for one in (base, plain):
        torch.manual_seed(3)
        change = kind(64, 16, 3, 5)
        change.reset()
        nn.init.normal_(change.lora_B)
        adapted = AdaptedLinear(one, ALL)
        adapted.changes["default"], adapted.active = change, "default"
        results.append(adapted(x))
    assert_equal(results[0] / results[1].abs().max(), results[1] / results[1].abs().max())
    assert_differs(results[1], plain(x))


def test_dropout_is_of_training_alone() -> None:
    adapted, _ = layer(LowRank, dropout=0.5)
    assert_differs(adapted(X), adapted(X))
    adapted.eval()
    assert torch.equal(adapted(X), adapted(X))


def test_two_adapters_are_switched_without_a_copy(tmp_path: Any) -> None:
    model = tiny_paligemma()
    before = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    ids = torch.randint(3, 120, (2, 6), generator=torch.Generator().manual_seed(0))
    alone = model(ids).logits
    for number, targets in enumerate((("q_proj", "v_proj"), ("v_proj", "up_proj"))):
        adapter = new_adapter(model, LoraConfig(targets, r=2), f"number-{number}")
        for change in adapter.changes:
            nn.init.normal_(change.lora_B, std=0.5)
        adapter.save(tmp_path / str(number))
        take_off(model)
    put_on(model, tmp_path / "0", "first")
    first = model(ids).logits
    put_on(model, tmp_path / "1", "second")
    second = model(ids).logits
    for name, wanted in (("first", first), ("second", second), (None, alone), ("second", second)):
        switch_to(model, name)
        assert torch.equal(model(ids).logits, wanted)
    assert_differs(first, alone)
    assert_differs(second, alone)
    assert_differs(first, second)
    switch_to(model, "first")
    take_off(model, "second")
    assert torch.equal(model(ids).logits, first)
    take_off(model, "first")
    assert torch.equal(model(ids).logits, alone)
    after = dict(model.named_parameters())
    assert {name: id(weight) for name, weight in after.items()} == {
        name: i for name, (i, _) in before.items()
    }
    assert all(torch.equal(after[name], values) for name, (_, values) in before.items())
