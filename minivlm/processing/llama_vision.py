"""Llama 3.2 Vision's processor (https://arxiv.org/abs/2407.21783): pictures and chats in, a batch out.

What differs from LLaVA's: a picture is one token of its row, `<|image|>`, and its pixels come as tiles beside
the row, with the number of the canvas on which they lie (canvases.py). transformers' processor also returns
masks of tiles and of who sees them: both follow from the ids, and the model makes them (pictures_in_rows.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from PIL import Image
from torch import Tensor

from minivlm.files import write_aside
from minivlm.processing.canvases import CanvasImageProcessor
from minivlm.processing.chat import Turn
from minivlm.processing.inputs import Inputs, Picture, Row
from minivlm.processing.llama3_chat import chat_template, encode_chat
from minivlm.processing.llama3_tokens import Llama3Tokenizer
from minivlm.processing.llava import SETTINGS, TEMPLATE
from minivlm.processing.rows import Pictures, RowProcessor, open_rows
from minivlm.processing.video import Video


class LlamaVisionProcessor(RowProcessor):
    """A tokenizer and an image processor.

    Args:
        system: what chats begin with; may be empty.
    """

    tokenizer: Llama3Tokenizer
    image_processor: CanvasImageProcessor

    def __init__(
        self, tokenizer: Llama3Tokenizer, image_processor: CanvasImageProcessor, system: str = ""
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.system = system

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LlamaVisionProcessor:
        """Load tokenizer.json and preprocessor_config.json.

        Raises InputError: a file is missing, unreadable or unsupported.
        """
        return cls(Llama3Tokenizer.from_pretrained(folder), CanvasImageProcessor.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder; `transformers` reads them too."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        settings = {"processor_class": self.tokenizer.processor_class}
        with write_aside(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        with write_aside(folder / TEMPLATE) as temporary:
            temporary.write_text(chat_template(self.system), encoding="utf-8")

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """One question with the pictures before it, and its answer."""
        return encode_chat(self.tokenizer, [(prompt, answer)], pictures, system=self.system)

    def chat(
        self,
        images: Picture | Sequence[Pictures] | None,
        chats: Sequence[Sequence[Turn]],
        padding_side: str = "left",
        max_length: int | None = None,
        *,
        tags: bool = False,
    ) -> Inputs:
        """A batch of chats of several turns, see `encode_chat`; otherwise as a call.

        >>> processor.chat([[first, second]], [[("what differs?", "the color"), ("which color?", None)]])

        Labels are there if every chat ends with an answer; then all its answers have a loss.
        """
        shown = open_rows(images, len(chats))
        rows = [
            encode_chat(self.tokenizer, turns, len(of_row), tags=tags, system=self.system)
            for turns, of_row in zip(chats, shown, strict=True)
        ]
        return self.batch(rows, shown, padding_side, max_length)

    def pixels(self, pictures: Sequence[Image.Image | Video]) -> Inputs:
        """What the tower reads of the M pictures of a batch, in order.

        Returns:
          pixel_values      [M, T, C, side, side], tiles, and zeros for those that a canvas does not have
          aspect_ratio_ids  [M], on which of `supported_canvases` each lies, from 1
        """
        tiles, ids = self.image_processor.read(cast(Sequence[Image.Image], pictures))
        return {"pixel_values": tiles, "aspect_ratio_ids": ids}

    def to_pictures(self, inputs: Inputs) -> Tensor:
        """The canvases of a batch, if all have one size: [M, C, height, width].

        Raises InputError: they have not.
        """
        return self.image_processor.join(inputs["pixel_values"], inputs["aspect_ratio_ids"])

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """The other way around, as `pixels`, for canvases."""
        tiles, ids = self.image_processor.cut(pictures)
        return {"pixel_values": tiles, "aspect_ratio_ids": ids}
