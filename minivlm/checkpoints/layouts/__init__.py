"""How checkpoint files name their tensors: a file of tables for each system, and names.py, which reads them.

The same PaliGemma exists under four sets of names, depending on which version of transformers wrote it, the
same ViT under four, CLIP under two, SigLIP under one.
"""

from minivlm.checkpoints.layouts.clip import CLIP_LAYOUTS, CLIP_RESNET_LAYOUTS
from minivlm.checkpoints.layouts.deepseek_vl import DEEPSEEK_VL_HYBRID_LAYOUTS, DEEPSEEK_VL_LAYOUTS
from minivlm.checkpoints.layouts.deepseek_vl2 import DEEPSEEK_VL2_LAYOUTS
from minivlm.checkpoints.layouts.llama_vision import LLAMA_VISION_LAYOUTS
from minivlm.checkpoints.layouts.llava import LLAVA_LAYOUTS
from minivlm.checkpoints.layouts.names import (
    UNUSED,
    Layout,
    as_in_file,
    join,
    names_in,
    split,
    to_file,
    to_ours,
)
from minivlm.checkpoints.layouts.paligemma import PALIGEMMA_LAYOUTS
from minivlm.checkpoints.layouts.qwen2_vl import QWEN2_VL_LAYOUTS
from minivlm.checkpoints.layouts.qwen_vl import qwen_vl_layouts
from minivlm.checkpoints.layouts.siglip import SIGLIP_LAYOUTS
from minivlm.checkpoints.layouts.visualbert import VISUALBERT_LAYOUTS
from minivlm.checkpoints.layouts.vit import VIT_LAYOUTS

__all__ = [
    "CLIP_LAYOUTS",
    "CLIP_RESNET_LAYOUTS",
    "DEEPSEEK_VL2_LAYOUTS",
    "DEEPSEEK_VL_HYBRID_LAYOUTS",
    "DEEPSEEK_VL_LAYOUTS",
    "LLAMA_VISION_LAYOUTS",
    "LLAVA_LAYOUTS",
    "PALIGEMMA_LAYOUTS",
    "QWEN2_VL_LAYOUTS",
    "SIGLIP_LAYOUTS",
    "UNUSED",
    "VISUALBERT_LAYOUTS",
    "VIT_LAYOUTS",
    "Layout",
    "as_in_file",
    "join",
    "names_in",
    "qwen_vl_layouts",
    "split",
    "to_file",
    "to_ours",
]
