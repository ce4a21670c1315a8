"""What the tests of the miniatures share: the same tiny parts, and one of each system."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minivlm.models.miniatures.base import Miniature
from minivlm.models.miniatures.clipcap import ClipCap, ClipCapConfig
from minivlm.models.miniatures.cm3 import CM3, CM3Config
from minivlm.models.miniatures.cross_attention import CrossAttentionConfig, CrossAttentionLlama
from minivlm.models.miniatures.experts import ExpertsConfig, LlavaExperts
from minivlm.models.miniatures.flamingo import Flamingo, FlamingoConfig
from minivlm.models.miniatures.one_view import OneView, OneViewConfig
from minivlm.models.miniatures.simvlm import SimVLM, SimVLMConfig
from minivlm.models.miniatures.tiles import Tiles, TilesConfig
from minivlm.models.miniatures.two_towers import TwoTowers, TwoTowersConfig
from minivlm.models.miniatures.visualbert import VisualBERT, VisualBERTConfig
from minivlm.models.miniatures.visualgpt import VisualGPT, VisualGPTConfig
from minivlm.text.bert import BertConfig
from minivlm.text.deepseek_v2 import DeepseekV2Config
from minivlm.text.gpt2 import GPT2Config
from minivlm.text.llama import LlamaConfig
from minivlm.text.moe import MoEConfig
from minivlm.vision.conv_stem import ConvStemConfig
from minivlm.vision.siglip import SiglipVisionConfig

TINY_VISION = SiglipVisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
TINY_STEM = ConvStemConfig(layers=(1, 1, 1), width=4, image_size=28, patch_size=8)
TINY_LARGE_STEM = replace(TINY_STEM, image_size=32)
TINY_TEXT = GPT2Config(
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=120,
    max_position_embeddings=64,
)
TINY_BERT = BertConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=120,
    max_position_embeddings=64,
)
TINY_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TINY_LLAMA = LlamaConfig(**TINY_SIZES)
TINY_EXPERTS = DeepseekV2Config(
    **TINY_SIZES,
    mla=None,
    moe=MoEConfig(n_routed_experts=2, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1),
)
TINY_FLAMINGO = {
    "num_latents": 3,
    "resampler_depth": 2,
    "resampler_heads": 2,
    "cross_attn_heads": 4,
    "head_dim": 8,
}
Small = Miniature | VisualBERT
SYSTEMS: dict[str, tuple[type[Small], type[Any], dict[str, Any]]] = {  # name -> classes, settings
    "clipcap": (ClipCap, ClipCapConfig, {"prefix_length": 5, "clip_length": 3, "num_mapping_layers": 2}),
    "clipcap, mlp": (ClipCap, ClipCapConfig, {"prefix_length": 3, "mapping_type": "mlp"}),
    "flamingo": (Flamingo, FlamingoConfig, TINY_FLAMINGO),
    "flamingo, every other layer and times": (
        Flamingo,
        FlamingoConfig,
        TINY_FLAMINGO | {"cross_attn_every_n_layers": 2, "max_num_media": 3, "max_num_frames": 1},
    ),
    "visualbert": (
        VisualBERT,
        VisualBERTConfig,
        {"text": TINY_BERT, "visual_embedding_dim": 24, "mask_token_id": 3},
    ),
    "cm3": (CM3, CM3Config, {"mask_token_ids": (110, 111, 112), "end_of_mask_token_id": 113}),
    "simvlm": (SimVLM, SimVLMConfig, {"vision": TINY_STEM}),
    "visualgpt": (VisualGPT, VisualGPTConfig, {"encoder_intermediate_size": 40}),
    "cross-attention": (
        CrossAttentionLlama,
        CrossAttentionConfig,
        {"text": TINY_LLAMA, "cross_attention_layers": (0, 1)},
    ),
    "cross-attention, every other layer": (
        CrossAttentionLlama,
        CrossAttentionConfig,
        {"text": TINY_LLAMA, "cross_attention_layers": (1,)},
    ),
    "experts": (LlavaExperts, ExpertsConfig, {"text": TINY_EXPERTS}),
    "one view": (OneView, OneViewConfig, {"text": TINY_LLAMA}),
    "tiles": (Tiles, TilesConfig, {"text": TINY_LLAMA}),
    "two towers": (
        TwoTowers,
        TwoTowersConfig,
        {
            "text": TINY_LLAMA,
            "vision": replace(TINY_VISION, image_size=16, patch_size=8),
            "high_res_vision": TINY_LARGE_STEM,
        },
    ),
}


def tiny(name: str, **settings: Any) -> Small:
    """An untrained model with tiny parts; the id of <image> is the last of the vocabulary."""
    model, config, own = SYSTEMS[name]
    own = {"vision": TINY_VISION, "text": TINY_TEXT, "image_token_id": 119} | own | settings
    return model(config(**own))
