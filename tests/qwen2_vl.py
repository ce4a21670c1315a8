"""Tiny models of Qwen2-VL in transformers, and ours with the same weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig as ReferenceConfig
from transformers import Qwen2VLForConditionalGeneration

from minivlm.checkpoints.layouts import QWEN2_VL_LAYOUTS, names_in, split, to_ours
from minivlm.models.qwen2_vl import Qwen2VL, Qwen2VLConfig

IMAGE_ID, VIDEO_ID, START_ID, END_ID = 100, 101, 102, 103
VOCABULARY, PATCH = 120, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 3,
    "mlp_ratio": 2,
    "hidden_size": 32,
    "patch_size": PATCH,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
}
# Two rows: the first has two pictures of different shapes, the second one; then the same with a video.
GRIDS = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 2, 8]])
VIDEO_GRIDS = torch.tensor([[4, 4, 2]])


def vision_block(placeholder: int, grid: Tensor) -> list[int]:
    return [START_ID, *[placeholder] * (int(grid.prod()) // 4), END_ID]


def padded(rows: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, S]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


def patches(grids: Tensor, seed: int = 3) -> Tensor:
    """Random pixels for these grids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grids.prod(dim=1).sum()), 3 * 2 * PATCH * PATCH, generator=generator)


PICTURE_ROWS = [
    [5, 6, *vision_block(IMAGE_ID, GRIDS[0]), 7, *vision_block(IMAGE_ID, GRIDS[1]), 8, 9, 10, 11],
    [3, *vision_block(IMAGE_ID, GRIDS[2]), 12, 13, 14],
    [20, 21, 22, 23],
]
VIDEO_ROWS = [[5, 6, *vision_block(VIDEO_ID, VIDEO_GRIDS[0]), 7, 8, 9, 10, 11]]


def types_of(ids: Tensor) -> Tensor:
    """What transformers wants to be told: 1 for pictures, 2 for videos."""
    return (ids == IMAGE_ID).long() + 2 * (ids == VIDEO_ID)


def pictures(side: str = "left") -> dict[str, Tensor]:
    """A batch of `PICTURE_ROWS`, for either model; transformers wants `types_of`, too."""
    ids, mask = padded(PICTURE_ROWS, side)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": patches(GRIDS),
        "image_grid_thw": GRIDS,
    }


def videos() -> dict[str, Tensor]:
    ids, mask = padded(VIDEO_ROWS)
    pixels = patches(VIDEO_GRIDS, 4)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": pixels,
        "video_grid_thw": VIDEO_GRIDS,
    }


def reference_qwen2_vl(
    seed: int = 0, tied: bool = False, text: dict[str, Any] = TEXT, ids: dict[str, int] = IDS
) -> Any:
    config = ReferenceConfig(text_config=dict(text), vision_config=VISION, **ids, tie_word_embeddings=tied)
    return strengthened(Qwen2VLForConditionalGeneration(config), seed)


def strengthened(model: Any, seed: int = 0) -> Any:
    """Random weights of std 0.4, those of norms around 1: weaker ones hide mistakes in positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or "ln_q" in name
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            parameter += float(is_norm and name.endswith("weight"))
    model.set_attn_implementation("eager")
    return model.eval()


def load_into(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    """The weights of a model of transformers, in evaluation mode."""
    state: dict[str, Tensor] = {}
    for name, tensor in reference.state_dict().items():
        place = to_ours(name, QWEN2_VL_LAYOUTS["runtime"])
        assert place is not None, name
        state |= zip(names_in(place), split(tensor, place), strict=True)
    if ours.language_model.lm_head is None:
        del state["language_model.lm_head.weight"]
    ours.load_state_dict(state)
    ours.eval()


def pair(**changes: Any) -> tuple[Qwen2VL, Any]:
    """Ours and the reference, with the same weights."""
    reference = reference_qwen2_vl(**changes)
    ours = Qwen2VL(Qwen2VLConfig.from_dict(reference.config.to_dict()))
    load_into(ours, reference)
    return ours, reference


def embedded(
    model: Qwen2VL, input_ids: Tensor, attention_mask: Tensor, **pixels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the decoder gets of a batch: embeddings [B, S, D], position_ids [3, B, S]; and rope_deltas [B]."""
    media = model.encode_images(input_ids, **pixels)
    return model.merge(input_ids, media), *model.positions(input_ids, attention_mask, media)


def original_positions(ids: list[int], grids: dict[int, list[list[int]]], step: float) -> list[list[int]]:
    """The rule of the original program for one row, token by token; videos have a `step`."""
    found: list[list[int]] = []
    waiting = {placeholder: iter(of_kind) for placeholder, of_kind in grids.items()}
    for kind in re.findall(r"i+|v+|t", "".join({IMAGE_ID: "i", VIDEO_ID: "v"}.get(i, "t") for i in ids)):
        start = max((max(position) for position in found), default=-1) + 1
        if kind == "t":
            found.append([start] * 3)
            continue
        _, rows, columns = next(waiting[IMAGE_ID if kind[0] == "i" else VIDEO_ID])
        for place in range(len(kind)):
            per_step = rows * columns // 4
            step_number, within = divmod(place, per_step)
            row, column = divmod(within, columns // 2)
            time = int(step_number * step) if kind[0] == "v" else 0
            found.append([start + time, start + row, start + column])
    return found
