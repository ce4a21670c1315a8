"""Pictures, words, boxes and masks, as the model reads and writes them. Nothing here depends on the model.

The only network is the small codebook that turns masks into words.
"""

from minivlm.processing.boxes import Box, box_to_tokens, boxes_to_text, text_to_boxes
from minivlm.processing.canvases import CanvasImageProcessor
from minivlm.processing.captions import CLIP_CAPTIONS, SIGLIP_CAPTIONS, CaptionForm, CaptionTokenizer
from minivlm.processing.codebook import MaskCodebook, MaskCodebookConfig, load_codebook
from minivlm.processing.crops import CLIPImageProcessor, ViTImageProcessor
from minivlm.processing.deepseek_tokens import DeepseekTokenizer
from minivlm.processing.deepseek_vl import DeepseekVLProcessor
from minivlm.processing.deepseek_vl2 import DeepseekVL2Processor
from minivlm.processing.deepseek_vl2_tiles import TiledImageProcessor
from minivlm.processing.deepseek_vl2_tokens import DeepseekVL2Tokenizer
from minivlm.processing.deepseek_vl_hybrid import DeepseekVLHybridProcessor
from minivlm.processing.frame_sampling import frames_at
from minivlm.processing.images import ImageProcessor, load_picture, preprocess, to_rgb
from minivlm.processing.inputs import AnswerProcessor, to_device
from minivlm.processing.interleaved import interleave, interleaved_labels
from minivlm.processing.llama3_tokens import Llama3Tokenizer
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.llama_vision import LlamaVisionProcessor
from minivlm.processing.llava import LlavaImageProcessor, LlavaProcessor
from minivlm.processing.masks import (
    Mask,
    codes_to_text,
    crop_mask,
    mask_iou,
    mask_to_tokens,
    text_to_masks,
)
from minivlm.processing.pairs import PairProcessor
from minivlm.processing.paligemma import Processor
from minivlm.processing.patches import Qwen2VLImageProcessor
from minivlm.processing.qwen2_5_vl import Qwen2_5_VLProcessor
from minivlm.processing.qwen2_tokens import Qwen2Tokenizer
from minivlm.processing.qwen2_vl import Qwen2VLProcessor
from minivlm.processing.qwen_vl import QwenVLProcessor
from minivlm.processing.squares import DeepseekVLHybridImageProcessor, DeepseekVLImageProcessor
from minivlm.processing.tokens import BaseTokenizer, Tokenizer, add_image_tokens_to_prompt, build_tokenizer
from minivlm.processing.video import Video, open_video, video_of
from minivlm.processing.video_budget import VideoBudget

__all__ = [
    "CLIP_CAPTIONS",
    "SIGLIP_CAPTIONS",
    "AnswerProcessor",
    "BaseTokenizer",
    "Box",
    "CLIPImageProcessor",
    "CanvasImageProcessor",
    "CaptionForm",
    "CaptionTokenizer",
    "DeepseekTokenizer",
    "DeepseekVL2Processor",
    "DeepseekVL2Tokenizer",
    "DeepseekVLHybridImageProcessor",
    "DeepseekVLHybridProcessor",
    "DeepseekVLImageProcessor",
    "DeepseekVLProcessor",
    "ImageProcessor",
    "Llama3Tokenizer",
    "LlamaTokenizer",
    "LlamaVisionProcessor",
    "LlavaImageProcessor",
    "LlavaProcessor",
    "Mask",
    "MaskCodebook",
    "MaskCodebookConfig",
    "PairProcessor",
    "Processor",
    "Qwen2Tokenizer",
    "Qwen2VLImageProcessor",
    "Qwen2VLProcessor",
    "Qwen2_5_VLProcessor",
    "QwenVLProcessor",
    "TiledImageProcessor",
    "Tokenizer",
    "ViTImageProcessor",
    "Video",
    "VideoBudget",
    "add_image_tokens_to_prompt",
    "box_to_tokens",
    "boxes_to_text",
    "build_tokenizer",
    "codes_to_text",
    "crop_mask",
    "frames_at",
    "interleave",
    "interleaved_labels",
    "load_codebook",
    "load_picture",
    "mask_iou",
    "mask_to_tokens",
    "open_video",
    "preprocess",
    "text_to_boxes",
    "text_to_masks",
    "to_device",
    "to_rgb",
    "video_of",
]
