"""Qwen-VL gives the numbers of Qwen's own program, and what others got wrong gives others.

transformers has no such model; how the numbers were made is said in tests/reference_qwen_vl.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal, difference, noise
from qwen_vl import EXPECTED, IMAGE_START, TEXT, filled, some
from safetensors.torch import load_file
from torch import Tensor

from minivlm import masks
from minivlm.errors import InputError
from minivlm.layers import GatedMLP, SwiGLU
from minivlm.models.qwen_vl import QwenVL, QwenVLConfig
from minivlm.text import qwen
from minivlm.text.qwen import QwenCache, QwenConfig, logn_scale, ntk_alpha

PIXELS = noise(2, 3, 40, 40, start=0.5)
WORDS = (torch.arange(40) * 37 + 11) % 250
PICTURE = torch.tensor([260, 97, 46, 262, 262, 261])  # the path "a." and padding between <img> and </img>
IDS = torch.cat([WORDS[:3], PICTURE, WORDS[3:34]])[None]
TWO = torch.cat([WORDS[:2], PICTURE, WORDS[2:4], PICTURE, WORDS[4:10]])[None]
ONE = PIXELS[:1]


@torch.no_grad()
@pytest.mark.parametrize("length", [14, 20, 40])
def test_logits_within_and_beyond_the_length_of_training(length: int) -> None:
    """16 tokens; twice and three times as many have other angles and sharper queries."""
    assert_equal(some(filled()(IDS[:, :length], ONE).logits), EXPECTED[f"full {length}"])


@torch.no_grad()
def test_two_pictures_and_that_they_count() -> None:
    model = filled()
    logits = model(TWO, PIXELS).logits
    assert_equal(some(logits), EXPECTED["two pictures"])
    assert difference(model(TWO, PIXELS.flip(0)).logits[:, -1], logits[:, -1]) > 0.01
    assert torch.equal(model(TWO, PIXELS.flip(0)).logits[:, :2], logits[:, :2])  # before the first


@torch.no_grad()
def test_what_stands_in_the_places_is_not_read() -> None:
    model, other = filled(), IDS.clone()
    other[:, 4:8] = 262
    assert torch.equal(model(other, ONE).logits, model(IDS, ONE).logits)


@torch.no_grad()
def written(model: QwenVL, start: int, end: int) -> Tensor:
    """Logits from the last token of a prompt on, one token at a time."""
    hidden, cache = model.prefill(IDS[:, :start], torch.ones(1, start, dtype=torch.long), ONE)
    rows = [model.logits(hidden)]
    for place in range(start, end):
        rows.append(model.logits(model.decode(IDS[:, place], torch.ones(1, dtype=torch.bool), cache)))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("start", "end"), [(12, 20), (18, 36)])
def test_an_answer_that_grows_beyond_the_length_of_training(start: int, end: int) -> None:
    """It keeps the angles of its prompt, and its queries get sharper."""
    assert_equal(some(written(filled(), start, end)), EXPECTED[f"written {start} to {end}"])


@torch.no_grad()
def test_full_and_cached_agree_where_the_angles_do() -> None:
    model = filled()
    full = model(IDS[:, :30], ONE).logits[:, 17:]
    assert_equal(written(model, 18, 30), full)
    # The same row from a prompt of 12 keeps the angles of 12.
    assert difference(written(model, 12, 30)[:, 6:], full) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_ones(side: str) -> None:
    """Each has its own length: of four rows, three are read with other angles than the longest."""
    model = filled()
    lengths = [40, 14, 20, 9]
    ids, mask = torch.zeros(2, 4, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(40 - length, 40) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = IDS[0, :length], 1
    pictures = ONE.expand(4, -1, -1, -1)
    logits = model(ids, pictures, mask).logits
    hidden, cache = model.prefill(ids, mask, pictures)
    assert cache.ntk_alpha is not None
    assert cache.ntk_alpha.tolist() == [7, 1, 3, 1]
    after = model.logits(model.decode(torch.full((4,), 5), torch.ones(4, dtype=torch.bool), cache))
    for row, length in enumerate(lengths):
        alone = model(IDS[:, :length], ONE).logits[0]
        assert_equal(logits[row, mask[row].bool()], alone)
        assert_equal(model.logits(hidden)[row], alone[-1])
        _, own = model.prefill(IDS[:, :length], torch.ones(1, length, dtype=torch.long), ONE)
        next_one = model.decode(torch.tensor([5]), torch.ones(1, dtype=torch.bool), own)
        assert_equal(after[row], model.logits(next_one)[0])


@torch.no_grad()
def test_training_goes_without_both_rules() -> None:
    assert_equal(some(filled().train()(IDS, ONE).logits), EXPECTED["training"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change", "least"),
    [("no ntk", {"use_dynamic_ntk": False}, 0.05), ("no logn", {"use_logn_attn": False}, 0.02)],
)
def test_either_rule_alone(name: str, change: dict[str, bool], least: float) -> None:
    logits = some(filled(**change)(IDS, ONE).logits)
    assert_equal(logits, EXPECTED[name])
    assert difference(logits, EXPECTED["full 40"]) > least


def test_the_rules() -> None:
    lengths = torch.tensor([1, 2048, 2049, 4096, 4097, 8192, 8193])
    assert ntk_alpha(lengths, 2048).tolist() == [1, 1, 3, 3, 7, 7, 15]
    scale = logn_scale(torch.tensor([[0, 2047, 2048, 2048 * 2048 - 1]]), 2048)[0, 0, :, 0]
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 1.000064, 2.0]))


def test_a_cache_forgets_the_length_of_its_prompt() -> None:
    cache = QwenCache(1, 1, 1, 4)
    cache.ntk_alpha = torch.ones(1)
    cache.reset()
    assert cache.ntk_alpha is None


# Mistakes.


def swap_gate_and_value(model: Any) -> None:
    for layer in model.language_model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def drop_biases(model: Any) -> None:
    for layer in model.language_model.layers:
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            proj.bias.zero_()


@torch.no_grad()
@pytest.mark.parametrize("mistake", [swap_gate_and_value, drop_biases])
def test_mistakes_in_the_weights_differ(mistake: Callable[[Any], None]) -> None:
    model = filled()
    mistake(model)
    assert difference(some(model(IDS[:, :14], ONE).logits), EXPECTED["full 14"]) > 0.01


@torch.no_grad()
def test_gemmas_gate_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwiGLU, "forward", GatedMLP.forward)
    assert difference(some(filled()(IDS[:, :14], ONE).logits), EXPECTED["full 14"]) > 0.01


@torch.no_grad()
def test_a_picture_that_sees_the_question_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    places = torch.arange(14)[None]
    prefix = masks.prefix_lm(places, places, torch.tensor([12]))
    monkeypatch.setattr(masks, "causal", lambda queries, keys: prefix)
    assert difference(some(filled()(IDS[:, :14], ONE).logits), EXPECTED["full 14"]) > 0.01


@torch.no_grad()
def test_a_picture_one_place_later_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    is_place = QwenVL.is_place
    monkeypatch.setattr(QwenVL, "is_place", lambda self, ids: is_place(self, ids).roll(1, dims=1))
    assert difference(some(filled()(IDS[:, :14], ONE).logits), EXPECTED["full 14"]) > 0.01


@pytest.mark.parametrize("rule", ["angles", "queries"])
def test_rules_that_follow_the_answer_differ(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Angles of the whole row, for keys that were turned by others; queries as sharp as at the start."""
    if rule == "angles":
        monkeypatch.setattr(QwenCache, "ntk_alpha", property(lambda self: None, lambda self, value: None))
    else:
        scale = qwen.logn_scale
        monkeypatch.setattr(qwen, "logn_scale", lambda places, S: scale(places.clamp(max=S - 1), S))
    assert difference(some(written(filled(), 18, 36)), EXPECTED["written 18 to 36"]) > 0.01


# Folders.

OF_THE_DECODER = {
    "transformer.h.*.ln_1.weight": [256],
    "transformer.h.*.attn.c_attn.weight": [768, 256],
    "transformer.h.*.attn.c_attn.bias": [768],
    "transformer.h.*.attn.c_proj.weight": [256, 256],
    "transformer.h.*.ln_2.weight": [256],
    "transformer.h.*.mlp.w1.weight": [48, 256],
    "transformer.h.*.mlp.w2.weight": [48, 256],
    "transformer.h.*.mlp.c_proj.weight": [256, 48],
    "transformer.wte.weight": [270, 256],
    "transformer.ln_f.weight": [256],
    "lm_head.weight": [270, 256],
}
OF_THE_TOWER = {
    "positional_embedding": [256, 24],
    "proj": [256, 256],
    "conv1.weight": [24, 3, 2, 2],
    "ln_pre.weight": [24],
    "ln_pre.bias": [24],
    "transformer.resblocks.*.ln_1.weight": [24],
    "transformer.resblocks.*.ln_1.bias": [24],
    "transformer.resblocks.*.ln_2.weight": [24],
    "transformer.resblocks.*.ln_2.bias": [24],
    "transformer.resblocks.*.attn.in_proj.weight": [72, 24],
    "transformer.resblocks.*.attn.in_proj.bias": [72],
    "transformer.resblocks.*.attn.out_proj.weight": [24, 24],
    "transformer.resblocks.*.attn.out_proj.bias": [24],
    "transformer.resblocks.*.mlp.c_fc.weight": [40, 24],
    "transformer.resblocks.*.mlp.c_fc.bias": [40],
    "transformer.resblocks.*.mlp.c_proj.weight": [24, 40],
    "transformer.resblocks.*.mlp.c_proj.bias": [24],
    "attn_pool.pos_embed": [4, 256],
    "attn_pool.query": [4, 256],
    "attn_pool.kv_proj.weight": [256, 24],
    "attn_pool.attn.in_proj_weight": [768, 256],
    "attn_pool.attn.in_proj_bias": [768],
    "attn_pool.attn.out_proj.weight": [256, 256],
    "attn_pool.attn.out_proj.bias": [256],
    "attn_pool.ln_q.weight": [256],
    "attn_pool.ln_q.bias": [256],
    "attn_pool.ln_kv.weight": [256],
    "attn_pool.ln_kv.bias": [256],
    "ln_post.weight": [256],
    "ln_post.bias": [256],
}


@torch.no_grad()
def test_saved_in_the_published_names_and_opened_again(tmp_path: Path) -> None:
    """Names and shapes are those of the parameters of Qwen's own program."""
    model = filled()
    model.save_pretrained(tmp_path)
    names = OF_THE_DECODER | {f"transformer.visual.{name}": shape for name, shape in OF_THE_TOWER.items()}
    expected = {
        name.replace("*", layer): shape for name, shape in names.items() for layer in ("0", "1")
    }  # both tower and decoder have two layers
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    again = QwenVL.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_equal(some(again(IDS, ONE).logits), EXPECTED["full 40"])


PUBLISHED = {  # config.json of Qwen-VL-Chat, without what says nothing about the formula
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "fp16": True,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}


def test_the_published_config() -> None:
    config = QwenVLConfig.from_dict(PUBLISHED)
    assert config == QwenVLConfig()
    assert (config.image_token_id, config.num_image_tokens) == (151859, 256)
    assert config.end_token_ids == (151643, 151645, 151644)
    assert replace(config, chat_format="raw").end_token_ids == (151643,)
    assert QwenVLConfig.from_dict(config.to_dict()) == config
    ours, ignored = config.to_dict(), {"attn_dropout_prob", "emb_dropout_prob", "fp16"}
    assert {name: ours[name] for name in PUBLISHED.keys() - ignored} == {
        name: PUBLISHED[name] for name in PUBLISHED.keys() - ignored
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": None}, "of Qwen without pictures .* only Qwen-VL and Qwen-VL-Chat are supported"),
        ({"visual": [1]}, r"visual in config.json is \[1\], expected an object"),
        ({"model_type": "qwen2"}, "model_type 'qwen2', but this class is for 'qwen'"),
        ({"no_bias": False}, "no_bias = False; only True"),
        ({"rotary_pct": 0.5}, "rotary_pct = 0.5; only 1.0"),
        ({"kv_channels": 64}, "kv_channels = 64; only 128"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True; only False"),
        ({"hidden_size": 2048, "kv_channels": 64}, "resampler is 4096 and hidden_size of the decoder 2048"),
        ({"vocab_size": 151859}, "image_start_id is 151857 .* vocab_size is 151859"),
        ({"seq_length": 1}, "seq_length is 1, expected 2 or more"),
        ({"seq_length": "2048"}, "seq_length is '2048', expected int"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QwenVLConfig.from_dict(PUBLISHED | changes)


def test_an_unknown_form_of_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="chat_format is 'vicuna'"):
        QwenVLConfig(chat_format="vicuna")


# Pictures and places.

OPEN, CLOSE, PAD = IMAGE_START, IMAGE_START + 1, IMAGE_START + 2
FOUR = [PAD] * 4


@pytest.mark.parametrize(
    "row",
    [
        [OPEN, *FOUR],
        [*FOUR, CLOSE],
        [1, OPEN, PAD, PAD, PAD, CLOSE, 1],
        [OPEN, *FOUR, PAD, CLOSE],
        [CLOSE, *FOUR, OPEN],
        [OPEN, OPEN, PAD, PAD, PAD, CLOSE, CLOSE],
        [OPEN, OPEN, PAD, PAD, CLOSE, CLOSE],
        [OPEN, *FOUR, CLOSE, OPEN],
        [OPEN],
        [CLOSE],
    ],
)
def test_places_that_do_not_match(row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"<img> \(260\) and </img> \(261\) that do not match: expected 4"):
        filled().merge(torch.tensor([row]))


def test_places_that_match() -> None:
    ids = torch.tensor([[OPEN, *FOUR, CLOSE, OPEN, 97, 98, PAD, PAD, CLOSE], [1] * 12])
    expected = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0], [0] * 12]).bool()
    assert torch.equal(filled().is_place(ids), expected)


def test_another_number_of_pictures() -> None:
    model = filled()
    with pytest.raises(ValueError, match="places for 1 pictures, and there are 2"):
        model(IDS, PIXELS)
    with pytest.raises(ValueError, match="places for 1 pictures, and there are 0"):
        model(IDS)
    assert model(IDS[:, :3]).logits.shape == (1, 3, TEXT["vocab_size"])


def test_the_loss_and_that_gradients_reach_the_tower() -> None:
    model = filled()
    labels = torch.full_like(IDS, -100)
    labels[:, 30:] = IDS[:, 30:]
    loss = model(IDS, ONE, labels=labels).loss
    assert loss is not None
    loss.backward()
    for parameter in (model.vision_tower.embeddings.patch_embedding.weight, model.resampler.query):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_qwen_config_refuses_heads_without_width() -> None:
    with pytest.raises(InputError, match="head_dim is 2, expected 4 or more"):
        QwenConfig(hidden_size=8, num_attention_heads=4)
