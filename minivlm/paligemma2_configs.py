"""The published sizes of PaliGemma 2 (https://arxiv.org/abs/2412.03555), for readers without a folder.

A folder's config.json holds the same numbers, so that nothing here is needed to load one. All three sizes
have PaliGemma's image tower, SigLIP So400m with patches of 14 pixels, and differ in the decoder: the 2B, 9B
and 27B models of Gemma 2. Each was published for pictures of 224, 448 and 896 pixels a side, which are 256,
1024 and 4096 image tokens.

Sources: table 1 of the paper, table 1 of Gemma 2 (https://arxiv.org/abs/2408.00118), and the script that
made the published folders, `convert_paligemma2_weights_to_hf.py` in transformers.
"""

from __future__ import annotations

from dataclasses import replace

from minivlm.configs import Gemma2Config, PaliGemmaConfig
from minivlm.errors import InputError

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
    first = PaliGemmaConfig()
    return replace(first, vision=replace(first.vision, image_size=image_size), text=DECODERS[size])
