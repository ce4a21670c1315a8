"""Tiny models of Qwen2.5-VL in transformers, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from qwen2_vl import IDS, PATCH, TEXT, load_into, strengthened
from transformers import Qwen2_5_VLConfig as ReferenceConfig
from transformers import Qwen2_5_VLForConditionalGeneration

from minivlm.models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig

VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 4 * PATCH,  # 2 x 2 tokens
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
# Three pictures: windows fit across and not down, neither, both.
GRIDS = torch.tensor([[1, 6, 8], [1, 10, 6], [1, 4, 4]])


def reference_qwen2_5_vl(
    seed: int = 0, tied: bool = False, text: dict[str, Any] = TEXT, ids: dict[str, int] = IDS
) -> Any:
    config = ReferenceConfig(text_config=dict(text), vision_config=VISION, **ids, tie_word_embeddings=tied)
    return strengthened(Qwen2_5_VLForConditionalGeneration(config), seed)


def pair(**changes: Any) -> tuple[Qwen2_5_VL, Any]:
    """Ours and the reference, with the same weights."""
    reference = reference_qwen2_5_vl(**changes)
    ours = Qwen2_5_VL(Qwen2_5_VLConfig.from_dict(reference.config.to_dict()))
    load_into(ours, reference)
    return ours, reference
