"""Qwen2.5-VL equals transformers: windows, their order, and time. The rest is tested with Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_differs, assert_equal, difference
from qwen2_5_vl import GRIDS, pair
from qwen2_vl import (
    IMAGE_ID,
    VIDEO_GRIDS,
    VIDEO_ID,
    VIDEO_ROWS,
    VOCABULARY,
    embedded,
    original_positions,
    padded,
    patches,
    types_of,
    videos,
    vision_block,
)
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from minivlm import masks
from minivlm.attention import Attention
from minivlm.errors import InputError
from minivlm.models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig
from minivlm.vision import qwen2_5_vl as tower
from minivlm.vision.qwen2_5_vl import by_windows

ROWS = [
    [5, 6, *vision_block(IMAGE_ID, GRIDS[0]), 7, *vision_block(IMAGE_ID, GRIDS[1]), 8, 9, 10, 11],
    [3, *vision_block(IMAGE_ID, GRIDS[2]), 12, 13, 14],
    [20, 21, 22, 23],
]
SECONDS = torch.tensor([0.7])  # 1.4 positions: steps stand at 0, 1, 2, 4
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def pictures(side: str = "left") -> dict[str, Tensor]:
    ids, mask = padded(ROWS, side)
    pixels = {"pixel_values": patches(GRIDS), "image_grid_thw": GRIDS}
    return {"input_ids": ids, "attention_mask": mask, **pixels}


def theirs(reference: Any, batch: dict[str, Tensor], **more: Tensor) -> Tensor:
    logits: Tensor = reference(**batch, mm_token_type_ids=types_of(batch["input_ids"]), **more).logits
    return logits


# The tower


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("grids", [GRIDS, torch.tensor([[3, 6, 4], [1, 2, 2]]), GRIDS[2:]])
def test_windows_are_those_of_transformers(window: int, grids: Tensor):
    """Theirs counts the ends of windows in patches."""
    order, tokens = by_windows(grids, 2, window)
    expected, ends = get_vision_window_index(grids, 2, window * 8, 4)
    assert torch.equal(order, expected)
    assert [4 * count for count in tokens] == ends.diff().tolist()
    assert sorted(order.tolist()) == list(range(len(order)))


def test_the_drawing():
    """Of the file's first lines: 3 x 5 tokens in windows of 2 x 2."""
    order, tokens = by_windows(torch.tensor([[1, 6, 10]]), 2, 2)
    assert tokens == [4, 4, 2, 2, 2, 1]
    assert "".join("aabbcaabbcddeef"[i] for i in order.tolist()) == "aaaabbbbccddeef"


@torch.no_grad()
def test_image_features():
    ours, reference = pair()
    pixels = patches(GRIDS)
    features = reference.model.get_image_features(pixels, GRIDS).pooler_output
    assert_equal(ours.encode_image(pixels, GRIDS), torch.cat(features))


@torch.no_grad()
def test_segments_are_a_block_diagonal_mask():
    ours, _ = pair()
    attention = ours.vision_tower.layers[0].self_attn
    x = torch.randn(1, 11, 24, generator=torch.Generator().manual_seed(0))
    blocks = torch.tensor([[0] * 4 + [1] * 6 + [2]])
    mask = masks.block_diagonal(blocks, blocks)[:, None]
    assert_equal(attention.in_segments(x, [4, 6, 1], lambda q: q), Attention.forward(attention, x, mask))


def test_windows_cost_less(monkeypatch: pytest.MonkeyPatch):
    """Scores that a block computes, for 20 x 20 tokens: four windows of 10 x 10 against one of 20 x 20."""
    grid = torch.tensor([[1, 40, 40]])
    cost = [sum(count**2 for count in by_windows(grid, 2, window)[1]) for window in (10, 20)]
    assert cost[1] == 4 * cost[0]


# The whole model


@torch.no_grad()
@SIDES
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_the_pictures_count(side: str, tied: bool):
    ours, reference = pair(tied=tied)
    batch = pictures(side)
    real = batch["attention_mask"].bool()
    logits = ours(**batch).logits
    assert_equal(logits[real], theirs(reference, batch)[real])
    other = ours(**batch | {"pixel_values": patches(GRIDS, seed=9)}).logits
    assert_differs(other[:2], logits[:2], 1000)
    assert_equal(other[2], logits[2])


def video_positions(step: float) -> Tensor:
    """By the original rule, [3, 1, S]."""
    found = original_positions(VIDEO_ROWS[0], {VIDEO_ID: VIDEO_GRIDS.tolist()}, step)
    return torch.tensor(found).T[:, None]


@torch.no_grad()
@pytest.mark.parametrize("seconds", [1.0, 0.5, 0.7, 2.0, 0.1])
def test_a_video_with_the_original_positions(seconds: float):
    ours, reference = pair()
    batch = videos() | {"second_per_grid_ts": torch.tensor([seconds])}
    own = video_positions(2 * seconds)
    _, position_ids, deltas = embedded(ours, **batch)
    assert torch.equal(position_ids, own)
    assert int(deltas) == int(own.max()) + 1 - own.shape[2]
    assert_equal(ours(**batch).logits, theirs(reference, batch, position_ids=own))


@torch.no_grad()
def test_time_inside_of_a_video_is_that_of_transformers():
    """They differ only in where text goes on."""
    ours, reference = pair()
    batch = videos()
    ids = batch["input_ids"]
    expected, _ = reference.model.get_rope_index(
        ids, types_of(ids), video_grid_thw=VIDEO_GRIDS, second_per_grid_ts=SECONDS
    )
    _, found, _ = embedded(ours, **batch, second_per_grid_ts=SECONDS)
    is_video = (ids == VIDEO_ID)[0]
    assert torch.equal(found[:, :, is_video], expected[:, :, is_video])
    assert (found[0, 0, is_video] - 3).unique().tolist() == [0, 1, 2, 4]


@torch.no_grad()
def test_half_as_many_frames_are_the_same_time():
    """Positions of the steps that both samplings show, which Qwen2-VL moves."""
    ours, _ = pair()
    often, seldom = torch.tensor([[8, 2, 2]]), torch.tensor([[4, 2, 2]])
    times = []
    for grids, seconds in ((often, 0.5), (seldom, 1.0)):
        ids = torch.tensor([[5, *vision_block(VIDEO_ID, grids[0]), 6]])
        pixels = {"pixel_values_videos": patches(grids), "video_grid_thw": grids}
        _, found, _ = embedded(
            ours, ids, torch.ones_like(ids), **pixels, second_per_grid_ts=torch.tensor([seconds])
        )
        times.append(found[0, 0, 2:-2])
    assert torch.equal(times[0][::2], times[1])


@torch.no_grad()
@SIDES
def test_full_cached_and_padded_agree(side: str):
    ours, _ = pair()
    batch = pictures(side)
    last = batch["attention_mask"].cumsum(1).argmax(1)
    hidden, cache = ours.prefill(**batch)
    assert_equal(ours.logits(hidden), ours(**batch).logits[torch.arange(3), last])
    words = torch.tensor([30, 31, 32])
    hidden = ours.decode(words, torch.ones(3, dtype=torch.bool), cache)
    ids, mask = padded([[*row, int(word)] for row, word in zip(ROWS, words, strict=True)], side)
    longer = ours(**batch | {"input_ids": ids, "attention_mask": mask}).logits
    assert_equal(ours.logits(hidden), longer[torch.arange(3), mask.cumsum(1).argmax(1)])
    film = videos() | {"second_per_grid_ts": SECONDS}
    _, cache = ours.prefill(**film)
    hidden = ours.decode(torch.tensor([30]), torch.tensor([True]), cache)
    ids = torch.tensor([[*VIDEO_ROWS[0], 30]])
    longer = ours(**film | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    assert_equal(ours.logits(hidden), longer[:, -1])


@torch.no_grad()
def test_generation_is_that_of_transformers():
    ours, reference = pair()
    batch = pictures()
    types = types_of(batch["input_ids"])
    alone = reference.generate(
        **batch, mm_token_type_ids=types, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    object.__setattr__(ours.config, "eos_token_id", VOCABULARY + 1)
    written = ours.generate(**batch, max_new_tokens=5)
    assert torch.equal(written, alone[:, batch["input_ids"].shape[1] :])


def test_gradients_reach_every_weight():
    ours, _ = pair()
    batch = pictures("right")
    ours(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] >= IMAGE_ID, -100)).loss.backward()
    assert not [name for name, weight in ours.named_parameters() if weight.grad is None]


# Folders


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_and_what_we_save(tied: bool, tmp_path: Path):
    ours, reference = pair(tied=tied)
    batch = pictures()
    reference.save_pretrained(tmp_path / "theirs")
    again = Qwen2_5_VL.from_pretrained(tmp_path / "theirs")
    assert_equal(again(**batch).logits, ours(**batch).logits)
    again.save_pretrained(tmp_path / "ours")
    loaded, seen = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(seen[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    real = batch["attention_mask"].bool()
    assert_equal(theirs(loaded.eval(), batch)[real], ours(**batch).logits[real])
    assert Qwen2_5_VL.from_pretrained(tmp_path / "ours").config == again.config


PUBLISHED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_a_published_config():
    config = Qwen2_5_VLConfig.from_dict(PUBLISHED)
    assert config == Qwen2_5_VLConfig()
    assert config.vision.window == 4
    assert Qwen2_5_VLConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Qwen2_5_VL(config).parameters())
    assert round(weights / 1e6, 1) == 3754.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
        ({"vision_config": {"window_size": 27}}, "window_size is 27 pixels, and an image token has 28"),
        ({"vision_config": {"out_hidden_size": 9}}, "gives tokens of 9 numbers, and the decoder reads 2048"),
        ({"vision_config": {"fullatt_block_indexes": "all"}}, "fullatt_block_indexes is 'all'"),
        ({"vision_config": {"model_type": "qwen2_vl"}}, "model_type = 'qwen2_vl'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(changes: dict[str, Any], message: str):
    vision = PUBLISHED["vision_config"] | changes.pop("vision_config", {})  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        Qwen2_5_VLConfig.from_dict({**PUBLISHED, "vision_config": vision, **changes})


@torch.no_grad()
def test_a_video_without_its_time_is_refused():
    """transformers takes a second for each step, without a word."""
    ours, _ = pair()
    with pytest.raises(InputError, match="second_per_grid_ts is missing, and there are 1 videos"):
        ours(**videos())
    with pytest.raises(InputError, match="second_per_grid_ts has 2 numbers"):
        ours(**videos(), second_per_grid_ts=torch.ones(2))


# Mistakes, and how far off the logits then are


def one_window(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[int]]:
    return BY_WINDOWS(grid_thw, merge_size, 1000)


def smaller_windows(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[int]]:
    return BY_WINDOWS(grid_thw, merge_size, window - 1)


def unsorted(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[int]]:
    """Windows as long as they should be, of tokens row by row."""
    order, tokens = BY_WINDOWS(grid_thw, merge_size, window)
    return order.sort().values, tokens


class NotBack(Tensor):
    """An order whose inverse is itself."""

    def argsort(self, *args: Any, **kwargs: Any) -> Any:
        return torch.arange(len(self))


def not_put_back(grid_thw: Tensor, merge_size: int, window: int) -> tuple[Tensor, list[int]]:
    order, tokens = BY_WINDOWS(grid_thw, merge_size, window)
    return order.as_subclass(NotBack), tokens


def angles_not_moved(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Angles that end up where they were before the tokens moved."""
    order, _ = BY_WINDOWS(GRIDS, 2, 2)
    back = order.argsort()
    cos, sin = (part.unflatten(0, (-1, 4))[back].flatten(0, 1) for part in GRID_ANGLES(positions, head_dim))
    return cos, sin


BY_WINDOWS, GRID_ANGLES = tower.by_windows, tower.grid_angles
MISTAKES = {
    "one window": ("by_windows", one_window, 1.04),
    "smaller windows": ("by_windows", smaller_windows, 0.92),
    "tokens not moved": ("by_windows", unsorted, 1.01),
    "tokens not put back": ("by_windows", not_put_back, 0.89),
    "angles not moved": ("grid_angles", angles_not_moved, 1.0),
}


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_differ(mistake: str, monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    batch = pictures()
    real = batch["attention_mask"].bool()
    name, wrong, error = MISTAKES[mistake]
    monkeypatch.setattr(tower, name, wrong)
    off = difference(ours(**batch).logits[real], theirs(reference, batch)[real])
    assert off == pytest.approx(error, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize(("blocks", "error"), [((), 0.96), ((0, 1, 2), 1.04), ((2,), 0.83)])
def test_other_blocks_with_windows_differ(blocks: tuple[int, ...], error: float):
    ours, reference = pair()
    batch = pictures()
    real = batch["attention_mask"].bool()
    object.__setattr__(ours.config.vision, "fullatt_block_indexes", blocks)
    off = difference(ours(**batch).logits[real], theirs(reference, batch)[real])
    assert off == pytest.approx(error, rel=0.1)


@torch.no_grad()
def test_steps_in_place_of_seconds_differ():
    ours, reference = pair()
    batch = videos() | {"second_per_grid_ts": SECONDS}
    right = theirs(reference, batch, position_ids=video_positions(1.4))
    counted = ours(**batch | {"second_per_grid_ts": torch.tensor([0.5])}).logits
    assert difference(counted, right) == pytest.approx(0.81, rel=0.1)
