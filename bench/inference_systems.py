"""How both sides of inference.py open a folder, and what they are asked, for each system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlm.checkpoints.hub import read_config
from minivlm.models.deepseek_vl import DeepseekVL
from minivlm.models.deepseek_vl2 import DeepseekVL2, DeepseekVL2Config
from minivlm.models.llama_vision import LlamaVision
from minivlm.models.paligemma import PaliGemma, PaliGemmaConfig
from minivlm.models.qwen2_5_vl import Qwen2_5_VL
from minivlm.models.qwen2_vl import Qwen2VL
from minivlm.processing import (
    DeepseekVL2Processor,
    DeepseekVLProcessor,
    LlamaVisionProcessor,
    Processor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
)
from minivlm.processing.canvases import supported_canvases

Inputs = dict[str, Tensor]


class System(NamedTuple):
    """Both sides of one folder."""

    model: type[Any]  # ours
    processor: Any
    open_peer: Callable[..., Any]  # transformers' model of a folder, with the options of `from_pretrained`
    asked: Callable[[Inputs], Inputs] = lambda inputs: inputs  # of what our processor gives, for both sides
    told: Callable[[Inputs], Inputs] = lambda inputs: inputs  # of what is asked, in the words of transformers


def system_of(folder: Path) -> System:
    """What a folder's config.json says it is."""
    values = read_config(folder)
    match values["model_type"]:
        case "qwen2_vl":
            reads = Qwen2VLProcessor.from_pretrained(folder)
            peer = _named("Qwen2VLForConditionalGeneration")
            return System(Qwen2VL, reads, peer, told=partial(_with_types, values))
        case "qwen2_5_vl":
            newer = Qwen2_5_VLProcessor.from_pretrained(folder)
            peer = _named("Qwen2_5_VLForConditionalGeneration")
            return System(Qwen2_5_VL, newer, peer, told=partial(_with_types, values))
        case "deepseek_vl":
            peer = _named("DeepseekVLForConditionalGeneration")
            return System(DeepseekVL, DeepseekVLProcessor.from_pretrained(folder), peer)
        case "deepseek_vl_v2":
            tiles = DeepseekVL2Processor.from_pretrained(folder)
            image_id = tiles.tokenizer.image_id
            return System(DeepseekVL2, tiles, _decoder_of_vl2, asked=partial(_words_for_pictures, image_id))
        case "mllama":
            canvases = LlamaVisionProcessor.from_pretrained(folder)
            asked = partial(_picture_first, canvases.tokenizer.image_id)
            return System(LlamaVision, canvases, _llama_vision, asked, _with_masks_of_tiles)
    patches = PaliGemmaConfig.from_dict(values).vision.num_patches
    processor = Processor.from_pretrained(folder, image_seq_length=patches)
    return System(PaliGemma, processor, _named("PaliGemmaForConditionalGeneration"))


def _named(name: str) -> Callable[..., Any]:
    def open_peer(folder: Path, **options: Any) -> Any:
        import transformers

        return getattr(transformers, name).from_pretrained(folder, **options)

    return open_peer


def _with_types(config: Mapping[str, Any], inputs: Inputs) -> Inputs:
    """Which tokens stand for pictures (1) and which for videos (2). Only Qwen2.5-VL takes seconds."""
    ids = inputs["input_ids"]
    types = (ids == config["image_token_id"]).long() + 2 * (ids == config["video_token_id"])
    told = {**inputs, "mm_token_type_ids": types}
    if config["model_type"] == "qwen2_vl":
        told.pop("second_per_grid_ts", None)
    return told


# ---- DeepSeek-VL2 ------------------------------------------------------------------------------------------


def _words_for_pictures(image_token_id: int, inputs: Inputs) -> Inputs:
    """Any words in place of the image tokens: transformers has the decoder, and no DeepSeek-VL2 around it."""
    ids = inputs["input_ids"]
    words = torch.randint(3, image_token_id, ids.shape, device=ids.device)
    ids = torch.where(ids == image_token_id, words, ids)
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"]}


def _decoder_of_vl2(folder: Path, **options: Any) -> Any:
    """The decoder of deepseek-vl2-tiny, as transformers has it in DeepSeek-OCR 2, whose tower stays unused.

    Its DeepseekV2ForCausalLM has latent attention only, and this one has heads as Llama's.
    """
    import transformers

    text = DeepseekVL2Config.from_dict(read_config(folder)).text
    assert text.mla is None
    assert text.moe is not None
    assert not text.moe.norm_topk_prob
    dense = text.first_k_dense_replace
    kinds = ["dense"] * dense + ["sparse"] * (text.num_hidden_layers - dense)
    shared = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
        "max_position_embeddings rms_norm_eps"
    )
    experts = (
        "n_routed_experts num_experts_per_tok moe_intermediate_size n_shared_experts topk_method "
        "routed_scaling_factor n_group topk_group"
    )
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam = {**small, "image_size": 32, "output_channels": 8, "downsample_channels": [8, 16]}
    encoder = {**small, "num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 8}
    config = transformers.DeepseekOcr2Config(
        text_config={
            **{name: getattr(text, name) for name in shared.split()},
            **{name: getattr(text.moe, name) for name in experts.split()},
            "mlp_layer_types": kinds,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        },
        vision_config={"sam_config": sam, "encoder_config": encoder},
    )
    names = {r"^language\.model\.": "model.", r"^language\.lm_head\.": "lm_head."}
    peer = transformers.DeepseekOcr2ForConditionalGeneration
    return peer.from_pretrained(folder, config=config, key_mapping=names, **options)


# ---- Llama 3.2 Vision --------------------------------------------------------------------------------------


def _picture_first(image_token_id: int, inputs: Inputs) -> Inputs:
    """<|image|> before all words: of words in front of it, transformers thinks otherwise than Meta."""
    order = (inputs["input_ids"] != image_token_id).long().argsort(dim=1, stable=True)
    return {**inputs, "input_ids": inputs["input_ids"].gather(1, order)}


def _llama_vision(folder: Path, **options: Any) -> Any:
    """transformers keeps what a block gives, Meta what it is given (minivlm/vision/llama_vision.py)."""
    import transformers

    config: Any = transformers.MllamaConfig.from_pretrained(folder)
    indices = config.vision_config.intermediate_layers_indices
    config.vision_config.intermediate_layers_indices = [index - 1 for index in indices]
    return transformers.MllamaForConditionalGeneration.from_pretrained(folder, config=config, **options)


def _with_masks_of_tiles(inputs: Inputs) -> Inputs:
    """Of rows with one picture each: which tiles there are, and that all words see them."""
    tiles, ids = inputs["pixel_values"], inputs["aspect_ratio_ids"]
    most, length = tiles.shape[1], inputs["input_ids"].shape[1]
    canvases = torch.tensor(supported_canvases(most), device=ids.device)
    real = (torch.arange(most, device=ids.device) < canvases[ids - 1].prod(dim=1)[:, None]).long()
    return {
        **inputs,
        "pixel_values": tiles[:, None],
        "aspect_ratio_ids": ids[:, None],
        "aspect_ratio_mask": real[:, None],
        "cross_attention_mask": real[:, None, None].expand(-1, length, -1, -1),
    }
