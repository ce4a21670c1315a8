"""Llama 3.2 Vision equals transformers where that is right, and Meta's own program where it is not.

`META_*` were printed by `multimodal/model.py` of https://github.com/meta-llama/llama-models (a9c89c4), with
plain linear layers in place of fairscale's, for the weights of llama_vision_made_up.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_differs, assert_equal, difference
from llama_vision import (
    COUNTS,
    FIRST,
    IDS,
    IMAGE_ID,
    LATER,
    pair,
    pixels,
    reference_llama_vision,
    their_inputs,
)
from llama_vision_made_up import CONFIG, PIXELS, ROWS, weights
from llama_vision_made_up import IDS as MADE_UP_IDS
from torch import Tensor, nn
from transformers import LlamaConfig as ReferenceLlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from minivlm import masks
from minivlm.models.llama_vision import LlamaVision
from minivlm.models.pictures_in_rows import pictures_in_view, tiles_in_rows
from minivlm.text import llama_vision as text_module
from minivlm.text.llama import LlamaBlock, LlamaDecoder
from minivlm.text.llama3_rope import Llama3Scaling, llama3_angles
from minivlm.text.llama_vision import CrossAttention, CrossAttentionBlock
from minivlm.vision import llama_vision as vision_module
from minivlm.vision.llama_vision import GatedTileBlock, LlamaVisionTower, TileEmbedding, TileEmbeddings

META_FEATURES = [
    1.555228,
    1.5223992,
    0.1336987,
    -0.0980935,
    -0.9994146,
    2.0660496,
    -1.6259246,
    0.7132361,
    0.6604438,
    -2.0090804,
]
META_LOGITS = [
    [
        -0.3780447,
        0.3818921,
        -0.814243,
        -0.1569679,
        0.2233865,
        -0.0738337,
        -0.2769664,
        0.8942406,
        -0.558461,
        0.2158363,
        0.7172214,
        -0.6858106,
        0.2544529,
        -0.5417878,
        -0.5040122,
        1.0400561,
        -0.515435,
        -0.8260987,
        0.1124167,
        -0.5476528,
        -1.1816487,
        -0.1155243,
        -0.760969,
        -0.4518956,
    ],
    [
        0.7400526,
        -0.0944237,
        0.1391877,
        0.949865,
        0.5671473,
        -0.751179,
        1.6343707,
        -0.0828331,
        -0.6690506,
        1.4172673,
        0.6347089,
        -1.0181204,
        1.1403347,
        0.6067728,
        -0.5247951,
        0.4569631,
        1.7298557,
        0.0167907,
        1.005221,
        0.3803337,
        0.2081079,
        0.5450968,
        1.9027705,
        -0.0403942,
    ],
]


def ours_of(model: LlamaVision, rows: Tensor = FIRST) -> Tensor:
    logits: Tensor = model(rows, pixels(), (rows != 0).long(), aspect_ratio_ids=IDS).logits
    return logits


# Meta's program: both points in which transformers differs from it.


@pytest.fixture(scope="module")
def made_up_model() -> LlamaVision:
    model = LlamaVision(CONFIG).eval()
    model.load_state_dict(weights(model))
    return model


@torch.no_grad()
def test_it_gives_metas_numbers(made_up_model: LlamaVision):
    """With words before the first picture, interleaved early states, and rotary positions of Llama 3.1."""
    features = made_up_model.vision_tower(PIXELS, MADE_UP_IDS)
    assert_equal(features[0, 1, 2, ::5], torch.tensor(META_FEATURES))
    logits = made_up_model(ROWS, PIXELS, aspect_ratio_ids=MADE_UP_IDS).logits
    assert_equal(logits[:, :, ::40].flatten(1), torch.tensor(META_LOGITS))


@torch.no_grad()
def test_the_state_that_a_block_gives_is_one_too_late():
    """What transformers would compute for the indices of Meta's files."""
    ours, reference = pair()
    told = reference_llama_vision(vision={"intermediate_layers_indices": [1, 3]})
    told.load_state_dict(reference.state_dict())
    inputs = their_inputs(FIRST, pixels())
    assert_equal(ours_of(ours), reference(**inputs).logits)
    assert_differs(ours_of(ours), told(**inputs).logits, 1000)


@torch.no_grad()
def test_words_before_the_first_picture_see_none(monkeypatch: pytest.MonkeyPatch):
    """transformers lets them look at all that follow; with their attention zeroed, it is equal."""
    ours, reference = pair()
    inputs = their_inputs(LATER, pixels())
    blind = pictures_in_view(LATER == IMAGE_ID).any(dim=-1).logical_not()
    assert blind.sum() == 5
    theirs = reference(**inputs).logits
    assert_differs(ours_of(ours, LATER)[blind], theirs[blind], 1000)
    assert_differs(ours_of(ours, LATER)[~blind], theirs[~blind], 100)
    right = MllamaTextCrossAttention.forward

    def zeroed(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, maps = right(self, *args, **kwargs)
        return out.masked_fill(blind[..., None], 0.0), maps

    monkeypatch.setattr(MllamaTextCrossAttention, "forward", zeroed)
    assert_equal(ours_of(ours, LATER), reference(**inputs).logits)


# transformers.


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits(kv_heads: int):
    ours, reference = pair(text={"num_key_value_heads": kv_heads})
    assert_equal(ours_of(ours), reference(**their_inputs(FIRST, pixels())).logits)


@torch.no_grad()
@pytest.mark.parametrize("number", range(1, 9))
def test_every_canvas(number: int):
    """Tokens of real tiles, and what is computed for the others."""
    ours, reference = pair()
    ids = torch.tensor([number])
    mask = (torch.arange(4) < COUNTS[number])[None, None].long()
    theirs = reference.model.vision_model(pixels(ids)[:, None], ids[:, None], mask).last_hidden_state[0]
    assert_equal(ours.vision_tower(pixels(ids), ids), theirs)


@torch.no_grad()
def test_pictures_count_and_only_for_words_that_see_them():
    ours, _ = pair()
    logits, tiles = ours_of(ours), pixels()
    for picture, row, first, last in ((0, 0, 0, 3), (1, 0, 3, 8), (2, 0, 4, 8), (3, 1, 0, 8)):
        other = tiles.clone()
        other[picture, 0] = tiles[picture, 0].flip(-1)
        changed = ours(FIRST, other, aspect_ratio_ids=IDS).logits
        # Words look at earlier words, which may have seen it; none before it may.
        assert torch.equal(changed[row, :first], logits[row, :first])
        assert torch.equal(changed[1 - row], logits[1 - row])
        assert_differs(changed[row, first:last], logits[row, first:last], 100)


@torch.no_grad()
def test_a_missing_tile_is_not_read():
    ours, _ = pair()
    tiles, ids = pixels(), IDS
    tokens = ours.encode_image(tiles, ids).unflatten(1, (4, -1))
    is_real = ours.vision_tower.real_tiles(ids)
    image, sees = tiles_in_rows(FIRST == IMAGE_ID, tokens, is_real)
    assert image.shape == (2, (3 + 4 + 1) * 5, 32)  # the first row's tiles: 1 x 3, 2 x 2, 1 x 1
    assert_equal(image[0], tokens[:3][is_real[:3]].flatten(0, 1))
    assert_equal(image[1, : 3 * 5], tokens[3][:3].flatten(0, 1))  # 3 x 1
    assert not image[1, 3 * 5 :].any()
    assert not sees[1, :, 3 * 5 :].any()


def test_who_sees_which_picture_is_as_in_transformers():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = torch.where(torch.rand(3, 9, generator=generator) < 0.4, IMAGE_ID, 5)
        rows[:, 0] = IMAGE_ID
        ids = torch.ones(int((rows == IMAGE_ID).sum()), dtype=torch.long)
        theirs = their_inputs(rows, pixels(ids), ids)["cross_attention_mask"][..., 0]  # of each first tile
        assert torch.equal(pictures_in_view(rows == IMAGE_ID), theirs.bool())


@torch.no_grad()
def test_generation():
    """The first row has several pictures, and the words that are written go on to see its last ones."""
    ours, reference = pair()
    inputs = their_inputs(FIRST, pixels())
    alone = reference.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours.config = replace(ours.config, eos_token_id=10**6)
    written = ours.generate(FIRST, 6, pixel_values=pixels(), aspect_ratio_ids=IDS)
    assert torch.equal(written, alone[:, FIRST.shape[1] :])


def test_the_loss():
    ours, reference = pair()
    labels = FIRST.masked_fill(FIRST == IMAGE_ID, -100)
    expected = reference(**their_inputs(FIRST, pixels()), labels=labels).loss
    assert_equal(ours(FIRST, pixels(), labels=labels, aspect_ratio_ids=IDS).loss, expected)


@pytest.mark.parametrize("head_dim", [8, 128])
def test_the_positions_of_llama_3(head_dim: int):
    scaling = Llama3Scaling(factor=4.0, original_max_position_embeddings=64)
    config = ReferenceLlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=4096,
        rope_parameters={**scaling.to_dict(), "rope_theta": 100.0},
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    places = torch.arange(40)[None]
    cos, sin = llama3_angles(places, head_dim, 100.0, scaling)
    angles = places[0, :, None] * torch.cat([frequencies, frequencies])
    assert_equal(cos[0, 0], angles.cos())
    assert_equal(sin[0, 0], angles.sin())


@torch.no_grad()
def test_logits_with_the_positions_of_llama_3():
    rope = {**Llama3Scaling(original_max_position_embeddings=16).to_dict(), "rope_theta": 100.0}
    ours, reference = pair(text={"rope_parameters": rope})
    expected = reference(**their_inputs(FIRST, pixels())).logits
    assert_equal(ours_of(ours), expected)
    ours.language_model.config = replace(ours.config.text, rope_scaling=None)
    assert_differs(ours_of(ours), expected, 100)


# Text alone.


@torch.no_grad()
def test_a_text_is_read_by_the_language_model_alone():
    """To the bit, beside Llama without the layers in between, and in a batch beside a row with a picture."""
    ours, reference = pair()
    decoder = ours.language_model
    llama = LlamaDecoder(ours.config.text.llama).eval()
    llama.embed_tokens, llama.norm, llama.lm_head = decoder.embed_tokens, decoder.norm, decoder.lm_head
    llama.layers = nn.ModuleList(layer for layer in decoder.layers if isinstance(layer, LlamaBlock))
    assert len(llama.layers) == 4
    rows = torch.tensor([[5, 6, 7, 8, 9, 10]])
    places = torch.arange(6)[None]
    alone = llama.logits(llama(llama.embed(rows), places, masks.causal(places, places)[:, None]))
    assert torch.equal(ours(rows).logits, alone)
    assert_equal(alone, reference(input_ids=rows).logits)

    both = torch.cat([rows, torch.tensor([[120, 6, 7, 8, 9, 10]])])
    tiles = {"pixel_values": pixels(IDS[:1]), "aspect_ratio_ids": IDS[:1]}
    together = ours(both, **tiles).logits
    plain = llama.logits(llama(llama.embed(both), places, masks.causal(places, places)[:, None]))
    assert_equal(together[0], plain[0])
    assert_differs(together[1], plain[1], 100)
    for layer in decoder.layers:
        if isinstance(layer, CrossAttentionBlock):
            layer.cross_attn_attn_gate.zero_()
            layer.cross_attn_mlp_gate.zero_()
    assert torch.equal(ours(both, **tiles).logits, plain)  # where training began


# Mistakes that reimplementations have made, and the least that each changes.


def blockwise(self: Any, pixel_values: Tensor, ids: Tensor) -> Tensor:
    """The early states one after the other, not interleaved."""
    out = RIGHT(self, pixel_values, ids)
    width = self.config.hidden_size
    states = out[..., width:].unflatten(-1, (width, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([out[..., :width], states], dim=-1)


RIGHT = LlamaVisionTower.forward


def strict(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Nobody sees padding and missing tiles."""
    both = mask & mask.mT & torch.diagonal(mask, dim1=-2, dim2=-1)[:, :, None]
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~both, torch.finfo(dtype).min)


def without_one_minus(self: Any, pixel_values: Tensor, ids: Tensor) -> Tensor:
    gate = self.position_gate.tanh()
    return EMBED(self, pixel_values, ids) + gate * self.position_embedding.weight


EMBED = TileEmbeddings.forward


def without_gates(self: Any, x: Tensor, mask: Tensor) -> Tensor:
    x = x + self.self_attn(self.input_layernorm(x), mask)
    return x + self.mlp(self.post_attention_layernorm(x))


def without_tanh(self: Any, x: Tensor, image: Any, mask: Tensor, is_blind: Tensor) -> Tensor:
    x = x + self.cross_attn_attn_gate * self.cross_attn.look(self.input_layernorm(x), image, mask)
    return x + self.cross_attn_mlp_gate * self.mlp(self.post_attention_layernorm(x))


def unnormed(self: Any, x: Tensor, image: Any, mask: Tensor) -> Tensor:
    q = self._heads(self.q_proj(x))
    out = text_module.attend(q, *image, mask, self.scale)
    return self.o_proj(out.transpose(1, 2).flatten(2))


MISTAKES: dict[str, tuple[Any, str, Callable[..., Any], float]] = {
    "early states blockwise": (LlamaVisionTower, "forward", blockwise, 0.1),
    "padding is closed": (vision_module, "additive", strict, 0.01),
    "tile's positions stay whole": (TileEmbeddings, "forward", without_one_minus, 0.05),
    "no tile embeddings": (TileEmbedding, "forward", lambda self, ids: torch.zeros(1), 0.05),
    "no gates in the tower": (GatedTileBlock, "forward", without_gates, 0.01),
    "no tanh": (CrossAttentionBlock, "forward", without_tanh, 0.01),
    "no norm of queries": (CrossAttention, "look", unnormed, 0.001),
    "tokens are not padded": (vision_module, "MULTIPLE", 1, 0.01),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_differs(name: str, monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    expected = reference(**their_inputs(FIRST, pixels())).logits
    assert_equal(ours_of(ours), expected)
    where, attribute, wrong, least = MISTAKES[name]
    monkeypatch.setattr(where, attribute, wrong)
    error = difference(ours_of(ours), expected)
    assert least < error < 2
