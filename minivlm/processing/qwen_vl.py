"""Qwen-VL's processor (https://arxiv.org/abs/2308.12966): pictures and prompts in, tensors out, and back.

A picture is squeezed into a square of 448 pixels, with CLIP's mean and deviation. Which of the two prompt
forms (qwen_chat.py) a model has learned is in its folder's generation_config.json, as `chat_format`.

The published folders have no preprocessor_config.json: the side of a picture is in config.json. So this
processor writes only what belongs to its tokenizer, and the model writes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.crops import CLIPImageProcessor
from minivlm.processing.images import ImageProcessor
from minivlm.processing.inputs import Inputs, Row
from minivlm.processing.qwen_chat import (
    SYSTEM,
    Turn,
    check_turn,
    encode_chatml,
    encode_content,
    encode_raw,
    raw_prompt,
)
from minivlm.processing.qwen_tags import is_picture
from minivlm.processing.qwen_tokens import ChatFormat, QwenTokenizer
from minivlm.processing.rows import RowProcessor, open_rows
from minivlm.processing.tokens import settings_in

GENERATION = "generation_config.json"


class QwenVLProcessor(RowProcessor):
    """A tokenizer, an image processor, and the form of prompts, which is the tokenizer's.

    Args:
        image_size: pixels, height = width.
        image_seq_length: image tokens of one picture.
        system: what a chat begins with.
    """

    tokenizer: QwenTokenizer

    def __init__(
        self,
        tokenizer: QwenTokenizer,
        image_size: int = 448,
        image_seq_length: int = 256,
        system: str = SYSTEM,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = ImageProcessor(
            image_size=image_size,
            image_mean=CLIPImageProcessor.image_mean,
            image_std=CLIPImageProcessor.image_std,
        )
        self.image_seq_length = image_seq_length
        self.system = system

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, image_size: int = 448, image_seq_length: int = 256
    ) -> QwenVLProcessor:
        """Load qwen.tiktoken, and the form of prompts from generation_config.json.

        Args:
            image_size, image_seq_length: from the `visual` part of config.json.

        Raises InputError: a file is missing, unreadable or unsupported.
        """
        tokenizer = QwenTokenizer.from_pretrained(folder, chat_format_in(folder))
        return cls(tokenizer, image_size, image_seq_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder; all others are written by the model."""
        self.tokenizer.save_pretrained(folder)

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """One question with the pictures before it, and its answer. Raises InputError: as `check_tags`."""
        is_chat = self.tokenizer.chat_format == "chatml"
        check_turn(prompt, answer, is_chat)
        shown, places = [{"image": ""}] * pictures, self.image_seq_length
        if is_chat:
            turn = ([*shown, {"text": prompt}], answer)
            return encode_chatml(self.tokenizer, [turn], places, system=self.system)
        text, between = raw_prompt(prompt)
        content = encode_content(self.tokenizer, [*shown, {"text": text}], places, labels=False)
        return encode_raw(self.tokenizer, content, None if answer is None else between + answer)

    def chat(
        self, chats: Sequence[Sequence[Turn]], padding_side: str = "left", max_length: int | None = None
    ) -> Inputs:
        """A batch of chats of several turns, whose questions are lists; otherwise as a call.

        >>> processor.chat([[([{"image": "1.jpg"}, {"text": "what is it?"}], None)]])

        An image is a path, which is also written into the row, or a PIL image. A model that has not learned
        to chat takes one turn, as it stands. Labels are there if every chat ends with an answer.

        Raises InputError: as a call, `encode_chatml` and `encode_content`.
        """
        rows = [self._encode_turns(turns) for turns in chats]
        shown = [[e["image"] for asked, _ in turns for e in asked if is_picture(e)] for turns in chats]
        return self.batch(rows, open_rows(shown, len(chats)), padding_side, max_length)

    def _encode_turns(self, turns: Sequence[Turn]) -> Row:
        if self.tokenizer.chat_format == "chatml":
            return encode_chatml(self.tokenizer, turns, self.image_seq_length, system=self.system)
        if len(turns) != 1:
            raise InputError(
                f"there are {len(turns)} turns, and this model has not learned to chat: give one question"
            )
        (asked, answer), places = turns[0], self.image_seq_length
        return encode_raw(self.tokenizer, encode_content(self.tokenizer, asked, places), answer)

    def decode(self, ids: Tensor) -> list[str]:
        """Ids [B, n] -> B texts with their tags, without the space before an answer."""
        return [text.strip() for text in super().decode(ids)]


def chat_format_in(folder: str | Path) -> ChatFormat:
    """The form of a folder's prompts. Raises InputError: generation_config.json does not say, or another."""
    path = Path(folder) / GENERATION
    found = settings_in(path).get("chat_format")
    if found not in ("chatml", "raw"):
        raise InputError(
            f"{path} has chat_format {found!r}: only 'chatml' (Qwen-VL-Chat) and 'raw' (Qwen-VL) are known. "
            "Take the file from the same checkpoint"
        )
    return found
