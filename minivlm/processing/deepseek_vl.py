"""DeepSeek-VL's processor (https://arxiv.org/abs/2403.05525): pictures and chats in, a batch out.

What differs from LLaVA's: pictures keep their shape inside a square with bars (squares.py), chats have their
own form (deepseek_chat.py), and the tokenizer works on bytes. No row has segments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.chat import Turn
from minivlm.processing.deepseek_chat import ANSWERED, SYSTEM, chat_template, encode_chat
from minivlm.processing.deepseek_tokens import IMAGE, DeepseekTokenizer
from minivlm.processing.inputs import Inputs, Picture, Row
from minivlm.processing.llava import SETTINGS, TEMPLATE, template_in
from minivlm.processing.rows import Pictures, RowProcessor, open_rows
from minivlm.processing.squares import DeepseekVLImageProcessor
from minivlm.processing.tokens import settings_in


class DeepseekVLProcessor(RowProcessor):
    """A tokenizer, an image processor, and the form of a chat.

    Args:
        num_image_tokens: of one picture.
        system: what chats begin with; may be empty.
    """

    processor_class: ClassVar[str] = "DeepseekVLProcessor"  # in transformers
    pictures_class: ClassVar[type[DeepseekVLImageProcessor]] = DeepseekVLImageProcessor
    tokenizer: DeepseekTokenizer

    def __init__(
        self,
        tokenizer: DeepseekTokenizer,
        image_processor: DeepseekVLImageProcessor,
        num_image_tokens: int = 576,
        system: str = SYSTEM,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_seq_length = num_image_tokens
        self.system = system

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load tokenizer.json, preprocessor_config.json, processor_config.json and the chat template.

        Raises InputError: a file is missing, unreadable or unsupported.
        """
        folder = Path(folder)
        tokens, template = settings_in(folder / SETTINGS).get("num_image_tokens", 576), template_in(folder)
        if not isinstance(tokens, int) or tokens < 1:
            raise InputError(f"{folder / SETTINGS} has num_image_tokens = {tokens!r}: expected a number")
        return cls(
            DeepseekTokenizer.from_pretrained(folder),
            cls.pictures_class.from_pretrained(folder),
            tokens,
            SYSTEM if template is None else system_of(template),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder; `transformers`' AutoProcessor reads them too."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        settings = {"processor_class": self.processor_class, "num_image_tokens": self.image_seq_length}
        with write_aside(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        with write_aside(folder / TEMPLATE) as temporary:
            temporary.write_text(chat_template(self.system), encoding="utf-8")

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """One question with the pictures before it, and its answer."""
        return encode_chat(
            self.tokenizer, [(prompt, answer)], self.image_seq_length, pictures, system=self.system
        )

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
        pictures = open_rows(images, len(chats))
        rows = [
            encode_chat(
                self.tokenizer, turns, self.image_seq_length, len(of_row), tags=tags, system=self.system
            )
            for turns, of_row in zip(chats, pictures, strict=True)
        ]
        return self.batch(rows, pictures, padding_side, max_length)

    def decode(self, ids: Tensor) -> list[str]:
        """Ids [B, n] -> B texts, without the space between "Assistant:" and an answer."""
        return [text.strip() for text in super().decode(ids)]


def system_of(template: str) -> str:
    """The first sentence of the chats that a folder's template writes: DeepSeek-VL's, or none.

    Raises InputError: the template has no place for a picture, or another form of turns.
    """
    for needed, what in ((IMAGE, "place for a picture"), (ANSWERED, "answer in DeepSeek-VL's form")):
        if needed not in template:
            raise InputError(f"the chat template has no {what} ({needed}): only DeepSeek-VL's is supported")
    return SYSTEM if SYSTEM in template else ""
