"""DeepSeek-V2 as transformers has V2 and V3; without latents and experts it is Llama."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from deepseek_v2 import TEXT, VOCABULARY, WIDTHS, YARN, in_our_words, reference
from helpers import assert_differs, assert_equal, randomize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minivlm import masks
from minivlm.attention import Attention, record_attention
from minivlm.cache import KVCache
from minivlm.errors import InputError
from minivlm.layers import SwiGLU
from minivlm.text.deepseek_v2 import DeepseekV2Config, DeepseekV2Decoder
from minivlm.text.mla import LatentAttention, LatentCache
from minivlm.text.moe import MixtureOfExperts, record_routing

IDS = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(6))
FORMS: dict[str, dict[str, Any]] = {
    "v2": {"version": 2},
    "v2 yarn": {"version": 2, "yarn": True, "q_lora_rank": 12},
    "v3": {"version": 3},
    "v3 yarn": {"version": 3, "yarn": True, "first_k_dense_replace": 2},
}
forms = pytest.mark.parametrize("form", FORMS)


def language_config(version: int, yarn: bool = False, **changes: Any) -> dict[str, Any]:
    """What a published folder would say of a reference."""
    values = TEXT | changes | {"topk_method": "group_limited_greedy"}
    if version == 3:
        values |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
    return values | ({"rope_scaling": {"type": "yarn", **YARN}} if yarn else {})


def pair(**form: Any) -> tuple[DeepseekV2Decoder, Any]:
    theirs = reference(**form)
    ours = DeepseekV2Decoder(DeepseekV2Config.from_dict(language_config(**form)))
    ours.load_state_dict(in_our_words(theirs))
    return ours.eval(), theirs


def logits(ours: DeepseekV2Decoder, ids: Tensor, real: Tensor | None = None) -> Tensor:
    real = torch.ones_like(ids) if real is None else real
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    mask = masks.causal(positions, positions) & masks.padding(real)
    return ours.logits(ours(ours.embed(ids), positions, mask[:, None]))


@torch.no_grad()
@forms
def test_logits(form: str) -> None:
    ours, theirs = pair(**FORMS[form])
    expected = theirs(IDS).logits
    assert_equal(logits(ours, IDS), expected)
    assert_differs(logits(ours, IDS.roll(1, dims=1)), expected)


@torch.no_grad()
@forms
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(form: str, side: str) -> None:
    ours, theirs = pair(**FORMS[form])
    pad = torch.zeros(2, 3, dtype=torch.long)
    ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], dim=1)
    real = (ids != 0).long()
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    found = logits(ours, ids, real)[real.bool()]
    expected = theirs(ids, attention_mask=real, position_ids=positions).logits[real.bool()]
    assert_equal(found, expected)
    assert_equal(found.view(2, 20, -1), logits(ours, IDS))


@torch.no_grad()
@forms
def test_with_a_cache(form: str) -> None:
    """A prompt, several tokens at once, then one by one: with keys and values of heads, and with latents."""
    ours, _ = pair(**FORMS[form])
    full = logits(ours, IDS)
    cache = ours.new_cache(2, torch.float32, torch.device("cpu"))
    assert type(cache) is LatentCache
    for start, end in ((0, 12), (12, 15), *((place, place + 1) for place in range(15, 20))):
        positions = cache.reserve(torch.ones(2, end - start))
        mask = masks.causal(positions, cache.key_positions) & masks.padding(cache.key_is_real)
        hidden = ours(ours.embed(IDS[:, start:end]), positions, mask[:, None], cache)
        assert_equal(ours.logits(hidden), full[:, start:end])


@torch.no_grad()
def test_which_layers_have_experts() -> None:
    ours, _ = pair(version=3, first_k_dense_replace=2)
    assert [type(layer.mlp) for layer in ours.layers] == [SwiGLU, SwiGLU, MixtureOfExperts]
    with record_routing() as routings, record_attention() as maps:
        logits(ours, IDS)
    assert [routing.experts.shape for routing in routings] == [(2, 20, 3)]
    assert [layer.shape for layer in maps] == [(2, 4, 20, 20)] * 3


@torch.no_grad()
def test_without_latents_and_experts_it_is_llama() -> None:
    sizes = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    theirs = randomize(LlamaForCausalLM(LlamaConfig(**sizes)))
    config = DeepseekV2Config.from_dict({**sizes, "use_mla": False})
    ours = DeepseekV2Decoder(config)
    ours.load_state_dict(in_our_words(theirs))
    assert type(ours.layers[0].self_attn) is Attention
    assert type(ours.new_cache(1, torch.float32, torch.device("cpu"))) is KVCache
    assert_equal(logits(ours, IDS), theirs(IDS).logits)


def test_configs_there_and_back() -> None:
    for form in FORMS.values():
        config = DeepseekV2Config.from_dict(language_config(**form))
        assert DeepseekV2Config.from_dict(config.to_dict()) == config
    plain = replace(config, mla=None, rope_scaling=None, moe=None, num_key_value_heads=2)
    assert DeepseekV2Config.from_dict(plain.to_dict()) == plain
    # What deepseek-vl2-tiny says of attention that it does not have.
    tiny = {"use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "v_head_dim": 0}
    assert DeepseekV2Config.from_dict(tiny).mla is None
    assert DeepseekV2Config.from_dict({"num_attention_heads": 8, "num_key_value_heads": None}) == replace(
        DeepseekV2Config(), num_attention_heads=8, num_key_value_heads=8
    )
    assert isinstance(DeepseekV2Decoder(config).layers[0].self_attn, LatentAttention)
    assert WIDTHS["kv_lora_rank"] == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3'; only 'deepseek_v2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2; only 1"),
        (
            {"use_mla": False, "rope_scaling": {"type": "yarn", "factor": 4}},
            "use_mla = False and a rope_scal",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "type = 'linear'; only 'yarn'"),
        ({"use_mla": False, "num_attention_heads": 3}, "hidden_size 4096 is not divisible by 3 heads"),
        (
            {"scoring_func": "max", **{name: TEXT[name] for name in TEXT if "exp" in name or "moe" in name}},
            "max",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeepseekV2Config.from_dict(values)
