"""What a model needs, computed from its config alone: parameters, bytes, operations.

No model is built here, so a laptop can size up a checkpoint that does not fit on it. The functions cover
PaliGemma and PaliGemma 2.

Two quantities bound the time of a step: the bytes of weights and cache that it must read from memory, and the
operations that it must compute. The larger of the two times is a lower bound on the real one (the roofline
model, https://doi.org/10.1145/1498765.1498785).

An operation is one multiplication or one addition, so a multiply-add counts as two. Only matrix products are
counted, which are nearly all of the work: norms, activations and the softmax are left out. Every pair of
positions counts, including those that a mask hides, since they are computed too. `torch.utils.flop_counter`
counts in the same way.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from minivlm.errors import InputError
from minivlm.models.paligemma import PaliGemmaConfig
from minivlm.text.gemma import GemmaConfig
from minivlm.text.gemma2 import Gemma2Config
from minivlm.vision.siglip import SiglipVisionConfig


def parameter_counts(config: PaliGemmaConfig) -> dict[str, int]:
    """Parameters of each part: vision, projector, embedding, decoder (its blocks and last norm), head.

    The head is 0 if it is the embedding table, as in all published checkpoints.
    """
    vision, text = config.vision, config.text
    norms_per_block = 4 if isinstance(text, Gemma2Config) else 2
    table = text.vocab_size * text.hidden_size
    return {
        "vision": _vision_parameters(vision),
        "projector": vision.hidden_size * text.hidden_size + text.hidden_size,
        "embedding": table,
        "decoder": _decoder_matrices(text)
        + (text.num_hidden_layers * norms_per_block + 1) * text.hidden_size,
        "head": 0 if text.tie_word_embeddings else table,
    }


def weight_bytes(config: PaliGemmaConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of all weights in the given dtype."""
    return sum(parameter_counts(config).values()) * dtype.itemsize


def cache_bytes(
    config: PaliGemmaConfig, tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of the keys and values of `tokens` tokens in each of `batch_size` rows.

    `minivlm.cache.KVCache` allocates ahead: in steps of 256 tokens, and at most twice what is needed.
    """
    text = config.text
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return per_token * tokens * batch_size * dtype.itemsize


def decode_bytes(
    config: PaliGemmaConfig,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
    cache_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that one decoding step must read: all weights of decoder and head, and the cache.

    The image tower is not read, and only one row of an embedding table that is not the head. Activations
    are left out: they are small and stay in the processor's cache.

    Args:
        context: tokens in each row's cache. Layers with a sliding window read all of them, too.
        dtype: of the weights.
        batch_size: rows decoded together; they share the weights, and each has its own cache.
        cache_dtype: None means the dtype of the weights. For int8 weights, give the dtype of everything else.
    """
    cache = cache_bytes(config, context, batch_size, cache_dtype or dtype)
    head = config.text.vocab_size * config.text.hidden_size
    return (parameter_counts(config)["decoder"] + head) * dtype.itemsize + cache


def image_operations(config: PaliGemmaConfig) -> int:
    """Operations from the pixels of one picture to its image tokens: the tower and the projector."""
    vision = config.vision
    N, D = vision.num_patches, vision.hidden_size
    patches = vision.num_channels * vision.patch_size**2 * D
    blocks = vision.num_hidden_layers * (4 * D * D + 2 * D * vision.intermediate_size)
    attention = vision.num_hidden_layers * 2 * N * D  # multiply-adds of one query: scores, weighted sum
    return 2 * N * (patches + blocks + attention + D * config.text.hidden_size)


def prefill_operations(config: PaliGemmaConfig, tokens: int, last_mlp_tokens: int = 1) -> int:
    """Operations to read one row of `tokens` tokens, including image tokens, and score the next one.

    Encoding the picture comes on top, see `image_operations`.

    Args:
        last_mlp_tokens: tokens that go through the last block's MLP. In this package, only the last one; a
            program that does not skip the others has `tokens`.
    """
    every_token = tokens * (_decoder_matrices(config.text) + _attention(config.text, tokens))
    return 2 * (every_token - (tokens - last_mlp_tokens) * _mlp(config.text)) + _head(config)


def decode_operations(config: PaliGemmaConfig, context: int) -> int:
    """Operations to read one more token, which sees `context` tokens including itself, and score the next."""
    return 2 * (_decoder_matrices(config.text) + _attention(config.text, context)) + _head(config)


def _vision_parameters(config: SiglipVisionConfig) -> int:
    D, inner = config.hidden_size, config.intermediate_size
    patch_embedding = config.num_channels * config.patch_size**2 * D + D
    attention = 4 * (D * D + D)
    mlp = (D * inner + inner) + (inner * D + D)
    norms = 2 * 2 * D  # two norms, each with a weight and a bias
    blocks = config.num_hidden_layers * (attention + mlp + norms)
    return patch_embedding + config.num_patches * D + blocks + 2 * D


def _decoder_matrices(config: GemmaConfig | Gemma2Config) -> int:
    # Each weight is used in one multiply-add per token, so this is also the number of multiply-adds per
    # token.
    D, Dh = config.hidden_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    return config.num_hidden_layers * (D * heads * Dh + _mlp(config))


def _mlp(config: GemmaConfig | Gemma2Config) -> int:
    """Multiply-adds of one token in one layer's MLP."""
    return 3 * config.hidden_size * config.intermediate_size


def _attention(config: GemmaConfig | Gemma2Config, context: int) -> int:
    """Multiply-adds of one query in all layers: its scores, and the weighted sum of the values."""
    return config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * context


def _head(config: PaliGemmaConfig) -> int:
    return 2 * config.text.vocab_size * config.text.hidden_size


# ---- the published sizes of PaliGemma 2

DECODERS = {
    "3b": Gemma2Config(),
    "10b": Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
    "28b": Gemma2Config(
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,  # hidden_size / num_attention_heads, not head_dim
    ),
}


IMAGE_SIZES = (224, 448, 896)  # pixels, height = width


def paligemma2_config(size: str = "3b", image_size: int = 224) -> PaliGemmaConfig:
    """The config of google/paligemma2-<size>-pt-<image_size>.

    >>> paligemma2_config("10b", 448).vision.num_patches
    1024

    Raises InputError: a size or an image size that was not published.
    """
    if size not in DECODERS or image_size not in IMAGE_SIZES:
        raise InputError(
            f"there is no PaliGemma 2 of size {size!r} for pictures of {image_size} pixels: choose from "
            f"{', '.join(DECODERS)} and {', '.join(map(str, IMAGE_SIZES))}"
        )
    base = PaliGemmaConfig()
    return replace(base, vision=replace(base.vision, image_size=image_size), text=DECODERS[size])
