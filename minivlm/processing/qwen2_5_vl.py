"""Qwen2.5-VL's processor (https://arxiv.org/abs/2502.13923): Qwen2-VL's, and pages as HTML.

Pictures, videos and chats are prepared as in `qwen2_vl.py`. What is new is an answer that holds a whole page
with its boxes, in pixels of the picture as the model sees it (documents.py): the processor knows that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from minivlm.processing.documents import Element, Size, read_html, write_html
from minivlm.processing.qwen2_vl import Qwen2VLProcessor


class Qwen2_5_VLProcessor(Qwen2VLProcessor):
    """Prepares batches, writes pages and reads them."""

    processor_class: ClassVar[str] = "Qwen2_5_VLProcessor"

    def write_page(self, elements: Sequence[Element], page: Size) -> str:
        """The answer to the prompt "QwenVL HTML " about a page of this (width, height).

        Raises InputError: as `write_html` and `smart_resize`.
        """
        return write_html(elements, page, self.image_processor.size_of(*page))

    def read_page(self, answer: str, page: Size) -> list[Element]:
        """The other way around; boxes in pixels of the page. Raises InputError: as `smart_resize`."""
        return read_html(answer, page, self.image_processor.size_of(*page))
