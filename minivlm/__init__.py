"""A vision-language model from an image patch to a sentence: the package that the course's notebooks build.

>>> import minivlm
>>> model, processor = minivlm.load("google/paligemma-3b-mix-224")
"""

from minivlm.errors import InputError
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.models.load import load
from minivlm.models.paligemma import PaliGemma, PaliGemmaConfig
from minivlm.models.siglip import SigLIP, SiglipConfig
from minivlm.models.vit import ViT
from minivlm.processing import PairProcessor, Processor
from minivlm.text.gemma import GemmaConfig
from minivlm.text.gemma2 import Gemma2Config
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel
from minivlm.vision.vit import ViTConfig

__version__ = "0.1.0"

__all__ = [
    "CLIP",
    "CLIPConfig",
    "Gemma2Config",
    "GemmaConfig",
    "InputError",
    "PairProcessor",
    "PaliGemma",
    "PaliGemmaConfig",
    "Processor",
    "SigLIP",
    "SiglipConfig",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "ViT",
    "ViTConfig",
    "load",
]
