"""A tiny DeepSeek-VL2 with the tensors that its own program was given, a tokenizer, and whole folders.

The numbers that the tests store were printed by https://github.com/deepseek-ai/DeepSeek-VL2 (ef9f91e), with
what of transformers 4.38, timm, einops, xformers and torchvision it needs in its place: its
DeepseekVLV2ForCausalLM of `config_json` with the tensors of `made_up` under its own names, and its
DeepseekVLV2Processor with `backend` and the settings of `PICTURES`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from deepseek_vl import PIECES
from helpers import randomize
from made_up import made_up, noise
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minivlm.checkpoints.layouts import DEEPSEEK_VL2_LAYOUTS, as_in_file, names_in, split, to_ours
from minivlm.models.deepseek_vl2 import DeepseekVL2, DeepseekVL2Config
from minivlm.processing import DeepseekVL2Processor, DeepseekVL2Tokenizer, TiledImageProcessor
from minivlm.processing.deepseek_tokens import BEGIN, END
from minivlm.processing.deepseek_vl2_tiles import candidates
from minivlm.processing.deepseek_vl2_tokens import PAD

LAYOUT = DEEPSEEK_VL2_LAYOUTS["hub"]
SIDE, PATCH = 28, 4  # 7 x 7 patches, which become 4 x 4 tokens: at two edges, half of a token is missing
VOCABULARY, IMAGE_ID = 120, 100
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
FORMS: dict[str, dict[str, Any]] = {
    "latent": {
        **LATENT,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
    "heads": {"use_mla": False, "topk_method": "greedy"},  # as deepseek-vl2-tiny
}


def config_json(form: str, **language: Any) -> dict[str, Any]:
    """A config.json in the form of the published ones; keyword arguments change its language_config."""
    return {
        "model_type": "deepseek_vl_v2",
        "tile_tag": "2D",
        "global_view_pos": "head",
        "candidate_resolutions": [list(size) for size in candidates(SIDE, 4)],
        "vision_config": {
            "model_type": "vision",
            "image_size": SIDE,
            "patch_size": PATCH,
            "width": 24,
            "layers": 2,
            "heads": 4,
            "mlp_ratio": 1.7,
        },
        "projector_config": {"model_type": "mlp_projector", "input_dim": 24, "n_embed": 32},
        "language_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "first_k_dense_replace": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **EXPERTS,
            **FORMS[form],
            **language,
        },
    }


def model_of(form: str, **language: Any) -> DeepseekVL2:
    """With the tensors that the original had."""
    config = DeepseekVL2Config.from_dict(config_json(form, **language))
    model = DeepseekVL2(DeepseekVL2Config(**{**config.__dict__, "image_token_id": IMAGE_ID}))
    state: dict[str, Tensor] = {}
    for name, tensor in as_in_file(model.state_dict(), LAYOUT).items():
        ours = to_ours(name, LAYOUT)
        assert ours is not None
        state |= zip(names_in(ours), split(made_up(name, tensor.shape), ours), strict=True)
    model.load_state_dict(state)
    return model.eval()


# Three rows: two pictures, of two tiles beside each other and of one; one picture of two tiles, one above the
# other; words alone.
GRIDS = torch.tensor([[2, 1], [1, 1], [1, 2]])
VIEWS = noise(3 + 2 + 3, 3, SIDE, SIDE, start=0.5)
LENGTH = 110


def _rows() -> Tensor:
    words = (torch.arange(3 * LENGTH) * 37 + 11).view(3, LENGTH) % 98 + 2
    words[0, 3 : 3 + 57] = words[0, 64 : 64 + 41] = words[1, 5 : 5 + 61] = IMAGE_ID
    return words


IDS = _rows()
INPUTS = {"pixel_values": VIEWS, "images_spatial_crop": GRIDS}

# Folders

TEXTS = ["what is it? a red star", "what color is the circle? it is green.", "[[120, 340, 560, 780]]"]


def backend() -> tokenizers.Tokenizer:
    """256 bytes, what is learned from `TEXTS`, and three special tokens; the others are yet to be added."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(TEXTS, trainer)
    learned.add_special_tokens([AddedToken(name, normalized=False) for name in (BEGIN, END, PAD)])
    return learned


def processor() -> DeepseekVL2Processor:
    sizes = candidates(SIDE, 4)
    return DeepseekVL2Processor(
        DeepseekVL2Tokenizer(backend()),
        TiledImageProcessor(image_size=SIDE, candidate_resolutions=sizes),
        patch_size=PATCH,
    )


def write_folder(folder: Path, form: str = "latent", seed: int = 0, **language: Any) -> Path:
    """A whole folder with random weights."""
    reads = processor()
    ids = {"bos_token_id": reads.tokenizer.bos_id, "eos_token_id": reads.tokenizer.eos_id}
    values = config_json(form, vocab_size=reads.tokenizer.vocab_size, **ids, **language)
    randomize_all(DeepseekVL2(DeepseekVL2Config.from_dict(values)), seed).save_pretrained(folder)
    reads.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def randomize_all(model: DeepseekVL2, seed: int = 0) -> DeepseekVL2:
    """Also the biases of gates, which are no parameters."""
    randomize(model, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(noise(len(buffer), start=float(seed)))
    return model
