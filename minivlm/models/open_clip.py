"""Folders of open_clip (https://github.com/mlfoundations/open_clip): CLIP in the words of OpenAI's program.

    open_clip_config.json         sizes of the towers (model_cfg), preparation of pictures (preprocess_cfg)
    open_clip_model.safetensors   tensors as OpenAI named them: q, k and v in one, the projections transposed
    tokenizer.json, ...           as in folders of transformers

The repos `timm/resnet50_clip.openai`, ... hold OpenAI's models with a convolutional tower this way, and
`timm/vit_base_patch32_clip_224.openai`, ... those with a ViT. A ViT gives a `CLIP`, the same as from a folder
of transformers, and is saved as one; a ResNet gives a `ResNetCLIP`.

Two CLIPs of the same sizes may differ in `quick_gelu`, which OpenAI used and most of those who trained CLIP
again did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minivlm.checkpoints.hub import OPEN_CLIP, check_vocabulary
from minivlm.checkpoints.layouts import CLIP_LAYOUTS, CLIP_RESNET_LAYOUTS
from minivlm.checkpoints.weights import load_model
from minivlm.configs import part_of
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.models.clip_resnet import ResNetCLIP, ResNetCLIPConfig
from minivlm.processing import CLIP_CAPTIONS, CaptionTokenizer, CLIPImageProcessor, PairProcessor


def open_folder(
    folder: Path, values: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str
) -> tuple[CLIP | ResNetCLIP, PairProcessor]:
    """Load the model and processor of a folder whose open_clip_config.json holds `values`.

    Raises InputError: the config asks for something that is not CLIP's; the files do not match each other.
    """
    model_cfg = part_of(values, "model_cfg")
    # open_clip tells them apart in the same way: a ResNet has a number of blocks for each of its stages.
    is_resnet = isinstance(part_of(model_cfg, "vision_cfg").get("layers"), list)
    config = (ResNetCLIPConfig if is_resnet else CLIPConfig).from_open_clip(model_cfg)
    pictures = CLIPImageProcessor.from_open_clip(part_of(values, "preprocess_cfg"), config.vision.image_size)
    tokenizer = CaptionTokenizer.from_pretrained(folder, CLIP_CAPTIONS, config.text.max_position_embeddings)
    check_vocabulary(folder, config.text.vocab_size, tokenizer.backend.get_vocab().values())
    (start,), end, pad = tokenizer.before, tokenizer.eos_id, tokenizer.pad_id
    text = replace(config.text, bos_token_id=start, eos_token_id=end, pad_token_id=pad)
    config = replace(config, text=text)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "file": OPEN_CLIP[1]}
    model: CLIP | ResNetCLIP
    if isinstance(config, CLIPConfig):
        model = load_model(CLIP, config, folder, {"open_clip": CLIP_LAYOUTS["open_clip"]}, **options)
    else:
        model = load_model(ResNetCLIP, config, folder, CLIP_RESNET_LAYOUTS, **options)
    return model, PairProcessor(tokenizer, pictures)
