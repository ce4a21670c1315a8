"""Small configs for bench/make_checkpoint.py: as few numbers as leave room for a tokenizer."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_vl import reference_plain
from deepseek_vl2 import config_json
from llama_vision import our_config, reference_llama_vision

from minivlm.models.deepseek_vl import DeepseekVLConfig
from minivlm.models.deepseek_vl2 import DeepseekVL2Config
from minivlm.text.llama3_rope import Llama3Scaling

BENCH = Path(__file__).parents[1] / "bench"
WORDS = 456  # 256 bytes, 200 longer words


def imported(name: str) -> ModuleType:
    """A module of bench/, imported as it is run."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


def small_deepseek_vl() -> DeepseekVLConfig:
    """Start and end, 13 letters, and what stands for pictures come after the words."""
    config = DeepseekVLConfig.from_dict(reference_plain(vocab_size=480).config.to_dict())
    ids = {"bos_token_id": WORDS, "eos_token_id": WORDS + 1, "pad_token_id": WORDS + 1}
    return replace(config, image_token_id=WORDS + 15, **ids)


def small_deepseek_vl2() -> DeepseekVL2Config:
    """815 tokens that nobody reads, <image>, and seven more come after the words."""
    image = WORDS + 815
    config = DeepseekVL2Config.from_dict(config_json("heads", vocab_size=image + 10))
    return replace(config, image_token_id=image)


def small_llama_vision() -> Any:
    """256 tokens that control the model, and <|image|>, come after the words."""
    config = our_config(reference_llama_vision())
    text = replace(config.text, vocab_size=WORDS + 256, rope_scaling=Llama3Scaling())
    ids = {"bos_token_id": WORDS, "pad_token_id": WORDS + 4, "eos_token_id": (WORDS + 1, WORDS + 9)}
    return replace(config, text=text, image_token_id=WORDS + 256, **ids)


SMALL = {
    "deepseek_vl": small_deepseek_vl,
    "deepseek_vl2": small_deepseek_vl2,
    "llama_vision": small_llama_vision,
}
