"""Products of one row do without oneDNN, everything else keeps it, and the switch is always put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_paligemma
from torch import Tensor

from minivlm.attention import attend
from minivlm.speed.one_row import as_many_rows, at_the_speed_of_memory

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled)


@needs_onednn
@pytest.mark.parametrize(("rows", "expected"), [(torch.zeros(1, 8), False), (torch.zeros(2, 8), True)])
def test_only_one_row(rows: Tensor, expected: bool):
    with at_the_speed_of_memory(rows):
        assert enabled() is expected
    assert enabled()
    with at_the_speed_of_memory(torch.zeros(1, 8, device="meta")):
        assert enabled()


@needs_onednn
def test_put_back_after_an_error():
    with pytest.raises(KeyError), at_the_speed_of_memory(torch.zeros(1)):
        raise KeyError
    assert enabled()


@needs_onednn
def test_only_our_own_switch_is_undone():
    """Who switched oneDNN off for good, to look for an error for instance, finds it off everywhere."""
    with as_many_rows():
        assert enabled()
    with at_the_speed_of_memory(torch.zeros(1)), as_many_rows():
        assert enabled()
    with torch.backends.mkldnn.flags(enabled=False):
        with at_the_speed_of_memory(torch.zeros(1)), as_many_rows():
            assert not enabled()
        assert not enabled()


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_where_generation_uses_it(rows: int, monkeypatch: pytest.MonkeyPatch):
    """Prefill with oneDNN; the matrices of one row without it, and between tokens it is as it was."""
    model = tiny_paligemma()
    seen: dict[str, set[bool]] = {"prefill": set(), "decode": set(), "logits": set()}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name].add(enabled())
            return method(*args, **kwargs)

        return call

    for name in seen:
        monkeypatch.setattr(model, name, watched(name, getattr(model, name)))
    ids = torch.randint(3, 100, (rows, 5))
    for _ in model.stream(ids, max_new_tokens=3):
        assert enabled()
    alone = rows == 1
    assert seen == {"prefill": {True}, "decode": {not alone}, "logits": {not alone}}


@needs_onednn
@torch.no_grad()
def test_scores_with_a_cap_keep_it(monkeypatch: pytest.MonkeyPatch):
    """They are a product of many rows, the keys, also while one token is decoded."""
    states = []
    bmm = torch.Tensor.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: (states.append(enabled()), bmm(x))[1])
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    with at_the_speed_of_memory(q):
        attend(q, k, v, None, 1.0, softcap=5.0)
        assert not enabled()
    assert states == [True]
