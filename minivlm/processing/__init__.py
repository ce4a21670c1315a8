"""Pictures, words and boxes as the model reads and writes them. Nothing here knows a network."""

from minivlm.processing.boxes import Box, box_to_tokens, boxes_to_text, text_to_boxes
from minivlm.processing.images import ImageProcessor, load_picture, preprocess, to_rgb
from minivlm.processing.processor import Processor
from minivlm.processing.tokens import Tokenizer, add_image_tokens_to_prompt, build_tokenizer

__all__ = [
    "Box",
    "ImageProcessor",
    "Processor",
    "Tokenizer",
    "add_image_tokens_to_prompt",
    "box_to_tokens",
    "boxes_to_text",
    "build_tokenizer",
    "load_picture",
    "preprocess",
    "text_to_boxes",
    "to_rgb",
]
