"""Folders as open_clip writes them, tiny, with the tensors of `made_up` under OpenAI's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from made_up import made_up, noise
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch import Tensor

START, END = 97, 98
# start, words, end, zeros; the last row is padded with the end
IDS = torch.tensor(
    [
        [97, 5, 60, 7, 98, 0, 0, 0, 0, 0],
        [97, 98, 0, 0, 0, 0, 0, 0, 0, 0],
        [97, 11, 12, 13, 14, 15, 16, 17, 18, 98],
        [97, 30, 31, 98, 98, 98, 98, 98, 98, 98],
    ]
)
TEXT: dict[str, Any] = {"context_length": 10, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
RESNET: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [2, 1, 2, 1], "width": 16, "patch_size": None},
    "text_cfg": TEXT,
}
VIT: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 128, "patch_size": 14},
    "text_cfg": TEXT,
}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def pixels(side: int) -> Tensor:
    """Three pictures of four squares each."""
    squares = 2 * noise(3, 3, 2, 2, start=0.5)
    return squares.repeat_interleave(side // 2, dim=2).repeat_interleave(side // 2, dim=3)


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of OpenAI's program, which has the blocks of all towers alike."""
    text, vision, width = config["text_cfg"], config["vision_cfg"], config["embed_dim"]
    D = text["width"]
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text["context_length"], D),
        "text_projection": (D, width),
        "logit_scale": (),
        "token_embedding.weight": (text["vocab_size"], D),
        **_norm("ln_final", D),
        **_blocks("", D, text["layers"], D * 4),
    }
    if isinstance(vision["layers"], list):
        return found | _resnet(vision, width)
    D, patch = vision["width"], vision["patch_size"]
    return found | {
        "visual.class_embedding": (D,),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, D),
        "visual.proj": (D, width),
        "visual.conv1.weight": (D, 3, patch, patch),
        **_norm("visual.ln_pre", D),
        **_norm("visual.ln_post", D),
        **_blocks("visual.", D, vision["layers"], int(D * vision.get("mlp_ratio", 4.0))),
    }


def _norm(name: str, D: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def _blocks(prefix: str, D: int, layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        block = f"{prefix}transformer.resblocks.{layer}"
        found |= {
            f"{block}.attn.in_proj_weight": (3 * D, D),
            f"{block}.attn.in_proj_bias": (3 * D,),
            f"{block}.attn.out_proj.weight": (D, D),
            f"{block}.attn.out_proj.bias": (D,),
            **_norm(f"{block}.ln_1", D),
            **_norm(f"{block}.ln_2", D),
            f"{block}.mlp.c_fc.weight": (inner, D),
            f"{block}.mlp.c_fc.bias": (inner,),
            f"{block}.mlp.c_proj.weight": (D, inner),
            f"{block}.mlp.c_proj.bias": (D,),
        }
    return found


def _resnet(vision: dict[str, Any], out: int) -> dict[str, tuple[int, ...]]:
    width, found = vision["width"], {}

    def convolution(conv: str, norm: str, before: int, after: int, size: int) -> None:
        found[f"visual.{conv}.weight"] = (after, before, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            found[f"visual.{norm}.{name}"] = (after,)

    half = width // 2
    for number, (before, after) in enumerate([(3, half), (half, half), (half, width)], start=1):
        convolution(f"conv{number}", f"bn{number}", before, after, 3)
    before = width
    for stage, blocks in enumerate(vision["layers"]):
        narrow = width * 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", before, narrow, 1)
            convolution(f"{name}.conv2", f"{name}.bn2", narrow, narrow, 3)
            convolution(f"{name}.conv3", f"{name}.bn3", narrow, 4 * narrow, 1)
            if block == 0:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", before, 4 * narrow, 1)
            before = 4 * narrow
    places = (vision["image_size"] // 32) ** 2
    found["visual.attnpool.positional_embedding"] = (places + 1, before)
    for name, after in (("q", before), ("k", before), ("v", before), ("c", out)):
        found[f"visual.attnpool.{name}_proj.weight"] = (after, before)
        found[f"visual.attnpool.{name}_proj.bias"] = (after,)
    return found


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """The whole file."""
    named = {name: made_up(name, torch.Size(shape)) for name, shape in shapes(config).items()}
    for name in named:
        if name.endswith("running_var"):
            named[name] *= 0.4  # or what tells pictures apart would fade from block to block
    counts = {name.replace("running_mean", "num_batches_tracked") for name in named if "running_mean" in name}
    return named | {name: torch.tensor(0) for name in counts}


def write_folder(folder: Path, config: dict[str, Any], **preprocess: Any) -> Path:
    """Config, weights and a tokenizer whose words are "w0", "w1", ...: their numbers are their ids."""
    folder.mkdir(exist_ok=True)
    values = {"model_cfg": config, "preprocess_cfg": PREPROCESS | preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    save_file(tensors(config), folder / "open_clip_model.safetensors")
    vocabulary = {f"w{number}": number for number in range(START)}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder
