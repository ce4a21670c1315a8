"""Tiny decoders of DeepSeek-V2 and V3 in transformers, and their tensors in our words."""

from __future__ import annotations

import re
from typing import Any

import torch
from helpers import randomize
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

VOCABULARY = 120
WIDTHS = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
YARN: dict[str, Any] = {
    "factor": 4,
    "original_max_position_embeddings": 16,
    "mscale": 0.5,
    "mscale_all_dim": 0.9,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": None,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.0,
    **WIDTHS,
}


def reference(version: int, yarn: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers with random weights, and biases for the choice of experts where it has some."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        rope |= {"rope_type": "yarn", **YARN}
    values = TEXT | {"rope_parameters": rope} | changes
    model: Any
    if version == 2:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**{"topk_method": "group_limited_greedy"} | values))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    model.set_attn_implementation("eager")
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return model


def in_our_words(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module of transformers, where the experts of a layer are stacked."""
    ours = {}
    for name, tensor in module.state_dict().items():
        stacked = re.fullmatch(r"(.*experts)\.(gate_up|down)_proj", name)
        if stacked is None:
            ours[name.removeprefix("model.")] = tensor
            continue
        where = stacked[1].removeprefix("model.")
        for number, weight in enumerate(tensor):
            if stacked[2] == "down":
                ours[f"{where}.{number}.down_proj.weight"] = weight
            else:
                gate, up = weight.chunk(2)
                ours[f"{where}.{number}.gate_proj.weight"] = gate
                ours[f"{where}.{number}.up_proj.weight"] = up
    return ours
