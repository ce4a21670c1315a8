"""A vision-language model from an image patch to a sentence: the package that the course's notebooks build.

>>> import minivlm
>>> model, processor = minivlm.load("google/paligemma-3b-mix-224")
"""

from minivlm.configs import Gemma2Config, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.encoder_configs import CLIPConfig, SiglipConfig, ViTConfig
from minivlm.errors import InputError
from minivlm.models.clip import CLIP
from minivlm.models.load import load
from minivlm.models.paligemma import PaliGemma
from minivlm.models.siglip import SigLIP
from minivlm.models.vit import ViT
from minivlm.processing import PairProcessor, Processor
from minivlm.vision.siglip import SiglipVisionModel

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
