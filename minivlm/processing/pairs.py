"""Pictures and captions in, the tensors that CLIP or SigLIP reads out.

Unlike PaliGemma's processor, where a row is a picture with its prompt, the two lists are independent: a
zero-shot question has one picture and many captions. Only a loss needs them in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.captions import CLIP_CAPTIONS, SIGLIP_CAPTIONS, CaptionForm, CaptionTokenizer
from minivlm.processing.crops import CLIPImageProcessor
from minivlm.processing.images import ImageProcessor, load_picture
from minivlm.processing.inputs import Picture

# By model_type in config.json: the form of a caption, and the processor for pictures.
SYSTEMS: dict[str, tuple[CaptionForm, type[ImageProcessor]]] = {
    "clip": (CLIP_CAPTIONS, CLIPImageProcessor),
    "siglip": (SIGLIP_CAPTIONS, ImageProcessor),
}


class PairProcessor:
    """A caption tokenizer and an image processor."""

    def __init__(self, tokenizer: CaptionTokenizer, image_processor: ImageProcessor) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model_type: str, max_length: int | None = None
    ) -> PairProcessor:
        """Load tokenizer.json, tokenizer_config.json and preprocessor_config.json.

        Args:
            model_type: "clip" or "siglip".
            max_length: tokens in a caption, from the model's config; None takes the tokenizer's.

        Raises InputError: a file is missing, unreadable or unsupported.
        """
        form, image_processor = SYSTEMS[model_type]
        return cls(
            CaptionTokenizer.from_pretrained(folder, form, max_length),
            image_processor.from_pretrained(folder),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def __call__(
        self,
        images: Picture | Sequence[Picture] | None = None,
        texts: str | Sequence[str] | None = None,
        truncate: bool = False,
    ) -> dict[str, Tensor]:
        """n pictures (PIL images or paths) and m captions; either may be omitted.

        Returns:
          pixel_values  [n, C, H, W] fp32, with pictures
          input_ids     [m, T] int64, with captions

        Raises InputError: neither pictures nor captions; a picture that cannot be read; otherwise as
        `CaptionTokenizer`.
        """
        if images is None and texts is None:
            raise InputError("there are neither pictures nor captions: give at least one of them")
        batch: dict[str, Tensor] = {}
        if images is not None:
            batch["pixel_values"] = self.image_processor(open_pictures(images))
        if texts is not None:
            batch["input_ids"] = self.tokenizer(texts, truncate)
        return batch


def open_pictures(images: Picture | Sequence[Picture]) -> list[Image.Image]:
    """Pictures or paths of pictures as a list of pictures.

    Raises InputError: a picture that cannot be read, or something that is neither.
    """
    opened = []
    for number, picture in enumerate([images] if isinstance(images, Picture) else images):
        if isinstance(picture, (str, Path)):
            picture = load_picture(picture)
        if not isinstance(picture, Image.Image):
            raise InputError(
                f"picture {number + 1} is of type {type(picture).__name__}: expected a PIL image or a path"
            )
        opened.append(picture)
    return opened
