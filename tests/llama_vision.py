"""Tiny models of Llama 3.2 Vision in transformers, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from minivlm.checkpoints.layouts import LLAMA_VISION_LAYOUTS, to_ours
from minivlm.models.llama_vision import LlamaVision, LlamaVisionConfig

IMAGE_ID, VOCABULARY, TILES = 120, 120, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "cross_attention_layers": [1, 4],
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_global_layers": 2,
    "attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": [0, 2],  # what transformers is told; Meta's and ours are [1, 3]
    "vision_output_dim": 3 * 24,
}
COUNTS = [0, 1, 2, 3, 4, 2, 4, 3, 4]  # tiles of each id
# Every row begins with its first picture: there, transformers and Meta's program agree.
FIRST = torch.tensor([[120, 5, 6, 120, 120, 7, 8, 9], [120, 10, 11, 12, 13, 14, 15, 16]])
LATER = torch.tensor([[3, 5, 120, 120, 6, 7, 8, 120], [3, 10, 11, 120, 13, 14, 15, 16]])
IDS = torch.tensor([3, 6, 1, 7])  # of the four pictures in either


def pixels(ids: Tensor = IDS, seed: int = 3) -> Tensor:
    """Random tiles, zeros where a canvas has none."""
    tiles = torch.randn(len(ids), TILES, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    counts = torch.tensor(COUNTS)[ids]
    return tiles * (torch.arange(TILES) < counts[:, None])[..., None, None, None]


def their_inputs(rows: Tensor, tiles: Tensor, ids: Tensor = IDS) -> dict[str, Tensor]:
    """What the processor of transformers would make of the same batch."""
    counts = (rows == IMAGE_ID).sum(dim=1).tolist()
    most = max(counts)
    inputs = {
        "input_ids": rows,
        "attention_mask": (rows != 0).long(),
        "pixel_values": torch.zeros(len(rows), most, *tiles.shape[1:]),
        "aspect_ratio_ids": torch.zeros(len(rows), most, dtype=torch.long),
        "aspect_ratio_mask": torch.zeros(len(rows), most, TILES, dtype=torch.long),
    }
    inputs["aspect_ratio_mask"][:, :, 0] = 1
    numbers: list[list[int]] = []
    for row, of_row in enumerate(ids.split(counts)):
        numbers.append([COUNTS[i] for i in of_row.tolist()])
        inputs["aspect_ratio_ids"][row, : len(of_row)] = of_row
        inputs["pixel_values"][row, : len(of_row)] = tiles.split(counts)[row]
        for place, number in enumerate(numbers[-1]):
            inputs["aspect_ratio_mask"][row, place, :number] = 1
    spans = [get_cross_attention_token_mask(row, IMAGE_ID) for row in rows.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, numbers, TILES, rows.shape[1])
    return inputs | {"cross_attention_mask": torch.from_numpy(mask)}


def reference_llama_vision(seed: int = 0, **changes: Any) -> Any:
    config = MllamaConfig(
        vision_config=VISION | changes.pop("vision", {}),
        text_config=TEXT | changes.pop("text", {}),
        image_token_index=IMAGE_ID,
        **changes,
    )
    model = MllamaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.8)
            elif "norm" in name and name.endswith("weight"):
                parameter += 1
    model.set_attn_implementation("eager")
    return model.eval()


def our_config(reference: Any) -> LlamaVisionConfig:
    """The same model in Meta's words: what a block is given is what the one before gives."""
    values = reference.config.to_dict()
    indices = values["vision_config"]["intermediate_layers_indices"]
    values["vision_config"] |= {"intermediate_layers_indices": [index + 1 for index in indices]}
    return LlamaVisionConfig.from_dict(values)


def pair(**changes: Any) -> tuple[LlamaVision, Any]:
    """Ours and the reference, with the same weights."""
    reference = reference_llama_vision(**changes)
    ours = LlamaVision(our_config(reference)).eval()
    state = {to_ours(n, LLAMA_VISION_LAYOUTS["runtime"]): t for n, t in reference.state_dict().items()}
    ours.load_state_dict(state)  # type: ignore[arg-type]
    return ours, reference
