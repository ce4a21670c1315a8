"""Products of one row run without oneDNN, all others with it, and the switch is always restored."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_paligemma
from torch import Tensor, nn

from minivlm.attention import attend
from minivlm.models.load import load_answering
from minivlm.speed import one_row, speed_up
from minivlm.speed.one_row import OneRowLinear, TiedHead, linear
from minivlm.world.demo import SAMPLES

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
BF16 = torch.bfloat16
MATRIX = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(BF16)


def enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether oneDNN was on at each product, on a machine that has its bf16 kernels or pretends to."""
    monkeypatch.setattr(one_row, "onednn_has_bf16", lambda: True)
    seen: list[bool] = []
    right = nn.functional.linear

    def watched(*arguments: Any) -> Tensor:
        seen.append(enabled())
        return right(*arguments)

    monkeypatch.setattr(nn.functional, "linear", watched)
    return seen


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(1, 8, dtype=BF16), False),
        (torch.zeros(1, 1, 8, dtype=BF16), False),
        (torch.zeros(2, 8, dtype=BF16), True),
        (torch.zeros(1, 2, 8, dtype=BF16), True),
        (torch.zeros(1, 8), True),
        (torch.zeros(1, 8, dtype=BF16, device="meta"), True),
    ],
)
def test_only_one_row(x: Tensor, expected: bool, states: list[bool]):
    linear(x, MATRIX.to(x.device, x.dtype))
    assert states == [expected]
    assert enabled()


@needs_onednn
def test_with_gradients_nothing_is_switched(states: list[bool]):
    linear(torch.zeros(1, 8, dtype=BF16), MATRIX)
    assert states == [True]


@needs_onednn
@torch.no_grad()
def test_nothing_is_switched_where_onednn_has_no_bf16(states: list[bool], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_row, "onednn_has_bf16", lambda: False)
    linear(torch.zeros(1, 8, dtype=BF16), MATRIX)
    assert states == [True]


@needs_onednn
@torch.no_grad()
def test_restored_after_an_error(states: list[bool]):
    with pytest.raises(RuntimeError):
        linear(torch.zeros(1, 7, dtype=BF16), MATRIX)
    assert states == [False]
    assert enabled()


@needs_onednn
@torch.no_grad()
def test_only_our_own_switch_is_undone(states: list[bool]):
    """If a user has switched oneDNN off, for example to find an error, it stays off."""
    with torch.backends.mkldnn.flags(enabled=False):
        linear(torch.zeros(1, 8, dtype=BF16), MATRIX)
        assert not enabled()


@needs_onednn
def test_products_of_several_threads_at_once(states: list[bool], monkeypatch: pytest.MonkeyPatch):
    """The second waits: it would take the setting of the first for the user's, and leave that behind."""
    inside, may_end = threading.Event(), threading.Event()
    watched = nn.functional.linear

    def slow(*arguments: Any) -> Tensor:
        if threading.current_thread() is first:
            inside.set()
            assert may_end.wait(60)
        return watched(*arguments)

    @torch.no_grad()
    def multiply() -> None:
        linear(torch.zeros(1, 8, dtype=BF16), MATRIX)

    monkeypatch.setattr(nn.functional, "linear", slow)
    first, second = threading.Thread(target=multiply), threading.Thread(target=multiply)
    first.start()
    assert inside.wait(60)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert states == []
    may_end.set()
    first.join()
    second.join()
    assert states == [False, False]
    assert enabled()


@needs_onednn
@torch.no_grad()
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no timer that interrupts")
def test_interrupts_at_any_moment(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C during products, hundreds of times: afterwards the switch is on, and nobody waits forever."""
    monkeypatch.setattr(one_row, "onednn_has_bf16", lambda: True)
    x, chance, left = torch.zeros(1, 8, dtype=BF16), random.Random(0), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(1000):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 1e-3))
                while True:
                    linear(x, MATRIX)
            except KeyboardInterrupt:
                left += not enabled() or one_row._one_product.locked()
                torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert left == 0


@needs_onednn
def test_two_threads_generate_at_once(monkeypatch: pytest.MonkeyPatch):
    """Each gets the same answer as alone, and the switch is restored."""
    monkeypatch.setattr(one_row, "onednn_has_bf16", lambda: True)
    model, processor = load_answering(dtype=BF16)
    prompts = ["caption en", "how many circles are there?"]
    batches = [processor([SAMPLES / "scene_1.png"], [prompt]) for prompt in prompts]
    alone = [model.generate(**batch).tolist() for batch in batches]
    together: dict[int, list[Any]] = {0: [], 1: []}

    def answer(number: int) -> None:
        for _ in range(3):
            together[number].append(model.generate(**batches[number]).tolist())

    threads = [threading.Thread(target=answer, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {number: 3 * [alone[number]] for number in (0, 1)}
    assert enabled()


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_where_generation_uses_it(rows: int, states: list[bool], monkeypatch: pytest.MonkeyPatch):
    """Products of one row run without oneDNN, all others with it; between tokens it is on."""
    model = speed_up(tiny_paligemma().to(BF16))
    seen: dict[str, set[bool]] = {"prefill": set(), "decode": set(), "logits": set()}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            states.clear()
            out = method(*args, **kwargs)
            seen[name].update(states)
            return out

        return call

    for name in seen:
        monkeypatch.setattr(model, name, watched(name, getattr(model, name)))
    ids = torch.randint(3, 100, (rows, 5))
    for _ in model.stream(ids, max_new_tokens=3):
        assert enabled()
    alone = rows == 1
    # The last MLP of a prompt has as many rows as there are prompts.
    assert seen == {"prefill": {True, not alone}, "decode": {not alone}, "logits": {not alone}}


@needs_onednn
@torch.no_grad()
def test_scores_with_a_cap_keep_it(monkeypatch: pytest.MonkeyPatch):
    """Scores are products with many rows, the keys, even while one token is decoded."""
    states = []
    tanh = torch.Tensor.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: (states.append(enabled()), tanh(x))[1])
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    attend(q, k, v, None, 1.0, softcap=5.0)
    assert states == [True]


def test_a_tied_head_is_the_table_and_nothing_more():
    model = tiny_paligemma()
    names = list(model.state_dict())
    x = torch.randn(2, model.config.text.hidden_size)
    expected = model.language_model.logits(x)
    fast = speed_up(model)
    assert isinstance(fast.language_model.lm_head, TiedHead)
    assert torch.equal(fast.language_model.logits(x), expected)
    assert list(fast.state_dict()) == names
    fast.to(torch.float64)  # moves with the table
    assert fast.language_model.logits(x.double()).dtype == torch.float64


def test_every_matrix_of_a_loaded_model_is_one():
    model, _ = load_answering()
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {OneRowLinear}
