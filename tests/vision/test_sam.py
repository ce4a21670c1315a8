"""SAM's tower: windows by hand, relative positions by hand, and the numbers of the original program.

`EXPECTED` was printed by deepseek_vl/models/sam.py of https://github.com/deepseek-ai/DeepSeek-VL, class
ImageEncoderViT(img_size=56, patch_size=8, embed_dim=24, depth=4, num_heads=3, mlp_ratio=2, out_chans=6,
norm_layer with eps 1e-6, use_rel_pos=True, window_size=3, global_attn_indexes=(1, 3),
downsample_channels=(12, 24)), in evaluation mode with the tensors of `made_up`, for PIXELS: every second
channel of the place in row 7 and column 11.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepseek_vl import in_our_words
from helpers import assert_differs, assert_equal
from made_up import made_up, noise

from minivlm.attention import record_attention
from minivlm.checkpoints.layouts import DEEPSEEK_VL_HYBRID_LAYOUTS, as_in_file
from minivlm.errors import InputError
from minivlm.vision.deepseek_vl import HighResolutionTower
from minivlm.vision.sam import (
    SamAttention,
    SamVisionConfig,
    SamVisionModel,
    cut_into_windows,
    join_windows,
    relative_scores,
)

CONFIG = SamVisionConfig(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=56,
    patch_size=8,
    output_channels=6,
    window_size=3,
    global_attn_indexes=(1, 3),
)
PIXELS = noise(1, 3, 56, 56, start=0.5)
EXPECTED = torch.tensor(
    [
        -0.1951190,
        0.4856460,
        -0.3814817,
        -0.8835210,
        -0.0122685,
        0.2170245,
        0.4385002,
        0.1066506,
        1.0709041,
        -0.3773505,
        -0.1933478,
        0.1673728,
    ]
)
LAYOUT = DEEPSEEK_VL_HYBRID_LAYOUTS["original"]
PREFIX = "vision_model.vision_tower_high.vision_tower."


def tower() -> HighResolutionTower:
    """Ours with the tensors that the original program was given, by their names there."""
    model = HighResolutionTower(CONFIG, side=24)
    ours = {f"high_res_tower.{name}": tensor for name, tensor in model.state_dict().items()}
    theirs = {
        name: made_up(name.removeprefix(PREFIX), tensor.shape)
        for name, tensor in as_in_file(ours, LAYOUT).items()
    }
    state = in_our_words(theirs, LAYOUT)
    model.load_state_dict({name.removeprefix("high_res_tower."): state[name] for name in state})
    return model.eval()


@torch.no_grad()
def test_it_gives_the_numbers_of_the_original():
    tokens = tower()(PIXELS)
    assert tokens.shape == (1, 24 * 24, 24)
    assert_equal(tokens[0, 7 * 24 + 11, ::2], EXPECTED)
    assert_differs(tower()(noise(1, 3, 56, 56, start=2.5))[0, 7 * 24 + 11, ::2], EXPECTED)


def test_windows_there_and_back():
    """7 x 7 places in windows of 3 x 3: nine windows, with zeros below and to the right."""
    x = torch.arange(1.0, 2 * 7 * 7 * 2 + 1).view(2, 7, 7, 2)
    windows = cut_into_windows(x, 3)
    assert windows.shape == (2 * 9, 3, 3, 2)
    assert torch.equal(windows[1], x[0, :3, 3:6])  # row by row
    assert torch.equal(windows[3], x[0, 3:6, :3])
    assert torch.equal(windows[2][:, 0], x[0, :3, 6])
    assert (windows[2][:, 1:] == 0).all()
    assert torch.equal(join_windows(windows, 7, 7), x)
    assert cut_into_windows(x[:, :6, :6], 3).shape[0] == 2 * 4


def test_relative_positions_by_hand():
    generator = torch.Generator().manual_seed(0)
    q, rows, columns = (torch.randn(shape, generator=generator) for shape in ((2, 3, 9, 4), (5, 4), (5, 4)))
    scores = relative_scores(q, rows, columns)
    for query, key in ((0, 8), (4, 4), (5, 1), (7, 6)):
        down, right = query // 3 - key // 3, query % 3 - key % 3
        added = q[:, :, query] @ (rows[down + 2] + columns[right + 2])
        torch.testing.assert_close(scores[:, :, query, key], added)


@torch.no_grad()
def test_padding_takes_part_in_attention():
    """The last window has one real place, and it looks at eight others."""
    model = tower()
    with record_attention() as maps:
        tokens = model(PIXELS)
    assert [len(layer) for layer in maps] == [9 * 3, 3, 9 * 3, 3]  # windows and heads, one row each
    assert maps[0].shape[1:] == (1, 9, 9)
    assert (maps[0][-3:, 0, 0, 1:].sum(dim=1) > 0.5).all()
    assert_equal(tokens[0, 7 * 24 + 11, ::2], EXPECTED)  # recorded or not


@torch.no_grad()
def test_bf16_stays_near():
    half = tower().bfloat16()(PIXELS.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - tower()(PIXELS)).abs().mean() < 0.1


def test_gradients_reach_every_tensor():
    model = tower()
    model(PIXELS).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sam_b_has_its_published_size():
    with torch.device("meta"):
        model = SamVisionModel(SamVisionConfig())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 89.7
    sides = [layer.self_attn.rel_pos_h.shape[0] for layer in model.layers]
    assert sides == [27, 27, 127] * 4
    assert all(isinstance(layer.self_attn, SamAttention) for layer in model.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rel_pos": False}, "use_rel_pos = False; only True"),
        ({"use_abs_pos": False}, "use_abs_pos = False; only True"),
        ({"qkv_bias": False}, "qkv_bias = False; only True"),
        ({"model_type": "siglip_vision_model"}, "model_type = 'siglip_vision_model'"),
        ({"global_attn_indexes": []}, "expected at least one"),
        ({"global_attn_indexes": [4]}, "at least one, from 0 to 3"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": 5}, "not divisible by 5 heads"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str):
    assert SamVisionConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(InputError, match=message):
        SamVisionConfig.from_dict(CONFIG.to_dict() | changes)
