"""DeepSeek-VL's own folders, as https://github.com/deepseek-ai/DeepSeek-VL reads them.

Their config.json says `multi_modality` for either system. Towers are named there instead of described, and
the sizes of Vicuna's Llama stand for those that the decoder's part leaves out. Pixels are normalized by the
processor where it says so, otherwise by the towers. What is loaded can be saved as transformers has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minivlm.checkpoints.hub import PICTURES, read_json
from minivlm.configs import expect, part_of, require_system
from minivlm.errors import InputError
from minivlm.models.deepseek_vl import (
    SIGLIP_LARGE,
    DeepseekVL,
    DeepseekVLConfig,
    check_processor,
)
from minivlm.models.deepseek_vl_hybrid import DeepseekVLHybrid, DeepseekVLHybridConfig, check_both_sizes
from minivlm.processing.deepseek_tokens import DeepseekTokenizer
from minivlm.processing.deepseek_vl import DeepseekVLProcessor
from minivlm.processing.deepseek_vl_hybrid import DeepseekVLHybridProcessor
from minivlm.processing.images import BICUBIC, BILINEAR
from minivlm.processing.squares import DeepseekVLHybridImageProcessor, DeepseekVLImageProcessor
from minivlm.text.llama import LlamaConfig
from minivlm.vision.sam import SamVisionConfig
from minivlm.vision.siglip import SiglipVisionConfig

SIGLIP = {"siglip_large_patch16_384": SIGLIP_LARGE}
SAM = {"sam_b_downsample": SamVisionConfig()}
HYBRID, PLAIN = "HybridVisionTower", "CLIPVisionTower"
ALIGNERS = {HYBRID: "low_high_hybrid_split_mlp_gelu", PLAIN: "mlp_gelu"}


def config_from_original(values: Mapping[str, Any]) -> DeepseekVLConfig | DeepseekVLHybridConfig:
    """From a whole config.json of the original program.

    Raises InputError: it describes another system, such as Janus, or a tower that is not known here.
    """
    require_system(values, "multi_modality")
    vision = part_of(values, "vision_config")
    kind, params = str(vision.get("cls")), part_of(vision, "params")
    if kind not in ALIGNERS or "gen_vision_config" in values:
        raise InputError(
            f"config.json says vision_config.cls {kind!r}; of the systems called multi_modality, only "
            f"DeepSeek-VL is supported here, with {HYBRID} or {PLAIN}"
        )
    aligner = part_of(part_of(values, "aligner_config"), "params")
    expect(aligner, "aligner_config", "projector_type", ALIGNERS[kind])
    expect(aligner, "aligner_config", "depth", 2)
    text = LlamaConfig.from_dict(part_of(values, "language_config"))
    if kind == PLAIN:
        return DeepseekVLConfig(vision=_siglip(params), text=text)
    expect(params, "vision_config", "concat_type", "tuple")
    high = part_of(params, "high_res_cfg")
    sam = _named(SAM, high, "high_res_cfg")
    sam = replace(sam, image_size=high.get("image_size", sam.image_size))
    low = _siglip(part_of(params, "low_res_cfg"))
    return DeepseekVLHybridConfig(vision=low, high_res_vision=sam, text=text)


def _siglip(params: Mapping[str, Any]) -> SiglipVisionConfig:
    # What is not said is -2 in the original program, the second-last block.
    expect({"select_layer": -2, **params}, "vision_config", "select_layer", -1)
    config = _named(SIGLIP, params, "vision_config")
    return replace(config, image_size=params.get("image_size", config.image_size))


def _named(table: Mapping[str, Any], params: Mapping[str, Any], part: str) -> Any:
    name = str(params.get("model_name"))
    if name not in table:
        raise InputError(f"{part} has model_name = {name!r}; only {', '.join(table)} is supported here")
    return table[name]


def pictures_from_original(
    values: Mapping[str, Any], params: Mapping[str, Any], hybrid: bool
) -> DeepseekVLImageProcessor:
    """From a preprocessor_config.json, and the `params` of the towers, which may normalize, too.

    Raises InputError: both normalize, or neither does, or bars have another color than the mean.
    """
    expect(values, PICTURES, "image_processor_type", "VLMImageProcessor")
    names = ("image_size", "min_size", "rescale_factor")
    sizes = {name: values[name] for name in names if values.get(name) is not None}
    color = tuple(values.get("image_mean") or DeepseekVLImageProcessor.image_mean)
    mean, std = _moments(values, part_of(params, "high_res_cfg") if hybrid else params)
    if tuple(int(value * 255) for value in mean) != tuple(int(value * 255) for value in color):
        raise InputError(
            f"{PICTURES} has image_mean {color}, which colors the bars, and the tower has {mean}: only one "
            "and the same is supported here"
        )
    square = DeepseekVLImageProcessor(image_mean=mean, image_std=std, resample=int(BICUBIC), **sizes)
    if not hybrid:
        return square
    low = part_of(params, "low_res_cfg")
    mean, std = _moments(values, low)
    return DeepseekVLHybridImageProcessor(
        image_size=low.get("image_size", SIGLIP_LARGE.image_size),
        image_mean=mean,
        image_std=std,
        min_size=square.min_size,
        rescale_factor=square.rescale_factor,
        resample=int(BILINEAR),
        high_res=square,
    )


def _moments(values: Mapping[str, Any], tower: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    """Mean and deviation of the pixels of one tower."""
    by_processor = values.get("do_normalize", True)
    by_tower = tower.get("pixel_mean") is not None and tower.get("pixel_std") is not None
    if by_processor == by_tower:
        raise InputError(
            f"pixels are normalized {'twice' if by_tower else 'nowhere'}, by {PICTURES} (do_normalize) and "
            "by the towers of config.json (pixel_mean): only once is supported here"
        )
    names = ("pixel_mean", "pixel_std") if by_tower else ("image_mean", "image_std")
    source, default = tower if by_tower else values, DeepseekVLImageProcessor()
    mean, std = (source.get(name) for name in names)
    return tuple(mean or default.image_mean), tuple(std or default.image_std)


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[DeepseekVL, DeepseekVLProcessor]:
    """Load the model and processor of a folder whose config.json holds `values`.

    Raises InputError: the files do not match each other, or are not supported.
    """
    config = config_from_original(values)
    params = part_of(part_of(values, "vision_config"), "params")
    hybrid = isinstance(config, DeepseekVLHybridConfig)
    pictures = pictures_from_original(read_json(folder, PICTURES), params, hybrid)
    tokenizer = DeepseekTokenizer.from_pretrained(folder)
    config = replace(
        config,
        image_token_id=tokenizer.image_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    processor_class, model_class = (
        (DeepseekVLHybridProcessor, DeepseekVLHybrid) if hybrid else (DeepseekVLProcessor, DeepseekVL)
    )
    processor = processor_class(tokenizer, pictures, config.num_image_tokens)
    if isinstance(config, DeepseekVLHybridConfig) and isinstance(processor, DeepseekVLHybridProcessor):
        check_both_sizes(folder, config, processor)
    else:
        check_processor(folder, config, processor)
    return model_class.from_folder(folder, config, dtype, device), processor
