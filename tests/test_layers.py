"""Attention in its plain and its fused form, what it records, and the blocks that no parity test reaches."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm import SiglipVisionConfig, attention, masks
from minivlm.attention import (
    Attention,
    additive,
    attend,
    attend_fused,
    attend_in_blocks,
    attend_plain,
    attention_weights,
    record_attention,
)
from minivlm.layers import EncoderBlock

SCALE = 8**-0.5


def qkv(heads: int = 4, kv_heads: int = 4, queries: int = 6, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(count: int, length: int) -> Tensor:
        return torch.randn(2, count, length, 8, generator=generator, requires_grad=True)

    return make(heads, queries), make(kv_heads, keys), make(kv_heads, keys)


def mask_of(kind: str) -> Tensor | None:
    positions = torch.arange(6)[None].expand(2, 6)
    causal = masks.causal(positions, positions)
    is_real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return {"none": None, "causal": causal[:, None], "padded": (causal & masks.padding(is_real))[:, None]}[
        kind
    ]


def test_plain_attention_is_its_formula():
    """One number at a time, for one query head of a group."""
    q, k, v = (x.detach() for x in qkv(heads=4, kv_heads=2))
    out = attend_plain(q, k, v, mask_of("causal"), SCALE)
    row, head, query = 1, 3, 4
    group = head // 2  # heads 0 and 1 share the first keys, 2 and 3 the second
    scores = [float(q[row, head, query] @ k[row, group, key]) / math.sqrt(8) for key in range(query + 1)]
    weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
    expected = sum(weight * v[row, group, key] for key, weight in enumerate(weights))
    torch.testing.assert_close(out[row, head, query], expected)


@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_plain_and_fused_agree(kv_heads: int, mask: str):
    """Outputs and gradients."""
    results = []
    for form in (attend_plain, attend_fused):
        q, k, v = qkv(kv_heads=kv_heads)
        out = form(q, k, v, mask_of(mask), SCALE)
        (out * torch.arange(out.numel()).view(out.shape) / out.numel()).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [attend_plain, attend_fused, attend])
def test_a_mask_may_be_numbers_to_add(form: Callable[..., Tensor]):
    q, k, v = qkv(kv_heads=2)
    mask = mask_of("padded")
    torch.testing.assert_close(
        form(q, k, v, additive(mask, q.dtype), SCALE), attend_plain(q, k, v, mask, SCALE)
    )
    assert additive(mask, torch.bfloat16).dtype == torch.bfloat16


def test_one_query_with_many_keys():
    q, k, v = qkv(kv_heads=1, queries=1, keys=6)
    out = attend_plain(q, k, v, None, SCALE)
    assert out.shape == (2, 4, 1, 8)
    torch.testing.assert_close(out, attend_fused(q, k, v, None, SCALE))


@pytest.mark.parametrize("block", [1, 7, 6 * 6, 2 * 6 * 6 + 1, 2 * 4 * 6 * 6, 10**6])
@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_blocks_agree_with_the_whole(kv_heads: int, mask: str, block: int, monkeypatch: pytest.MonkeyPatch):
    """For any number of scores at a time: of one query, several, one head, several, one row, several, all."""
    rows = [0, 1, 1, 0, 1]
    q, k, v = (x[rows] for x in qkv(kv_heads=kv_heads))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as it comes from the projection
    seen = mask_of(mask)
    seen = None if seen is None else seen[rows]
    held = []

    def plain(*args: Any) -> Tensor:
        held.append(args[0].shape[0] * args[0].shape[1] * args[0].shape[2] * args[1].shape[2])
        return attend_plain(*args)

    monkeypatch.setattr(attention, "SCORES_PER_BLOCK", block)
    monkeypatch.setattr(attention, "attend_plain", plain)
    for cap in (None, 0.5):
        expected = attend_plain(q, k, v, seen, SCALE, cap)
        torch.testing.assert_close(attend_in_blocks(q, k, v, seen, SCALE, cap), expected)
    if mask == "causal":  # one mask for all rows
        torch.testing.assert_close(
            attend_in_blocks(q, k, v, seen[:1], SCALE), attend_plain(q, k, v, seen[:1], SCALE)
        )
    group = 4 // kv_heads
    assert max(held) <= max(block, 6 * group)  # the queries of a group stay together
    if block == 2 * 4 * 6 * 6:
        assert held[:3] == [2 * 4 * 6 * 6, 2 * 4 * 6 * 6, 1 * 4 * 6 * 6]


@torch.no_grad()
def test_no_matrix_of_scores_of_a_long_row(monkeypatch: pytest.MonkeyPatch):
    """In bf16 on a CPU that multiplies it, 4 heads * 2,000 * 2,000 scores are never held at once."""
    monkeypatch.setattr(attention, "onednn_has_bf16", lambda: True)
    monkeypatch.setattr(attention, "has_amx", lambda: False)
    q, k, v = (torch.randn(1, heads, 2000, 8, dtype=torch.bfloat16) for heads in (4, 1, 1))
    sizes = []
    weights_of = attention.attention_weights

    def watched(*args: Any) -> Tensor:
        weights = weights_of(*args)
        sizes.append(weights.numel())
        return weights

    monkeypatch.setattr(attention, "attention_weights", watched)
    out = attend(q, k, v, None, SCALE)
    assert sum(sizes) == 4 * 2000 * 2000
    assert max(sizes) <= attention.SCORES_PER_BLOCK
    expected = attend_fused(q.float(), k.float(), v.float(), None, SCALE)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.005)


@torch.no_grad()
def test_one_query_is_answered_without_copies_of_keys(monkeypatch: pytest.MonkeyPatch):
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **kwargs: (seen.append((q.shape, kwargs["enable_gqa"])), fused(q, k, v, **kwargs))[1],
    )
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in qkv(heads=4, kv_heads=2, queries=1))
        mask = mask_of("padded")[:, :, -1:]
        out = attend(q, k, v, mask, SCALE)
        torch.testing.assert_close(out, attend_plain(q, k, v, mask, SCALE), rtol=0.02, atol=0.02)
    assert seen == [((2, 2, 2, 8), False)] * 2


@pytest.mark.parametrize("grad", [True, False])
def test_attend_chooses_a_form_and_both_agree(grad: bool, monkeypatch: pytest.MonkeyPatch):
    q, k, v = qkv(kv_heads=2)
    expected = attend_plain(q, k, v, mask_of("causal"), SCALE)
    calls = []
    monkeypatch.setattr(
        attention, "attend_fused", lambda *args: (calls.append("fused"), attend_fused(*args))[1]
    )
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(attend(q, k, v, mask_of("causal"), SCALE), expected)
    assert calls == ([] if grad else ["fused"])


@torch.no_grad()
@pytest.mark.parametrize(("amx", "softcap", "expected"), [
    (True, None, "fused"), (True, 2.0, "blocks"), (False, None, "blocks"), (False, 2.0, "blocks"),
])  # fmt: skip
def test_in_bf16_the_processor_decides(
    amx: bool, softcap: float | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "onednn_has_bf16", lambda: True)
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    calls = []
    for name, form in {"fused": attend_fused, "blocks": attend_in_blocks}.items():
        watched: Any = lambda *args, name=name, form=form: (calls.append(name), form(*args))[1]  # noqa: E731
        monkeypatch.setattr(attention, form.__name__, watched)
    q, k, v = (x.to(torch.bfloat16) for x in qkv(kv_heads=2))
    out = attend(q, k, v, mask_of("causal"), SCALE, softcap)
    assert calls == [expected]
    exact = attend_plain(q.double(), k.double(), v.double(), mask_of("causal"), SCALE, softcap)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("grad", [True, False])
def test_bf16_where_the_processor_lacks_it(
    softcap: float | None, mask: str, grad: bool, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is multiplied in bf16: each result is the exact one, rounded once, and so are gradients."""
    monkeypatch.setattr(attention, "onednn_has_bf16", lambda: False)
    seen: list[torch.dtype] = []
    weights_of = attention.attention_weights
    monkeypatch.setattr(
        attention, "attention_weights", lambda *args: (seen.append(args[0].dtype), weights_of(*args))[1]
    )
    q, k, v = (x.detach().to(torch.bfloat16).requires_grad_(grad) for x in qkv(kv_heads=2))
    look = None if mask == "none" else mask_of("causal")
    exact = attend_plain(q.double(), k.double(), v.double(), look, SCALE, softcap)
    assert seen == [torch.float64]
    given = attention.additive(look, torch.bfloat16) if look is not None and mask == "additive" else look
    out = attend(q, k, v, given, SCALE, softcap)
    assert torch.bfloat16 not in seen
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-8)
    if grad:
        right = torch.autograd.grad(exact.sum(), [q, k, v])
        for found, expected in zip(torch.autograd.grad(out.sum(), [q, k, v]), right, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_weigh_exactly_nothing(dtype: torch.dtype):
    q, k, _ = (x.to(dtype) for x in qkv())
    mask = mask_of("padded")
    weights = attention_weights(q * 100, k * 100, mask, SCALE)
    assert (weights.masked_select(~mask.expand_as(weights)) == 0).all()
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 4, 6), rtol=0, atol=0.02)


@torch.no_grad()
def test_softcap():
    q, k, v = (x * 10 for x in qkv(kv_heads=2))
    mask = mask_of("causal")
    capped = attend(q, k, v, mask, SCALE, softcap=5.0)
    scores = q @ k.repeat_interleave(2, dim=1).mT * SCALE
    assert scores.abs().max() > 20
    weights = (
        (5 * (scores / 5).tanh()).masked_fill(~mask, -torch.inf).softmax(-1)
    )  # first the cap, then the mask
    torch.testing.assert_close(capped, weights @ v.repeat_interleave(2, dim=1))
    assert (capped - attend(q, k, v, mask, SCALE)).abs().max() > 0.1


# Recording


def blocks() -> list[EncoderBlock]:
    torch.manual_seed(0)
    config = SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)
    return [EncoderBlock(config) for _ in range(3)]


@pytest.mark.parametrize("grad", [True, False])
def test_recording_gives_each_layers_map_and_changes_nothing(grad: bool):
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(grad):
        expected = x
        for block in blocks():
            expected = block(expected)
        with record_attention() as maps:
            out = x
            for block in blocks():
                out = block(out)
    torch.testing.assert_close(out, expected)
    assert [tuple(each.shape) for each in maps] == [(2, 2, 5, 5)] * 3
    for each in maps:
        torch.testing.assert_close(each.sum(-1), torch.ones(2, 2, 5))
        assert not each.requires_grad
    assert not torch.equal(maps[0], maps[1])


def test_recording_ends_with_the_block_even_after_an_error():
    block, x = blocks()[0], torch.randn(1, 5, 16)
    with pytest.raises(RuntimeError), record_attention() as maps:
        block(x[..., :7])  # the wrong width
    block(x)
    assert maps == []


def test_recordings_nest():
    block, x = blocks()[0], torch.randn(1, 5, 16)
    with record_attention() as outer:
        block(x)
        with record_attention() as inner:
            block(x)
        block(x)
    assert (len(outer), len(inner)) == (2, 1)


# Blocks


def test_encoder_block_obeys_its_mask():
    """Two pictures packed into one row do not see each other."""
    block = blocks()[0]
    numbers = torch.tensor([[0, 0, 0, 1, 1]])
    mask = masks.block_diagonal(numbers, numbers)[:, None]
    x = torch.randn(1, 5, 16)
    together = block(x, mask)
    torch.testing.assert_close(together[:, :3], block(x[:, :3]))
    torch.testing.assert_close(together[:, 3:], block(x[:, 3:]))
    assert (together - block(x)).abs().max() > 1e-3


def test_attention_shapes():
    attention = Attention(16, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "q_proj.weight": (32, 16),
        "k_proj.weight": (16, 16),
        "v_proj.weight": (16, 16),
        "o_proj.weight": (16, 32),
    }
    assert attention(torch.randn(2, 3, 16)).shape == (2, 3, 16)
