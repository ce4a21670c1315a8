"""DeepSeek-VL equals that of transformers, with one tower and with two, and each mistake shows.

How large the error of a mistake is at least: as a share of the largest number of an image token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepseek_vl import HIGH, IDS, IMAGE_TOKENS, LOW_ALONE, PICTURES, VOCABULARY, hybrid_pair, plain_pair
from helpers import assert_differs, assert_equal, difference
from torch import Tensor
from transformers import DeepseekVLForConditionalGeneration, DeepseekVLHybridForConditionalGeneration

from minivlm import masks
from minivlm.checkpoints.layouts import as_in_file
from minivlm.models.deepseek_vl import DeepseekVL
from minivlm.models.deepseek_vl_hybrid import DeepseekVLHybrid
from minivlm.vision import sam
from minivlm.vision.deepseek_vl import HighResolutionTower, HybridAligner
from minivlm.vision.sam import SamAttention, SamBlock, cut_into_windows, join_windows

SYSTEMS = {
    "hybrid": (hybrid_pair, PICTURES, DeepseekVLHybridForConditionalGeneration),
    "plain": (plain_pair, LOW_ALONE, DeepseekVLForConditionalGeneration),
}
both = pytest.mark.parametrize("system", SYSTEMS)


def flipped(pictures: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The same pictures, those of these names from right to left."""
    return {name: tensor.flip(-1) if name in names else tensor for name, tensor in pictures.items()}


@torch.no_grad()
def test_image_features():
    ours, reference = hybrid_pair()
    features = reference.model.get_image_features(**PICTURES)
    high = ours.high_res_tower(PICTURES["high_res_pixel_values"])
    assert_equal(high, features.high_res_vision_last_hidden_state)
    assert_equal(ours.vision_tower(PICTURES["pixel_values"]), features.last_hidden_state)
    assert_equal(ours.encode_image(**PICTURES), features.pooler_output)
    assert ours.encode_image(**PICTURES).shape == (2, IMAGE_TOKENS, 32)


@torch.no_grad()
def test_every_block_of_sam():
    ours, reference = hybrid_pair()
    expected = reference.model.high_res_vision_model(
        PICTURES["high_res_pixel_values"], output_hidden_states=True
    )
    states = list(ours.high_res_tower.sam.hidden_states(PICTURES["high_res_pixel_values"]))
    assert len(states) == len(expected.hidden_states) == 5
    for state, theirs in zip(states, expected.hidden_states, strict=True):
        assert_equal(state, theirs)
    assert_equal(ours.high_res_tower.sam(PICTURES["high_res_pixel_values"]), expected.last_hidden_state)


@torch.no_grad()
@both
def test_logits_and_both_pictures_count(system: str):
    make, pictures, _ = SYSTEMS[system]
    ours, reference = make()
    logits = ours(IDS, **pictures).logits
    assert_equal(logits, reference(input_ids=IDS, **pictures).logits)
    for name in pictures:
        changed = ours(IDS, **flipped(pictures, name)).logits
        assert_differs(changed[:2, -1], logits[:2, -1])
        assert_equal(changed[2], logits[2])  # the row without a picture


@torch.no_grad()
@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(system: str, side: str):
    """Beside a reference that is padded alike, and beside each row alone."""
    make, pictures, _ = SYSTEMS[system]
    ours, reference = make()
    pad = torch.zeros(3, 3, dtype=torch.long)
    ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], dim=1)
    mask = (ids != 0).long()
    real = mask.bool()
    logits = ours(ids, attention_mask=mask, **pictures).logits
    assert_equal(logits[real], reference(input_ids=ids, attention_mask=mask, **pictures).logits[real])
    assert_equal(logits[real].view(3, IDS.shape[1], -1), ours(IDS, **pictures).logits)


@torch.no_grad()
@both
def test_full_cached_and_padded_agree(system: str):
    make, pictures, _ = SYSTEMS[system]
    ours, _ = make()
    full = ours(IDS, **pictures).logits
    start, pad = 12, torch.zeros(3, 2, dtype=torch.long)
    for ids in (IDS[:, :start], torch.cat([pad, IDS[:, :start]], 1), torch.cat([IDS[:, :start], pad], 1)):
        hidden, cache = ours.prefill(ids, (ids != 0).long(), **pictures)
        assert_equal(ours.logits(hidden), full[:, start - 1])
        for place in range(start, IDS.shape[1]):
            hidden = ours.decode(IDS[:, place], torch.ones(3, dtype=torch.bool), cache)
            assert_equal(ours.logits(hidden), full[:, place])


@torch.no_grad()
@both
def test_generation(system: str):
    make, pictures, _ = SYSTEMS[system]
    ours, reference = make()
    alone = reference.generate(
        input_ids=IDS, **pictures, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours.config = replace(ours.config, eos_token_id=VOCABULARY + 1)
    written = ours.generate(IDS, 6, attention_mask=torch.ones_like(IDS), **pictures)
    assert torch.equal(written, alone[:, IDS.shape[1] :])


@both
def test_the_loss(system: str):
    make, pictures, _ = SYSTEMS[system]
    ours, reference = make()
    labels = IDS.masked_fill(IDS == 100, -100)
    labels[:, :12] = -100
    expected = reference(input_ids=IDS, labels=labels, **pictures).loss
    assert_equal(ours(IDS, labels=labels, **pictures).loss, expected)


# Folders


@torch.no_grad()
@both
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_and_what_we_save(system: str, tied: bool, tmp_path: Path):
    make, pictures, their_class = SYSTEMS[system]
    ours, reference = make(tied=tied)
    reference.save_pretrained(tmp_path / "theirs")
    again = type(ours).from_pretrained(tmp_path / "theirs")
    expected = reference(input_ids=IDS, **pictures).logits
    assert_equal(again(IDS, **pictures).logits, expected)
    assert replace(again.config, pad_token_id=0) == ours.config
    again.save_pretrained(tmp_path / "ours")
    loaded, seen = their_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(seen[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(loaded.eval()(input_ids=IDS, **pictures).logits, expected)


@both
def test_layouts_there_and_back(system: str):
    """Every layout names every tensor, and no two alike."""
    ours, _ = SYSTEMS[system][0]()
    state = ours.state_dict()
    for layout in type(ours).layouts.values():
        named = as_in_file(state, layout)
        qkv = sum(3 - 1 for name in named if ".qkv." in name)
        assert len(named) + qkv == len(state)


# Mistakes


def low_before_high(self: HybridAligner, low: Tensor, high: Tensor) -> Tensor:
    return self.proj(F.gelu(torch.cat([self.low(low), self.high(high)], dim=-1)))


def tanh_gelu(self: HybridAligner, low: Tensor, high: Tensor) -> Tensor:
    joined = torch.cat([self.high(high), self.low(low)], dim=-1)
    return self.proj(F.gelu(joined, approximate="tanh"))


@torch.no_grad()
@pytest.mark.parametrize(("forward", "least"), [(low_before_high, 0.5), (tanh_gelu, 1e-5)])
def test_another_aligner_differs(
    forward: Callable[..., Tensor], least: float, monkeypatch: pytest.MonkeyPatch
):
    ours, _ = hybrid_pair()
    right = ours.encode_image(**PICTURES)
    monkeypatch.setattr(HybridAligner, "forward", forward)
    assert difference(ours.encode_image(**PICTURES), right) > least


def with_states(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A high tower that joins its states [B, side, side, D] in another way."""

    def forward(self: HighResolutionTower, pixel_values: Tensor) -> Tensor:
        x = choose(self, list(self.sam.hidden_states(pixel_values)))
        return x.flatten(2).transpose(1, 2)

    return forward


def one_neck(self: Any, states: list[Tensor]) -> Tensor:
    return self.shrink(self.sam.neck(states[-1])) + self.alpha * self.shrink(self.sam.neck(states[2]))


def last_global_block(self: Any, states: list[Tensor]) -> Tensor:
    return self.shrink(self.sam.neck(states[-1])) + self.alpha * self.shrink(self.early_neck(states[-1]))


def before_the_global_block(self: Any, states: list[Tensor]) -> Tensor:
    return self.shrink(self.sam.neck(states[-1])) + self.alpha * self.shrink(self.early_neck(states[1]))


def no_alpha_branch(self: Any, states: list[Tensor]) -> Tensor:
    return self.shrink(self.sam.neck(states[-1]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("choose", "least"),
    [(one_neck, 0.3), (last_global_block, 0.1), (before_the_global_block, 0.1), (no_alpha_branch, 0.3)],
)
def test_other_states_of_sam_differ(
    choose: Callable[..., Tensor], least: float, monkeypatch: pytest.MonkeyPatch
):
    ours, _ = hybrid_pair()
    pixels = PICTURES["high_res_pixel_values"]
    right = ours.high_res_tower(pixels)
    monkeypatch.setattr(HighResolutionTower, "forward", with_states(choose))
    assert difference(ours.high_res_tower(pixels), right) > least


@torch.no_grad()
def test_aligned_corners_differ(monkeypatch: pytest.MonkeyPatch):
    ours, _ = hybrid_pair()
    right = ours.high_res_tower(PICTURES["high_res_pixel_values"])
    resize = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: resize(*a, **k | {"align_corners": True}))
    assert difference(ours.high_res_tower(PICTURES["high_res_pixel_values"]), right) > 0.05


def hidden_padding(self: SamBlock, x: Tensor) -> Tensor:
    """Padded tokens take no part: each window is cut to its real places, a square or not."""
    if self.window_size is None:
        return self.self_attn.in_squares(x)
    real = cut_into_windows(torch.ones_like(x[..., :1]), self.window_size).flatten(1, 2)[..., 0]
    heads = self.self_attn.q_proj.out_features // self.self_attn.head_dim
    mask = real.bool()[:, None].expand(-1, heads, -1).flatten(0, 1)[:, None, None]
    attend = sam.attend
    sam.attend = lambda q, k, v, added, scale: attend(  # type: ignore[assignment]
        q, k, v, added.masked_fill(~mask, -1e9), scale
    )
    try:
        windows = self.self_attn.in_squares(cut_into_windows(x, self.window_size))
    finally:
        sam.attend = attend
    return join_windows(windows, *x.shape[1:3])


def no_windows(self: SamBlock, x: Tensor) -> Tensor:
    """Neighbors of another window are read at the same places."""
    if self.window_size is None:
        return self.self_attn.in_squares(x)
    moved = x.roll((1, 1), (1, 2))
    windows = self.self_attn.in_squares(cut_into_windows(moved, self.window_size))
    return join_windows(windows, *x.shape[1:3]).roll((-1, -1), (1, 2))


@torch.no_grad()
@pytest.mark.parametrize("look_around", [hidden_padding, no_windows])
def test_other_windows_differ(look_around: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch):
    ours, _ = hybrid_pair()
    right = ours.high_res_tower(PICTURES["high_res_pixel_values"])
    monkeypatch.setattr(SamBlock, "look_around", look_around)
    assert difference(ours.high_res_tower(PICTURES["high_res_pixel_values"]), right) > 0.03


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["none", "scaled", "rows for columns", "backwards"])
def test_other_relative_positions_differ(mistake: str, monkeypatch: pytest.MonkeyPatch):
    ours, _ = hybrid_pair()
    pixels = PICTURES["high_res_pixel_values"]
    right, relative = ours.high_res_tower(pixels), sam.relative_scores
    wrong = {
        "none": lambda q, rows, columns: relative(q, rows, columns) * 0,
        "scaled": lambda q, rows, columns: relative(q, rows, columns) * q.shape[-1] ** -0.5,
        "rows for columns": lambda q, rows, columns: relative(q, columns, rows),
        "backwards": lambda q, rows, columns: relative(q, rows.flip(0), columns.flip(0)),
    }
    monkeypatch.setattr(sam, "relative_scores", wrong[mistake])
    assert difference(ours.high_res_tower(pixels), right) > 0.03


@torch.no_grad()
@both
def test_the_other_gelu_of_siglip_differs(system: str):
    make, pictures, _ = SYSTEMS[system]
    ours, _ = make()
    right = ours.encode_image(**pictures)
    for layer in ours.vision_tower.layers:
        layer.mlp.hidden_act = "gelu_pytorch_tanh"
    assert_differs(ours.encode_image(**pictures), right, factor=1)


@torch.no_grad()
def test_without_the_last_norm_differs():
    ours, _ = plain_pair()
    right = ours.encode_image(**LOW_ALONE)
    ours.vision_tower.post_layernorm.forward = lambda x: x
    assert difference(ours.encode_image(**LOW_ALONE), right) > 0.01


@torch.no_grad()
def test_a_prefix_that_sees_the_question_differs(monkeypatch: pytest.MonkeyPatch):
    ours, _ = hybrid_pair()
    right = ours(IDS, **PICTURES).logits
    places = torch.arange(IDS.shape[1])[None]
    prefix = masks.prefix_lm(places, places, torch.tensor([12]))
    monkeypatch.setattr(masks, "causal", lambda queries, keys: prefix)
    assert_differs(ours(IDS, **PICTURES).logits, right)


# What is refused


def test_what_is_missing():
    ours, _ = hybrid_pair()
    with pytest.raises(ValueError, match="every picture in two sizes"):
        ours(IDS, **LOW_ALONE)
    with pytest.raises(ValueError, match="hold 17 image placeholders and the pictures give 18"):
        ours(IDS.index_fill(1, torch.tensor([1]), 9), **PICTURES)
    with pytest.raises(ValueError, match=str(HIGH)):
        ours.encode_image(PICTURES["pixel_values"], PICTURES["pixel_values"])


def test_the_numbers_of_a_published_model():
    """deepseek-vl-7b has 7.3 billion parameters, SAM's tower 96 million with its additions."""
    with torch.device("meta"):
        model = DeepseekVLHybrid(DeepseekVLHybrid.config_class())
        plain = DeepseekVL(DeepseekVL.config_class())
    assert model.config.num_image_tokens == plain.config.num_image_tokens == 576
    assert isinstance(model.high_res_tower.sam.layers[0].self_attn, SamAttention)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert round(sizes["high_res_tower"] / 1e6) == 96
    assert round(sizes["vision_tower"] / 1e6) == 304
    assert round(sum(sizes.values()) / 1e9, 1) == 7.3
    assert round(sum(p.numel() for p in plain.parameters()) / 1e9, 2) == 1.96
