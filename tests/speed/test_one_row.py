"""Products of one row have a kernel of their own where there is bf16, and no switch is ever turned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_paligemma
from torch import Tensor, nn

from minivlm.models.load import load_answering
from minivlm.speed import one_row, speed_up
from minivlm.speed.one_row import OneRowLinear, TiedHead, linear
from minivlm.world.demo import SAMPLES

BF16 = torch.bfloat16
MATRIX = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(BF16)


@pytest.fixture(params=[False, True], ids=["without AMX", "with AMX"])
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each product whether it was a dense one, on a machine that has bf16 kernels or pretends to."""
    monkeypatch.setattr(one_row, "onednn_has_bf16", lambda: True)
    monkeypatch.setattr(one_row, "has_amx", lambda: request.param)
    seen: list[bool] = []
    right, pattern, vector = F.linear, one_row.row_of_all_entries, torch.mv

    def watched(*arguments: Any) -> Tensor:
        seen.append(True)
        return right(*arguments)

    def watched_pattern(length: int) -> tuple[Tensor, Tensor]:
        assert not request.param
        seen.append(False)
        return pattern(length)

    def watched_vector(*arguments: Tensor) -> Tensor:
        assert request.param
        seen.append(False)
        return vector(*arguments)

    monkeypatch.setattr(F, "linear", watched)
    monkeypatch.setattr(one_row, "row_of_all_entries", watched_pattern)
    monkeypatch.setattr(torch, "mv", watched_vector)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 8), (2, 16, 8), (33, 8), (3, 11, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_few_rows_where_there_are_tiles(
    shape: tuple[int, ...], bias: bool, dense: list[bool], request: pytest.FixtureRequest
):
    tiles, x = "with AMX" in request.node.name, torch.randn(*shape).to(BF16)
    b = torch.randn(12).to(BF16) if bias else None
    out = linear(x, MATRIX, b)
    assert dense == ([] if tiles and x.numel() <= 8 * one_row.FEW_ROWS else [True])
    assert out.is_contiguous()
    exact = F.linear(x.double(), MATRIX.double(), None if b is None else b.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(1, 8, dtype=BF16), False),
        (torch.zeros(1, 1, 8, dtype=BF16), False),
        (torch.zeros(8, dtype=BF16), False),
        (torch.zeros(33, 8, dtype=BF16), True),
        (torch.zeros(3, 11, 8, dtype=BF16), True),
        (torch.zeros(0, 8, dtype=BF16), True),
        (torch.zeros(1, 8), True),
        (torch.zeros(1, 8, dtype=BF16, device="meta"), True),
    ],
)
def test_only_one_row(x: Tensor, expected: bool, dense: list[bool]):
    linear(x, MATRIX.to(x.device, x.dtype))
    assert dense == [expected]


def test_with_gradients_it_is_the_dense_product(dense: list[bool]):
    x = torch.zeros(1, 8, dtype=BF16)
    linear(x, MATRIX)
    assert dense == [True]


@torch.no_grad()
def test_without_bf16_kernels_it_is_the_dense_product(dense: list[bool], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(one_row, "onednn_has_bf16", lambda: False)
    linear(torch.zeros(1, 8, dtype=BF16), MATRIX)
    assert dense == [True]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (1, 37), (300, 200), (1023, 129), (128, 2048), (5000, 64)]
)
def test_equal_to_the_dense_product(
    outputs: int, inputs: int, mode: Callable[[], Any], bias: bool, dense: list[bool]
):
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(BF16)
    x = torch.randn(1, 1, inputs, generator=generator).to(BF16)
    b = torch.randn(outputs, generator=generator).to(BF16) if bias else None
    exact = x.double() @ weight.double().T + (0 if b is None else b.double())
    with mode():
        out = linear(x, weight, b)
    assert dense == [False]
    assert out.shape == (1, 1, outputs)
    assert out.dtype == BF16
    # One rounding to bf16, 2^-8 of the value, and one more for the sum with the bias.
    assert torch.allclose(out.double(), exact, rtol=2**-7 if bias else 2**-8, atol=0.05 if bias else 1e-4)


@torch.no_grad()
def test_strides_do_not_matter(dense: list[bool]):
    """A transposed matrix, a matrix with gaps and a row with gaps: none is read as if it were dense."""
    x, weight = torch.randn(1, 600).to(BF16), torch.randn(40, 600).to(BF16)
    pairs = [(x[:, :40], weight.T), (x[:, ::2], weight[:, ::2]), (x[:, ::2], weight[:, :300])]
    for row, matrix in pairs:
        expected = F.linear(row.float(), matrix.float())
        assert torch.allclose(linear(row, matrix).float(), expected, rtol=2**-7, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "matrix"),
    [(torch.zeros(1, 7, dtype=BF16), MATRIX), (torch.zeros(1, 8, dtype=BF16), MATRIX.float())],
)
def test_what_does_not_fit_is_an_error_of_pytorch(x: Tensor, matrix: Tensor, dense: list[bool]):
    """The sparse kernel would read past the end of a shorter row."""
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|same dtype"):
        linear(x, matrix)
    assert dense == [True]


def refuse(*arguments: Any) -> None:
    raise AssertionError("a switch of the whole process was turned")


def test_two_threads_generate_at_once(dense: list[bool], monkeypatch: pytest.MonkeyPatch):
    """Each gets the same answer as alone, and none turns PyTorch's switch for oneDNN."""
    monkeypatch.setattr(torch._C, "_set_mkldnn_enabled", refuse)
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
    assert not all(dense)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_where_generation_uses_it(rows: int, dense: list[bool], monkeypatch: pytest.MonkeyPatch):
    """While one answer is written, every product is one of a single row; of a batch, none is."""
    monkeypatch.setattr(one_row, "FEW_ROWS", 1)
    model = speed_up(tiny_paligemma().to(BF16))
    seen: dict[str, set[bool]] = {"prefill": set(), "decode": set(), "logits": set()}

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            dense.clear()
            out = method(*args, **kwargs)
            seen[name].update(dense)
            return out

        return call

    for name in seen:
        monkeypatch.setattr(model, name, watched(name, getattr(model, name)))
    ids = torch.randint(3, 100, (rows, 5))
    assert len(list(model.stream(ids, max_new_tokens=3))) == 3
    alone = rows == 1
    # The last MLP of a prompt has as many rows as there are prompts.
    assert seen == {"prefill": {True, not alone}, "decode": {not alone}, "logits": {not alone}}


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
