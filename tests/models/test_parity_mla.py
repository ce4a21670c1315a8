"""Latent attention equals that of DeepSeek-V2 and V3 in transformers, in both of its forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from deepseek_v2 import TEXT, WIDTHS, YARN, in_our_words, reference
from helpers import assert_differs, assert_equal, difference
from torch import Tensor, nn

from minivlm import masks
from minivlm.attention import record_attention
from minivlm.cache import KVCache
from minivlm.errors import InputError
from minivlm.rope import apply_rotary, rotary_angles
from minivlm.text.mla import (
    FromLatents,
    LatentAttention,
    LatentCache,
    MLAConfig,
    bytes_per_token,
    rotate_neighbors,
)
from minivlm.text.yarn_rope import YarnScaling, yarn_angles

SCALING = YarnScaling(**YARN)
CONFIG = MLAConfig(q_lora_rank=None, **WIDTHS)
T = 12
X = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(T).expand(2, -1)
CAUSAL = masks.causal(POSITIONS, POSITIONS)[:, None]
FORMS = {"expanded": LatentAttention.expanded, "absorbed": LatentAttention.absorbed}

both_forms = pytest.mark.parametrize("form", FORMS)
both_versions = pytest.mark.parametrize("version", [2, 3])


def pair(version: int = 2, yarn: bool = False, q_lora_rank: int | None = None) -> tuple[LatentAttention, Any]:
    """Ours and the first attention of a reference, with the same weights."""
    theirs = reference(version, yarn=yarn, q_lora_rank=q_lora_rank).model
    factor = SCALING.score_factor if yarn else 1.0
    ours = LatentAttention(MLAConfig(q_lora_rank=q_lora_rank, **WIDTHS), 32, 4, factor)
    ours.load_state_dict(in_our_words(theirs.layers[0].self_attn))
    return ours.eval(), theirs


def rotary(positions: Tensor = POSITIONS, yarn: bool = False) -> Callable[[Tensor], Tensor]:
    width = WIDTHS["qk_rope_head_dim"]
    angles = yarn_angles(positions, width, 10000.0, SCALING) if yarn else rotary_angles(positions, width)
    return partial(rotate_neighbors, cos=angles[0], sin=angles[1])


def expected(theirs: Any, x: Tensor = X) -> Tensor:
    """What the reference's first attention makes of x."""
    bias = torch.zeros(CAUSAL.shape).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
    angles = theirs.rotary_emb(x, POSITIONS)
    out: Tensor = theirs.layers[0].self_attn(
        hidden_states=x, attention_mask=bias, position_embeddings=angles
    )[0]
    return out


def in_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentAttention, "expanding_is_cheaper", lambda *_: form == "expanded")


@torch.no_grad()
@both_versions
@both_forms
@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_equal_to_transformers(
    version: int, form: str, yarn: bool, q_lora_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(version, yarn, q_lora_rank)
    in_form(form, monkeypatch)
    assert_equal(ours(X, CAUSAL, rotary(yarn=yarn)), expected(theirs))


@torch.no_grad()
def test_both_forms_look_alike() -> None:
    """Outputs, and the maps of every head, to a few units of the last place."""
    ours, _ = pair()
    q, kept = ours.queries(X, rotary()), ours.to_keep(X, rotary())
    with record_attention() as maps:
        outs = [form(ours, q, kept, CAUSAL) for form in FORMS.values()]
    assert outs[0].shape == (2, 4, T, 6)
    assert difference(*outs) < 1e-6
    assert [layer.shape for layer in maps] == [(2, 4, T, T)] * 2
    assert difference(*maps) < 1e-6


def test_both_forms_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    found = []
    for form in FORMS:
        in_form(form, monkeypatch)
        ours.zero_grad()
        ours(X, CAUSAL, rotary()).square().sum().backward()
        found.append(
            [parameter.grad.clone() for parameter in ours.parameters() if parameter.grad is not None]
        )
    assert len(found[0]) == len(list(ours.parameters()))
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)


@torch.no_grad()
@both_forms
def test_full_cached_and_padded_agree(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache holds the latent and the rotated key: more tokens are read behind them, whatever is padded."""
    ours, _ = pair()
    full = ours(X, CAUSAL, rotary())
    in_form(form, monkeypatch)
    for before, after in ((0, 0), (3, 0), (0, 2)):
        cache = LatentCache(1, 2, 16 + 4)

        def read(cache: LatentCache, part: Tensor, real: Tensor) -> Tensor:
            positions = cache.reserve(real)
            mask = masks.causal(positions, cache.key_positions) & masks.padding(cache.key_is_real)
            return ours(part, mask[:, None], rotary(positions), partial(cache.write, 0))

        prompt = nn.functional.pad(X[:, :7], (0, 0, before, after), value=9.0)
        real = nn.functional.pad(torch.ones(2, 7), (before, after))
        assert_equal(read(cache, prompt, real)[:, before : before + 7], full[:, :7])
        assert_equal(read(cache, X[:, 7:10], torch.ones(2, 3)), full[:, 7:10])  # several at once
        for place in range(10, T):
            assert_equal(read(cache, X[:, place : place + 1], torch.ones(2, 1)), full[:, place : place + 1])
        assert cache.keys[0].shape == (2, 1, 256, 20)
        assert cache.values[0].numel() == 0


def test_bytes_of_a_token() -> None:
    """The decoder of deepseek-vl2-small beside others of its 27 layers and 16 heads of 128, in bf16."""
    latent = LatentCache(27, 1, 512 + 64, dtype=torch.bfloat16)
    heads = {count: KVCache(27, 1, count, 128, dtype=torch.bfloat16) for count in (16, 4, 2, 1)}
    assert bytes_per_token(latent) == 27 * 576 * 2 == 31_104
    assert [bytes_per_token(cache) for cache in heads.values()] == [221_184, 55_296, 27_648, 13_824]
    assert bytes_per_token(latent) == 2.25 * bytes_per_token(heads[1])  # as in the paper, table 1


def test_a_prompt_is_expanded_and_a_word_is_not() -> None:
    ours = LatentAttention(MLAConfig(q_lora_rank=None), 64, 2)

    def expands(queries: int, keys: int) -> bool:
        q, kept = torch.empty(1, 2, queries, 192), torch.empty(1, 1, keys, 576)
        return ours.expanding_is_cheaper(q, kept)

    assert expands(1000, 1000)
    assert not expands(1, 1000)
    assert not expands(100, 1000)  # of so few, the keys of all heads are not worth their price
    assert expands(300, 1000)


@torch.no_grad()
@both_forms
def test_bf16(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    exact = ours(X, CAUSAL, rotary())
    in_form(form, monkeypatch)
    out = ours.bfloat16()(X.bfloat16(), CAUSAL, rotary())
    assert out.dtype == torch.bfloat16
    assert difference(out.float(), exact) < 0.05


# Mistakes, and how large their errors are at least


def half_split(ours: LatentAttention) -> Tensor:
    cos, sin = rotary_angles(POSITIONS, WIDTHS["qk_rope_head_dim"])
    return ours(X, CAUSAL, partial(apply_rotary, cos=cos, sin=sin))


def no_latent_norm(ours: LatentAttention) -> Tensor:
    ours.kv_a_layernorm = nn.Identity()  # type: ignore[assignment]
    return ours(X, CAUSAL, rotary())


def scale_from_nope(ours: LatentAttention) -> Tensor:
    ours.scale = WIDTHS["qk_nope_head_dim"] ** -0.5
    return ours(X, CAUSAL, rotary())


def values_before_keys(ours: LatentAttention) -> Tensor:
    weight = ours.kv_b_proj.weight.unflatten(0, (4, -1))
    ours.kv_b_proj.weight = nn.Parameter(weight.roll(6, dims=1).flatten(0, 1))
    return ours(X, CAUSAL, rotary())


@torch.no_grad()
@pytest.mark.parametrize(
    ("mistake", "least"),
    [(half_split, 0.02), (no_latent_norm, 0.2), (scale_from_nope, 0.003), (values_before_keys, 0.2)],
)
def test_a_mistake_shows(mistake: Callable[[LatentAttention], Tensor], least: float) -> None:
    ours, theirs = pair()
    right = expected(theirs)
    error = (mistake(ours) - right).abs().max() / right.abs().max()
    assert error > least


@torch.no_grad()
def test_scores_and_angles_of_yarn_count() -> None:
    ours, theirs = pair(yarn=True)
    right = expected(theirs)
    assert_differs(ours(X, CAUSAL, rotary()), right)
    ours.scale /= SCALING.score_factor
    assert_differs(ours(X, CAUSAL, rotary(yarn=True)), right)


@torch.no_grad()
def test_yarn_far_out() -> None:
    """Every frequency: those that are left alone, those that are slowed down, those between."""
    theirs = reference(3, yarn=True, qk_rope_head_dim=16).model.rotary_emb
    positions = torch.tensor([[0, 1, 30, 250]])
    cos, sin = yarn_angles(positions, 16, 10000.0, SCALING)
    expected = theirs(X, positions)
    assert_equal(cos[:, 0], expected[0])
    assert_equal(sin[:, 0], expected[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLAConfig(qk_rope_head_dim=5), "qk_rope_head_dim is 5, but rotary"),
        (lambda: MLAConfig(v_head_dim=200), "v_head_dim is 200; only values up to the width of a query"),
        (lambda: MLAConfig(kv_lora_rank=0), "kv_lora_rank is 0, expected 1 to"),
        (lambda: MLAConfig.from_dict({"attention_bias": True}), "attention_bias = True; only False"),
        (lambda: YarnScaling.from_dict({"type": "dynamic", "factor": 2}), "type = 'dynamic'; only 'yarn'"),
        (
            lambda: YarnScaling.from_dict({"type": "yarn", "truncate": False}),
            "truncate = False, which is not supported",
        ),
        (lambda: YarnScaling(factor=0.5), "expected a factor of at least 1"),
        (lambda: YarnScaling(beta_fast=1, beta_slow=32), "beta_slow below beta_fast"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_configs_there_and_back() -> None:
    for config in (CONFIG, MLAConfig(), MLAConfig(q_lora_rank=24)):
        assert MLAConfig.from_dict(config.to_dict()) == config
    assert MLAConfig.from_dict({}).q_lora_rank == 1536  # of a file that does not say
    assert YarnScaling.from_dict(SCALING.to_dict()) == SCALING
    assert YarnScaling.from_dict({}) is None
    assert FromLatents(CONFIG, 4).weight.shape == (4 * (8 + 6), 16)
    assert TEXT["num_attention_heads"] == 4
