"""DeepSeek-VL2 (https://huggingface.co/deepseek-ai/deepseek-vl2-tiny), as its own program wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minivlm.checkpoints.layouts import DEEPSEEK_VL2_LAYOUTS
from minivlm.models.deepseek_vl2 import DeepseekVL2, DeepseekVL2Config
from minivlm.processing import DeepseekVL2Processor, DeepseekVL2Tokenizer, TiledImageProcessor
from minivlm.processing.deepseek_tokens import BEGIN, END
from minivlm.processing.deepseek_vl2_tokens import PAD
from published.family import Family, without
from published.words import byte_form, with_byte_words

NORMS = ("norm.weight", "norm1.weight", "norm2.weight")
# Words with the sign before them, up to three digits, signs, newlines, spaces.
PIECES = r"\p{N}{1,3}|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UNREAD_TOKENS = 815  # between the words and <image>

PUBLISHED = {"deepseek-vl2-tiny": DeepseekVL2Config()}


def config_json(config: DeepseekVL2Config) -> dict[str, Any]:
    """What is as in the original program is left out."""
    values = config.to_dict()
    known = {"image_size": 384, "heads": 16}
    values["vision_config"] = without(values["vision_config"], known, known)
    projector = {"projector_type": "downsample_mlp_gelu", "input_dim": 1152, "downsample_ratio": 2}
    values["projector_config"] = without(values["projector_config"], projector, projector)
    language = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
    }
    values["language_config"] = without(values["language_config"], language, language)
    return values


def write_processor(config: DeepseekVL2Config, folder: Path) -> None:
    """Tokenizer and processor_config.json."""
    tokenizer = DeepseekVL2Tokenizer(make_tokenizer(config.image_token_id - UNREAD_TOKENS))
    size, sizes = config.vision.image_size, config.candidate_resolutions
    pictures = TiledImageProcessor(image_size=size, candidate_resolutions=sizes)  # type: ignore[arg-type]
    patch, ratio = config.vision.patch_size, config.downsample_ratio
    DeepseekVL2Processor(tokenizer, pictures, patch, ratio).save_pretrained(folder)


def make_tokenizer(count: int) -> tokenizers.Tokenizer:
    """A tokenizer in DeepSeek-V2's form: start, end and padding, words up to so many, and places for others.

    `DeepseekVL2Tokenizer` adds <image>, the words for places, and turns.
    """
    first = (BEGIN, END, PAD)
    backend = with_byte_words(byte_form(PIECES), count, first)
    names = [*first, *(f"<｜place▁holder▁no▁{number}｜>" for number in range(UNREAD_TOKENS))]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return backend


def unread(config: DeepseekVL2Config) -> dict[str, tuple[int, ...]]:
    """timm's pooling head, which came with the tower and is never read."""
    width, inner = config.vision.hidden_size, config.vision.intermediate_size
    linear = {
        "q": (width, width),
        "kv": (2 * width, width),
        "proj": (width, width),
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, width)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {f"vision.attn_pool.{name}": shape for name, shape in shapes.items()}


DEEPSEEK_VL2 = Family(
    DeepseekVL2, DEEPSEEK_VL2_LAYOUTS["hub"], NORMS, write_processor, config_json, unread, generation=False
)
