"""A vision-language model from an image patch to a sentence: the package that the course's notebooks build.

>>> import minivlm
>>> model, processor = minivlm.load("google/paligemma-3b-mix-224")
"""

from minivlm.configs import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.errors import InputError
from minivlm.models.load import load
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.vision.vit import SiglipVisionModel

__version__ = "0.1.0"

__all__ = [
    "GemmaConfig",
    "InputError",
    "PaliGemma",
    "PaliGemmaConfig",
    "Processor",
    "SiglipVisionConfig",
    "SiglipVisionModel",
    "load",
]
