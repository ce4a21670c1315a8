"""Qwen2-VL equals transformers, but for where text goes on after a video: that is the original's rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_differs, assert_equal, difference
from qwen2_vl import (
    GRIDS,
    IMAGE_ID,
    PICTURE_ROWS,
    VIDEO_GRIDS,
    VIDEO_ID,
    VIDEO_ROWS,
    VOCABULARY,
    embedded,
    original_positions,
    pair,
    patches,
    pictures,
    types_of,
    videos,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from minivlm import masks
from minivlm.checkpoints.layouts import QWEN2_VL_LAYOUTS, as_in_file
from minivlm.errors import InputError
from minivlm.models import qwen2_vl
from minivlm.models.multimodal_positions import Media, multimodal_positions
from minivlm.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
from minivlm.text import qwen2
from minivlm.vision import qwen2_vl as tower

SIDES = pytest.mark.parametrize("side", ["left", "right"])
NO_TOKENS = torch.empty(0)  # where only positions count


def theirs(reference: Any, batch: dict[str, Tensor], **more: Tensor) -> Tensor:
    logits: Tensor = reference(**batch, mm_token_type_ids=types_of(batch["input_ids"]), **more).logits
    return logits


def positions(batch: dict[str, Tensor], interval: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ours, of a batch."""
    media = [
        Media(placeholder, batch[name], torch.full((len(batch[name]),), interval), NO_TOKENS)
        for placeholder, name in ((IMAGE_ID, "image_grid_thw"), (VIDEO_ID, "video_grid_thw"))
        if name in batch
    ]
    return multimodal_positions(batch["input_ids"], batch["attention_mask"], media, 2)


# Positions


@SIDES
def test_positions_of_pictures(side: str):
    _, reference = pair()
    batch = pictures(side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected, deltas = reference.model.get_rope_index(ids, types_of(ids), GRIDS, attention_mask=mask)
    found, found_deltas = positions(batch)
    assert torch.equal(found, expected)
    assert found_deltas.tolist() == deltas[:, 0].tolist() == [-3, 0, 0]


@pytest.mark.parametrize("step", [1.0, 2.0, 1.5, 0.4, 25.0])
@pytest.mark.parametrize("grid", [[4, 4, 2], [1, 2, 2], [3, 8, 4], [6, 2, 10]])
def test_positions_of_a_video_are_the_original_ones(step: float, grid: list[int]):
    video, picture = [VIDEO_ID] * (grid[0] * grid[1] * grid[2] // 4), [IMAGE_ID] * 6
    ids = [7, 8, *picture, 9, *video, 10, 11, *video, 12]
    batch = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "image_grid_thw": GRIDS[:1],
        "video_grid_thw": torch.tensor([grid, grid]),
    }
    found, deltas = positions(batch, step)
    expected = original_positions(ids, {IMAGE_ID: [GRIDS[0].tolist()], VIDEO_ID: [grid, grid]}, step)
    assert found[:, 0].T.tolist() == expected
    assert int(deltas[0]) == max(map(max, expected)) + 1 - len(ids)


def test_text_after_a_video_begins_elsewhere_in_transformers():
    """Four steps of 2 x 1 tokens: theirs goes on at start + 2, where the third step is."""
    _, reference = pair()
    batch = videos()
    ids = batch["input_ids"]
    expected, _ = reference.model.get_rope_index(ids, types_of(ids), video_grid_thw=VIDEO_GRIDS)
    found, _ = positions(batch)
    last = ids[0].tolist().index(VIDEO_ID) + 8
    assert torch.equal(found[:, :, :last], expected[:, :, :last])
    assert (found - expected)[:, 0, last:].tolist() == [[2] * 6] * 3


def test_pictures_that_touch_are_two():
    ids = [IMAGE_ID] * 7 + [5]
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    found, _ = positions({**batch, "image_grid_thw": GRIDS[:2]})
    assert found[0, 0].tolist() == [0] * 6 + [3, 4]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([[5, *[IMAGE_ID] * 5, 6]], GRIDS[:1], "token 2 .* its picture takes 6 of them in a row"),
        ([[5, *[IMAGE_ID] * 7, 6]], GRIDS[:1], "token 8 .* no picture is left for it"),
        ([[5, *[IMAGE_ID] * 6, 6]], GRIDS[:2], "1 pictures or videos have no place"),
        ([[5, 6, 7]], GRIDS[:2], "2 pictures or videos have no place"),
    ],
)
def test_placeholders_without_pictures_are_refused(ids: list[list[int]], grids: Tensor, message: str):
    rows = torch.tensor(ids)
    media = [Media(IMAGE_ID, grids, torch.ones(len(grids)), NO_TOKENS)]
    with pytest.raises(InputError, match=message):
        multimodal_positions(rows, torch.ones_like(rows), media, 2)


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
    assert_equal(other[2], logits[2])  # the row without a picture


@torch.no_grad()
def test_image_features():
    ours, reference = pair()
    batch = pictures()
    features = reference.model.get_image_features(batch["pixel_values"], GRIDS).pooler_output
    assert_equal(ours.encode_image(batch["pixel_values"], GRIDS), torch.cat(features))


@torch.no_grad()
def test_a_video_with_the_original_positions():
    ours, reference = pair()
    batch = videos()
    own, _ = positions(batch)
    logits = ours(**batch).logits
    assert_equal(logits, theirs(reference, batch, position_ids=own))
    assert_differs(logits, theirs(reference, batch), 100)
    assert_differs(ours(**batch | {"pixel_values_videos": patches(VIDEO_GRIDS, 8)}).logits, logits, 1000)


@torch.no_grad()
def test_text_alone_needs_no_axes():
    """Three equal positions are one."""
    ours, reference = pair()
    ids = torch.arange(3, 20)[None]
    assert_equal(ours(ids).logits, reference(ids).logits)


@torch.no_grad()
@SIDES
def test_full_cached_and_padded_agree(side: str):
    """Pictures in the prompt, then word by word; rows end at different times. The same for a video."""
    ours, _ = pair()
    batch = pictures(side)
    whole = ours(**batch).logits
    answer = torch.tensor([[30, 31, 32], [33, 34, 0], [35, 36, 37]])
    lengths, rows = [3, 2, 3], torch.arange(3)
    hidden, cache = ours.prefill(**batch)
    last = batch["attention_mask"].cumsum(1).argmax(1)
    assert_equal(ours.logits(hidden), whole[rows, last])
    for step in range(3):
        unfinished = torch.tensor([step < length for length in lengths])
        hidden = ours.decode(answer[:, step], unfinished, cache)
        for row in range(3):
            if unfinished[row]:
                ids = [*PICTURE_ROWS[row], *answer[row, : step + 1].tolist()]
                alone = {"input_ids": torch.tensor([ids])}
                grids = [GRIDS[:2], GRIDS[2:], GRIDS[:0]][row]
                if len(grids):
                    ends = GRIDS.prod(dim=1).cumsum(0).tolist()
                    part = slice(0, ends[1]) if row == 0 else slice(ends[1], ends[2])
                    alone |= {"pixel_values": batch["pixel_values"][part], "image_grid_thw": grids}
                assert_equal(ours.logits(hidden)[row], ours(**alone).logits[0, -1])
    film = videos()
    hidden, cache = ours.prefill(**film)
    assert_equal(ours.logits(hidden), ours(**film).logits[:, -1])
    hidden = ours.decode(torch.tensor([30]), torch.tensor([True]), cache)
    ids = torch.tensor([[*VIDEO_ROWS[0], 30]])
    longer = film | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_equal(ours.logits(hidden), ours(**longer).logits[:, -1])


@torch.no_grad()
def test_packed_rows_are_rows():
    """Several rows as one, with the positions of each: its mask keeps them apart."""
    ours, _ = pair()
    batch = pictures("right")
    embeds, position_ids, _ = embedded(ours, **batch)
    real = batch["attention_mask"].bool()
    places = (real.cumsum(dim=1) - 1)[real][None]
    number = torch.arange(3)[:, None].expand_as(real)[real][None]
    mask = masks.causal(places, places) & masks.block_diagonal(number, number)
    packed = ours.language_model(embeds[real][None], position_ids[:, real][:, None], mask[:, None])
    assert_equal(ours.logits(packed)[0], ours(**batch).logits[real])


@torch.no_grad()
def test_generation_is_that_of_transformers():
    ours, reference = pair()
    batch = pictures()
    types = types_of(batch["input_ids"])
    alone = reference.generate(
        **batch, mm_token_type_ids=types, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    object.__setattr__(ours.config, "eos_token_id", VOCABULARY + 1)
    written = ours.generate(**batch, max_new_tokens=6)
    assert torch.equal(written, alone[:, batch["input_ids"].shape[1] :])


def test_the_loss_and_gradients_everywhere():
    ours, reference = pair()
    batch = pictures("right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 3, -100)
    labels = labels.masked_fill(batch["input_ids"] >= IMAGE_ID, -100)
    types = types_of(batch["input_ids"])
    loss = ours(**batch, labels=labels).loss
    assert_equal(loss, reference(**batch, mm_token_type_ids=types, labels=labels).loss)
    loss.backward()
    # A bias of all keys changes no softmax.
    none = [n for n, p in ours.named_parameters() if p.grad is None]
    assert not none


@torch.no_grad()
def test_bf16_keeps_its_dtype_and_stays_near():
    ours, _ = pair()
    half, batch = pair()[0].bfloat16(), pictures()
    logits, expected = half(**batch).logits, ours(**batch).logits
    hidden, cache = half.prefill(**batch)
    assert logits.dtype == hidden.dtype == cache.keys[0].dtype == torch.bfloat16
    real = batch["attention_mask"].bool()
    assert (logits.float() - expected)[real].abs().mean() < 0.1 * expected[real].abs().mean()


# Folders


@torch.no_grad()
@pytest.mark.parametrize("layout", sorted(QWEN2_VL_LAYOUTS))
def test_folders_of_every_layout(layout: str, tmp_path: Path):
    ours, reference = pair()
    reference.save_pretrained(tmp_path)
    named = as_in_file(ours.state_dict(), QWEN2_VL_LAYOUTS[layout])
    save_file({n: t.contiguous() for n, t in named.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(Qwen2VL.from_pretrained(tmp_path)(**pictures()).logits, ours(**pictures()).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_and_what_we_save(tied: bool, tmp_path: Path):
    ours, reference = pair(tied=tied)
    batch = pictures()
    reference.save_pretrained(tmp_path / "theirs")
    again = Qwen2VL.from_pretrained(tmp_path / "theirs")
    assert_equal(again(**batch).logits, ours(**batch).logits)
    again.save_pretrained(tmp_path / "ours")
    loaded, seen = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(seen[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    real = batch["attention_mask"].bool()
    assert_equal(theirs(loaded.eval(), batch)[real], ours(**batch).logits[real])
    assert Qwen2VL.from_pretrained(tmp_path / "ours").config == again.config


PUBLISHED = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_a_published_config():
    config = Qwen2VLConfig.from_dict(PUBLISHED)
    assert (config.text.hidden_size, config.text.head_dim, config.text.tie_word_embeddings) == (
        1536,
        128,
        True,
    )
    assert config.text.mrope_section == (16, 24, 24)
    assert config.vision.depth == 32
    assert Qwen2VLConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Qwen2VL(config).parameters())
    assert round(weights / 1e6, 1) == 2209.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "three numbers whose sum"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 16, 16]}}, "here 64"),
        ({"model_type": "qwen2_5_vl"}, "model_type 'qwen2_5_vl'"),
        (
            {"vision_config": {"hidden_size": 9}},
            "the tower gives tokens of 9 numbers, and the decoder reads 1536",
        ),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"vision_config": {"rope_parameters": {"rope_theta": 5.0}}}, "rope_theta = 5.0"),
        ({"vision_config": {"num_heads": 640}}, "choose a multiple of 4"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(changes: dict[str, Any], message: str):
    vision = PUBLISHED["vision_config"] | changes.pop("vision_config", {})  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        Qwen2VLConfig.from_dict({**PUBLISHED, "vision_config": vision, **changes})


@torch.no_grad()
def test_pixels_that_do_not_fit_are_refused():
    ours, _ = pair()
    batch = pictures()
    with pytest.raises(InputError, match="hold 11 image placeholders and there are 0 image tokens"):
        ours(batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match=r"hold 43 patches, and the grids .* have 44"):
        ours(**batch | {"pixel_values": batch["pixel_values"][1:]})
    with pytest.raises(ValueError, match=r"expected \[patches, 96\]"):
        ours(**batch | {"pixel_values": batch["pixel_values"][:, 1:]})
    with pytest.raises(ValueError, match="the last two divisible by 2"):
        ours(**batch | {"image_grid_thw": torch.tensor([[1, 4, 11]])})
    with pytest.raises(InputError, match="pictures need their pixels and their grids"):
        ours(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    with pytest.raises(InputError, match="videos need their pixels and their grids"):
        ours(batch["input_ids"], video_grid_thw=VIDEO_GRIDS)
    with pytest.raises(TypeError, match="image_grid_twh"):
        ours(**batch, image_grid_twh=GRIDS)


# Mistakes, and how far off the logits then are


def sections_in_turns(
    position_ids: Tensor, head_dim: int, sections: Any, theta: float
) -> tuple[Tensor, Tensor]:
    """Frequencies dealt out like cards, as later models do, instead of in three runs."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    angles = position_ids[..., None].float() * theta**-exponents
    angles = torch.stack([angles[i % 3, ..., i] for i in range(head_dim // 2)], dim=-1)[:, None]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def one_axis(ids: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return places.expand(3, -1, -1), torch.zeros(len(ids), dtype=torch.long)


def row_by_row(grid_thw: Tensor, merge_size: int) -> Tensor:
    """Positions as if patches came in the order of the picture."""
    return torch.cat(
        [torch.cartesian_prod(torch.arange(h), torch.arange(w)).repeat(t, 1) for t, h, w in grid_thw.tolist()]
    )


def columns_first(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    return GRID_ANGLES(positions.flip(1), head_dim)


def no_rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    return GRID_ANGLES(positions * 0, head_dim)


def all_in_one(grid_thw: Tensor) -> list[int]:
    return [int(grid_thw.prod(dim=1).sum())]


def whole_videos(grid_thw: Tensor) -> list[int]:
    return grid_thw.prod(dim=1).tolist()


GRID_ANGLES = tower.grid_angles
MISTAKES = {
    "sections in turns": (qwen2, "multimodal_angles", sections_in_turns, 0.056),
    "one axis": (qwen2_vl, "multimodal_positions", one_axis, 1.40),
    "patches row by row": (tower, "grid_positions", row_by_row, 1.65),
    "columns before rows": (tower, "grid_angles", columns_first, 1.33),
    "no positions in the tower": (tower, "grid_angles", no_rotation, 0.945),
    "pictures see each other": (tower, "frames_of", all_in_one, 0.88),
}


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_differ(mistake: str, monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    batch = pictures()
    real = batch["attention_mask"].bool()
    place, name, wrong, error = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong)
    off = difference(ours(**batch).logits[real], theirs(reference, batch)[real])
    assert off == pytest.approx(error, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize(("change", "error"), [("biases", 0.34), ("gelu", 0.060), ("merger", 1.49)])
def test_other_layers_differ(change: str, error: float):
    ours, reference = pair()
    batch = pictures()
    real = batch["attention_mask"].bool()
    if change == "biases":
        for layer in ours.language_model.layers:
            layer.self_attn.v_proj.bias.zero_()
    elif change == "gelu":
        for layer in ours.vision_tower.layers:
            layer.mlp.hidden_act = "gelu"
    else:
        ours.vision_tower.merger.norm = torch.nn.Identity()
    off = difference(ours(**batch).logits[real], theirs(reference, batch)[real])
    assert off == pytest.approx(error, rel=0.1)


@torch.no_grad()
def test_frames_that_see_each_other_differ(monkeypatch: pytest.MonkeyPatch):
    ours, _ = pair()
    batch = videos()
    right = ours(**batch).logits
    monkeypatch.setattr(tower, "frames_of", whole_videos)
    assert difference(ours(**batch).logits, right) == pytest.approx(1.05, rel=0.1)


@torch.no_grad()
def test_a_forgotten_delta_differs():
    """A new word after pictures, at its index instead of its position."""
    ours, _ = pair()
    batch = pictures()
    cache = ours.prefill(**batch)[1]
    cache.rope_deltas = torch.zeros_like(cache.rope_deltas)
    token, everyone = torch.tensor([30, 31, 32]), torch.ones(3, dtype=torch.bool)
    wrong = ours.logits(ours.decode(token, everyone, cache))
    right = ours.logits(ours.decode(token, everyone, ours.prefill(**batch)[1]))
    assert difference(wrong[:1], right[:1]) == pytest.approx(1.36, rel=0.1)
    assert_equal(wrong[2], right[2])  # without a picture, there is no delta
