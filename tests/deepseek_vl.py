"""Tiny models of DeepSeek-VL in transformers, ours with the same weights, a tokenizer, and whole folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from helpers import randomize
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridProcessor,
    DeepseekVLProcessor,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from minivlm.checkpoints.layouts import Layout, names_in, split, to_ours
from minivlm.models.deepseek_vl import DeepseekVL
from minivlm.models.deepseek_vl_hybrid import DeepseekVLHybrid
from minivlm.processing.deepseek_chat import SYSTEM, chat_template
from minivlm.processing.deepseek_tokens import BEGIN, END, IMAGE

IMAGE_ID, VOCABULARY = 100, 120
LOW, HIGH, PATCH = 24, 56, 8  # 3 x 3 image tokens; 7 x 7 places of SAM, which windows of 3 do not divide
IMAGE_TOKENS = (LOW // PATCH) ** 2
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": LOW,
    "patch_size": PATCH,
    "vision_use_head": False,
    "hidden_act": "gelu",
}
SAM: dict[str, Any] = {
    "model_type": "sam_vision_model",
    "hidden_size": 24,
    "mlp_dim": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": HIGH,
    "patch_size": PATCH,
    "output_channels": 6,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}
# Two rows with a picture at different places, and one without.
IDS = torch.tensor(
    [
        [1, 5, *[IMAGE_ID] * IMAGE_TOKENS, 7, 8, 9, 10],
        [1, *[IMAGE_ID] * IMAGE_TOKENS, 6, 7, 8, 9, 11],
        [1, *range(20, 34)],
    ]
)
PICTURES = {
    "pixel_values": torch.randn(2, 3, LOW, LOW, generator=torch.Generator().manual_seed(3)),
    "high_res_pixel_values": torch.randn(2, 3, HIGH, HIGH, generator=torch.Generator().manual_seed(4)),
}
LOW_ALONE = {"pixel_values": PICTURES["pixel_values"]}


def reference_hybrid(seed: int = 0, tied: bool = False, **changes: Any) -> Any:
    """A model of transformers with random weights; keyword arguments change its text_config."""
    config = DeepseekVLHybridConfig(
        text_config=TEXT | changes,
        vision_config=dict(VISION),
        high_res_vision_config=dict(SAM),
        image_token_id=changes.pop("image_token_id", IMAGE_ID),
        tie_word_embeddings=tied,
    )
    reference = randomize(DeepseekVLHybridForConditionalGeneration(config), seed)
    with torch.no_grad():
        reference.model.high_res_vision_alpha.fill_(0.8)
    return reference


def reference_plain(seed: int = 0, tied: bool = False, **changes: Any) -> Any:
    """The same with one tower."""
    config = DeepseekVLConfig(
        text_config=TEXT | changes,
        vision_config=dict(VISION),
        image_token_id=changes.pop("image_token_id", IMAGE_ID),
        tie_word_embeddings=tied,
    )
    return randomize(DeepseekVLForConditionalGeneration(config), seed)


def in_our_words(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors of another program's state_dict."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = to_ours(name, layout)
        assert place is not None, name
        ours |= zip(names_in(place), split(tensor, place), strict=True)
    return ours


def with_weights_of(reference: Any, kind: type[DeepseekVL]) -> Any:
    """Ours with the weights of a model of transformers."""
    ours = kind(kind.config_class.from_dict(reference.config.to_dict()))
    state = in_our_words(reference.state_dict(), kind.layouts["hub"])
    if ours.language_model.lm_head is None:
        del state["language_model.lm_head.weight"]
    ours.load_state_dict(state)
    return ours.eval()


def hybrid_pair(**changes: Any) -> tuple[DeepseekVLHybrid, Any]:
    """Ours and the reference."""
    reference = reference_hybrid(**changes)
    return with_weights_of(reference, DeepseekVLHybrid), reference


def plain_pair(**changes: Any) -> tuple[DeepseekVL, Any]:
    """Ours and the reference."""
    reference = reference_plain(**changes)
    return with_weights_of(reference, DeepseekVL), reference


# Folders

TEXTS = [SYSTEM, "User: what is it?\n\nAssistant: a red star", "what color is the circle? it is green."]
PIECES = r"[\r\n]|\s?\p{L}+|\s?[!-/:-~]+|\s+$|\p{N}"


def deepseek_backend() -> tokenizers.Tokenizer:
    """256 bytes, what is learned from `TEXTS`, then the special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in (BEGIN, END, IMAGE)])
    begin = (BEGIN, backend.token_to_id(BEGIN))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[begin]
    )
    return backend


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    deepseek_backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "extra_special_tokens": {"image_token": IMAGE},
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


HALF, CLIP = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073]


def their_pictures(hybrid: bool, **changes: Any) -> Any:
    """The image processor of transformers with the settings of published folders, but for sizes."""
    size, large = ({"height": side, "width": side} for side in (LOW, HIGH))
    moments = {"image_mean": HALF, "image_std": HALF}
    if not hybrid:
        return DeepseekVLImageProcessorPil(size=size, min_size=2, **moments | changes)
    return DeepseekVLHybridImageProcessorPil(
        size=size, high_res_size=large, min_size=2, resample=2, **moments | changes
    )


def write_folder(folder: Path, hybrid: bool, seed: int = 0, **changes: Any) -> Path:
    """A whole folder, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = deepseek_backend().get_vocab()
    names = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
    ids = {name: vocabulary[token] for name, token in names.items()}
    model = (reference_hybrid if hybrid else reference_plain)(
        seed, vocab_size=len(vocabulary), image_token_id=vocabulary[IMAGE], **ids | changes
    )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (DeepseekVLHybridProcessor if hybrid else DeepseekVLProcessor)(
        their_pictures(hybrid),
        AutoTokenizer.from_pretrained(folder),
        chat_template=chat_template(),
        num_image_tokens=IMAGE_TOKENS,
    ).save_pretrained(folder)
    return folder
