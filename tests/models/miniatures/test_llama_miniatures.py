"""The miniatures with a Llama compute what the large systems do that they are after."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_equal, randomize
from miniatures import TINY_EXPERTS, TINY_LLAMA, TINY_VISION, tiny
from torch import Tensor

from minivlm.errors import InputError
from minivlm.models.deepseek_vl2 import DeepseekVL2, DeepseekVL2Config
from minivlm.models.llava import Llava, LlavaConfig
from minivlm.models.miniatures.cross_attention import CrossAttentionLlama
from minivlm.models.miniatures.one_view import OneView
from minivlm.models.miniatures.tiles import Tiles, cut
from minivlm.models.views import place
from minivlm.processing.deepseek_vl2_tiles import TiledImageProcessor
from minivlm.processing.halved import HalvedProcessor, halved
from minivlm.text.deepseek_v2 import DeepseekV2Config
from minivlm.text.llama_vision import LlamaVisionDecoder, LlamaVisionTextConfig
from minivlm.world.demo import sample_scene


def pictures(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["cross-attention", "cross-attention, every other layer"])
def test_cross_attention_is_that_of_llama_vision(name: str) -> None:
    model = randomize(tiny(name))
    assert isinstance(model, CrossAttentionLlama)
    text, cross = model.config.text, model.config.cross_attention_layers
    layers: list[torch.nn.Module] = []
    places = []
    for number, layer in enumerate(model.language_model.layers):
        if number in cross:
            places.append(len(layers))
            layers.append(model.cross_attention_layers[str(number)])
        layers.append(layer)
    large = LlamaVisionDecoder(
        LlamaVisionTextConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=len(layers),
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_theta,
            cross_attention_layers=tuple(places),
        )
    )
    for own, other in zip(large.layers, layers, strict=True):
        own.load_state_dict(other.state_dict())
    large.norm.load_state_dict(model.language_model.norm.state_dict())

    image_id = model.config.image_token_id
    ids = torch.tensor([[5, 6, image_id, 7, 8, image_id, 9]])  # words before a picture, and two pictures
    pixels = pictures(28)
    tokens = model.encode_image(pixels).flatten(0, 1)[None]  # both, one after the other
    sees = torch.zeros(1, 1, 7, 8, dtype=torch.bool)
    sees[:, :, 2:5, :4] = True
    sees[:, :, 5:, 4:] = True
    words = model.language_model.embed(ids)
    wanted = large(words, *place(torch.ones_like(ids)), None, large.read_image(tokens), sees)
    assert_equal(model.hidden_states(ids, pixels), wanted)


@torch.no_grad()
def test_tiles_are_those_of_deepseek_vl2() -> None:
    model = randomize(tiny("tiles"))
    assert isinstance(model, Tiles)
    text = replace(TINY_EXPERTS, moe=None)
    sizes = ((28, 28), (56, 56))
    large = DeepseekVL2(DeepseekVL2Config(TINY_VISION, text, candidate_resolutions=sizes))
    shared = {key: tensor for key, tensor in model.state_dict().items() if "language_model" not in key}
    assert not large.load_state_dict(shared, strict=False).unexpected_keys
    picture = sample_scene(2)[0].draw(56)
    reads = TiledImageProcessor(image_size=28, candidate_resolutions=sizes)
    views, grid, _ = reads.read([picture, picture.rotate(90)])
    whole = torch.stack([_join(of_picture) for of_picture in views.unflatten(0, (2, 5))[:, 1:]])
    own = cut(whole)
    assert torch.equal(own[:, 1:].flatten(0, 1), views.unflatten(0, (2, 5))[:, 1:].flatten(0, 1))
    wanted = large.encode_image(own.flatten(0, 1), grid).unflatten(0, (2, -1))
    assert wanted.shape[1] == model.config.num_image_tokens
    assert_equal(model.encode_image(whole), wanted)


def _join(tiles: Tensor) -> Tensor:
    """Four tiles [4, C, side, side] -> [C, 2 * side, 2 * side]."""
    return torch.cat([torch.cat(list(tiles[row : row + 2]), dim=2) for row in (0, 2)], dim=1)


@torch.no_grad()
def test_one_view_is_llava_with_a_shrunk_picture() -> None:
    model = randomize(tiny("one view"))
    assert isinstance(model, OneView)
    ids = {"image_token_id": 119, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    llava = Llava(LlavaConfig(TINY_VISION, TINY_LLAMA, **ids))
    llava.load_state_dict(model.state_dict())
    rows = torch.tensor([[5, *[119] * 4, 6, 7]])
    pixels = pictures(56, 1)
    small = pixels.unflatten(3, (28, 2)).unflatten(2, (28, 2)).mean(dim=(3, 5))
    wanted = llava.vision_tower(small)
    assert_equal(model.encode_image(pixels), llava.multi_modal_projector(wanted))
    assert_equal(
        model.hidden_states(rows, pixels),
        llava.read(rows, torch.ones_like(rows), llava.multi_modal_projector(wanted)),
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "sees"), [("one view", False), ("tiles", True), ("two towers", True)])
def test_who_sees_what_shrinking_loses(name: str, sees: bool) -> None:
    model = randomize(tiny(name))
    pixels = pictures(model.config.image_size)
    lost = pixels.clone()
    lost[..., ::2, ::2] += 0.5
    lost[..., 1::2, 1::2] -= 0.5
    torch.testing.assert_close(halved(lost), halved(pixels))
    moved = (model.encode_image(lost) - model.encode_image(pixels)).abs().max()
    assert (moved > 1e-2) == sees


def test_what_is_hidden_in_the_small_view_is_hidden_in_the_large_one() -> None:
    processor = HalvedProcessor.__new__(HalvedProcessor)  # needs no tokenizer here
    inputs = {"pixel_values": pictures(8, 1)}
    shown = processor.to_pictures(inputs)
    assert torch.equal(processor.from_pictures(shown, inputs)["pixel_values"], inputs["pixel_values"])
    versions = shown.repeat(2, 1, 1, 1)
    versions[1, :, :2, :2] = 0.25
    large = processor.from_pictures(versions, inputs)["pixel_values"]
    torch.testing.assert_close(halved(large), versions)
    assert (large[1, :, :4, :4] == 0.25).all()
    assert torch.equal(large[1, :, 4:], inputs["pixel_values"][0, :, 4:])
    gradient = torch.autograd.functional.jacobian(
        lambda x: halved(processor.from_pictures(x, inputs)["pixel_values"]).sum(), shown
    )
    torch.testing.assert_close(gradient, torch.ones_like(shown))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("cross-attention", {"cross_attention_layers": (1, 0)}, r"cross_attention_layers is \[1, 0\]"),
        ("cross-attention", {"cross_attention_layers": (0, 2)}, "from 0 to 1"),
        ("cross-attention", {"cross_attention_layers": ()}, "at least one number"),
        ("cross-attention", {"image_token_id": 120}, "make vocab_size larger"),
        ("experts", {"text": DeepseekV2Config(mla=None)}, "or no experts"),
        ("experts", {"text": DeepseekV2Config(moe=TINY_EXPERTS.moe)}, "has latent attention"),
        ("two towers", {"vision": TINY_VISION}, "must read twice as many pixels"),
    ],
)
def test_wrong_configs_are_refused(name: str, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(name, **wrong)
