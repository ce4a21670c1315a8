"""Qwen-VL's tower and resampler give the numbers of Qwen's own program, and usual mistakes give others.

transformers has no such model; how the numbers were made is said in tests/reference_qwen_vl.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, difference, noise
from qwen_vl import EXPECTED, VISION, filled, some
from torch import Tensor, nn

from minivlm.attention import record_attention
from minivlm.checkpoints.layouts import join, split
from minivlm.errors import InputError
from minivlm.vision.qwen_vl import QwenVLResampler, QwenVLVisionConfig, QwenVLVisionModel, sines_2d, stretch

PIXELS = noise(2, 3, 40, 40, start=0.5)


@torch.no_grad()
def test_it_gives_qwens_numbers() -> None:
    model = filled()
    tokens = model.vision_tower(PIXELS)
    assert tokens.shape == (2, 400, 24)
    assert_equal(some(tokens), EXPECTED["tower"])
    image = model.encode_image(PIXELS)
    assert image.shape == (2, 4, 256)
    assert_equal(some(image), EXPECTED["image"])


@torch.no_grad()
def test_the_picture_counts() -> None:
    changed = filled().encode_image(noise(2, 3, 40, 40, start=2.5))
    assert difference(some(changed), EXPECTED["image"]) > 0.01


# Mistakes, and how far at least they are off, as a share of the largest number.


def in_blocks(model: Any) -> None:
    """All queries of the file's matrix, then all keys, then all values."""
    for layer in model.vision_tower.layers:
        parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        for name in ("weight", "bias"):
            packed = join([getattr(part, name).data for part in parts], "{q,k,v|2}")
            for part, values in zip(parts, split(packed, "{q,k,v}"), strict=True):
                getattr(part, name).copy_(values)


def transposed(model: Any) -> None:
    model.resampler.proj.weight.copy_(model.resampler.proj.weight.T.clone())


def rows_first(model: Any) -> None:
    model.resampler.pos_embed = torch.cat(model.resampler.pos_embed.chunk(2, dim=1)[::-1], dim=1)


def tanh_gelu(model: Any) -> None:
    for layer in model.vision_tower.layers:
        layer.mlp.hidden_act = "gelu_pytorch_tanh"


def without_first_norm(model: Any) -> None:
    model.vision_tower.pre_layernorm = nn.Identity()


def without_table(model: Any) -> None:
    model.vision_tower.embeddings.position_embedding.weight.zero_()


@torch.no_grad()
@pytest.mark.parametrize(
    ("mistake", "least"),
    [
        (in_blocks, 0.2),
        (transposed, 0.5),
        (rows_first, 0.02),
        (tanh_gelu, 1e-4),
        (without_first_norm, 0.3),
        (without_table, 0.05),
    ],
)
def test_mistakes_in_the_weights_differ(mistake: Callable[[Any], None], least: float) -> None:
    model = filled()
    mistake(model)
    assert difference(some(model.encode_image(PIXELS)), EXPECTED["image"]) > least


def on_the_value(self: QwenVLResampler, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return LOOK(self, queries, keys, keys)


def not_on_the_key(self: QwenVLResampler, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return LOOK(self, queries, values, values)


def not_on_the_query(self: QwenVLResampler, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return LOOK(self, queries - self.pos_embed, keys, values)


LOOK = QwenVLResampler._look


@torch.no_grad()
@pytest.mark.parametrize(
    ("look", "least"), [(on_the_value, 0.3), (not_on_the_key, 0.002), (not_on_the_query, 0.1)]
)
def test_a_place_steers_the_look_and_is_not_seen(
    look: Callable[..., Tensor], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QwenVLResampler, "_look", look)
    assert difference(some(filled().encode_image(PIXELS)), EXPECTED["image"]) > least


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "least"),
    [({"mode": "bilinear"}, 0.01), ({"align_corners": True}, 0.003), ({"antialias": True}, 0.002)],
)
def test_another_way_to_stretch_differs(
    change: dict[str, object], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, **usual: interpolate(x, size, **usual | change))
    assert difference(some(filled().encode_image(PIXELS)), EXPECTED["image"]) > least


# The parts.


def test_stretching_keeps_the_order_of_places() -> None:
    """Row by row, as patches are: a table that says the row still does, and one that says the column."""
    rows, columns = torch.arange(16.0).repeat_interleave(16), torch.arange(16.0).repeat(16)
    table = torch.stack([rows, columns], dim=1)
    assert stretch(table, 256) is table
    wide = stretch(table, 1024).view(32, 32, 2)
    assert (wide[:, :, 0].diff(dim=0) > 0).all()
    assert_equal(wide[:, :, 0], wide[:, :1, 0].expand(-1, 32))
    assert_equal(wide[:, :, 1], wide[:, :, 0].T)
    assert stretch(table.bfloat16(), 4).dtype == torch.bfloat16


def test_sines_say_the_column_and_then_the_row() -> None:
    table = sines_2d(9, 8).view(3, 3, 2, 4)
    assert table.shape == (3, 3, 2, 4)
    assert torch.equal(table[0, :, 0], table[2, :, 0])
    assert torch.equal(table[:, 0, 1], table[:, 2, 1])
    x = torch.tensor(2.0)
    expected = torch.stack([x.sin(), (x / 100).sin(), x.cos(), (x / 100).cos()])
    torch.testing.assert_close(table[0, 2, 0], expected)
    torch.testing.assert_close(table[2, 0, 1], expected)


@torch.no_grad()
def test_each_query_looks_at_all_patches_once() -> None:
    """One map for each layer of the tower, and one of the resampler, with two heads of 128 numbers."""
    model = filled()
    with record_attention() as maps:
        model.encode_image(PIXELS)
    assert [layer.shape[1:] for layer in maps] == [(2, 400, 400)] * 2 + [(2, 4, 400)]
    torch.testing.assert_close(maps[-1].sum(dim=-1), torch.ones(2, 2, 4))


@torch.no_grad()
def test_more_patches_cost_the_decoder_nothing() -> None:
    resampler = QwenVLResampler(VISION)
    assert resampler(torch.randn(1, 400, 24)).shape == resampler(torch.randn(1, 36, 24)).shape == (1, 4, 256)


def test_published_sizes() -> None:
    with torch.device("meta"):
        config = QwenVLVisionConfig()
        tower, resampler = QwenVLVisionModel(config), QwenVLResampler(config)
    assert (config.intermediate_size, config.num_patches) == (8192, 1024)
    millions = [round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in (tower, resampler)]
    assert millions == [1842.8, 91.8]
    published = {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    }
    assert QwenVLVisionConfig.from_dict(published) == config
    assert config.to_dict() == {k: v for k, v in published.items() if k != "image_start_id"}


def test_what_is_refused() -> None:
    tiny = partial(QwenVLVisionConfig, 24, 2, 2, image_size=40, patch_size=2)
    with pytest.raises(InputError, match="there are 5 queries, which form no square"):
        tiny(num_queries=5)
    with pytest.raises(InputError, match=r"output_dim is 100, .* choose a multiple of 128"):
        tiny(output_dim=100)
    with pytest.raises(InputError, match=r"visual in config.json has no layers, heads"):
        QwenVLVisionConfig.from_dict({"width": 24, "mlp_ratio": 4.0, "image_size": 40, "patch_size": 2})
    with pytest.raises(ValueError, match="40, 40"):
        filled().vision_tower(torch.zeros(1, 3, 20, 20))
