"""Vision-language models that you can read: load one, ask it, look inside it, train it.

    load        open a checkpoint: a folder, or a repo of the Hub; by default the small model that ships
    answer      from a picture and a prompt to words, in one line
    InputError  what every refusal raises: what was wrong, and what to do

    PaliGemma, Llava, QwenVL, Qwen2VL, Qwen2_5_VL, DeepseekVL, DeepseekVLHybrid,
    DeepseekVL2, LlamaVision, CLIP, SigLIP, ViT                 what `load` returns, and beside them
    Processor, LlavaProcessor, QwenVLProcessor, ...             pictures and words in, tensors out, and back

>>> import minivlm
>>> minivlm.answer("photo.jpg", "caption en")
>>> model, processor = minivlm.load("google/paligemma-3b-mix-224")
>>> minivlm.answer("photo.jpg", "caption en", (model, processor))

Pictures, boxes and masks are in `minivlm.processing`, training is in `minivlm.training`, and drawings of what
goes on inside a model are in `minivlm.looking`. The command line is described by `minivlm --help`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivlm.errors import InputError
    from minivlm.models.answering import answer
    from minivlm.models.clip import CLIP, CLIPConfig
    from minivlm.models.deepseek_vl import DeepseekVL, DeepseekVLConfig
    from minivlm.models.deepseek_vl2 import DeepseekVL2, DeepseekVL2Config
    from minivlm.models.deepseek_vl_hybrid import DeepseekVLHybrid, DeepseekVLHybridConfig
    from minivlm.models.llama_vision import LlamaVision, LlamaVisionConfig
    from minivlm.models.llava import Llava, LlavaConfig
    from minivlm.models.load import load
    from minivlm.models.paligemma import PaliGemma, PaliGemmaConfig
    from minivlm.models.qwen2_5_vl import Qwen2_5_VL, Qwen2_5_VLConfig
    from minivlm.models.qwen2_vl import Qwen2VL, Qwen2VLConfig
    from minivlm.models.qwen_vl import QwenVL, QwenVLConfig
    from minivlm.models.siglip import SigLIP, SiglipConfig
    from minivlm.models.vit import ViT
    from minivlm.processing import (
        DeepseekVL2Processor,
        DeepseekVLHybridProcessor,
        DeepseekVLProcessor,
        LlamaVisionProcessor,
        LlavaProcessor,
        PairProcessor,
        Processor,
        Qwen2_5_VLProcessor,
        Qwen2VLProcessor,
        QwenVLProcessor,
    )
    from minivlm.text.gemma import GemmaConfig
    from minivlm.text.gemma2 import Gemma2Config
    from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel
    from minivlm.vision.vit import ViTConfig

__version__ = "0.1.0"

__all__ = [
    "CLIP",
    "CLIPConfig",
    "DeepseekVL",
    "DeepseekVL2",
    "DeepseekVL2Config",
    "DeepseekVL2Processor",
    "DeepseekVLConfig",
    "DeepseekVLHybrid",
    "DeepseekVLHybridConfig",
    "DeepseekVLHybridProcessor",
    "DeepseekVLProcessor",
    "Gemma2Config",
    "GemmaConfig",
    "InputError",
    "LlamaVision",
    "LlamaVisionConfig",
    "LlamaVisionProcessor",
    "Llava",
    "LlavaConfig",
    "LlavaProcessor",
    "PairProcessor",
    "PaliGemma",
    "PaliGemmaConfig",
    "Processor",
    "Qwen2VL",
    "Qwen2VLConfig",
    "Qwen2VLProcessor",
    "Qwen2_5_VL",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLProcessor",
    "QwenVL",
    "QwenVLConfig",
    "QwenVLProcessor",
    "SigLIP",
    "SiglipConfig",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "ViT",
    "ViTConfig",
    "answer",
    "load",
]

_HOMES = {
    "errors": "InputError",
    "models.answering": "answer",
    "models.clip": "CLIP CLIPConfig",
    "models.deepseek_vl": "DeepseekVL DeepseekVLConfig",
    "models.deepseek_vl2": "DeepseekVL2 DeepseekVL2Config",
    "models.deepseek_vl_hybrid": "DeepseekVLHybrid DeepseekVLHybridConfig",
    "models.llama_vision": "LlamaVision LlamaVisionConfig",
    "models.llava": "Llava LlavaConfig",
    "models.load": "load",
    "models.paligemma": "PaliGemma PaliGemmaConfig",
    "models.qwen2_5_vl": "Qwen2_5_VL Qwen2_5_VLConfig",
    "models.qwen2_vl": "Qwen2VL Qwen2VLConfig",
    "models.qwen_vl": "QwenVL QwenVLConfig",
    "models.siglip": "SigLIP SiglipConfig",
    "models.vit": "ViT",
    "processing": "DeepseekVL2Processor DeepseekVLHybridProcessor DeepseekVLProcessor LlamaVisionProcessor "
    "LlavaProcessor PairProcessor Processor QwenVLProcessor "
    "Qwen2VLProcessor Qwen2_5_VLProcessor",
    "text.gemma": "GemmaConfig",
    "text.gemma2": "Gemma2Config",
    "vision.siglip": "SiglipVisionConfig SiglipVisionModel",
    "vision.vit": "ViTConfig",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: PyTorch takes seconds, which `minivlm --help` should not."""
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{home}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:  # a folder of the package
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
