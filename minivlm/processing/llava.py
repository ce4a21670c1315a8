"""LLaVA's processor (https://arxiv.org/abs/2310.03744): pictures and chats in, the tensors of one batch out.

What differs from PaliGemma's: pictures keep their shape and are cropped or padded to a square, prompts are
chats (chat.py), the picture stands inside of them, and one row may hold several. No row has segments, because
the decoder is causal everywhere.

The original program pads a picture to a square with CLIP's mean color, so that nothing of it is lost. The
published folders for transformers crop its middle instead; newer ones say `do_pad`. The folder decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.chat import SYSTEM, Turn, chat_template, encode_caption, encode_chat, system_of
from minivlm.processing.crops import CLIPImageProcessor
from minivlm.processing.images import Fitted, to_rgb
from minivlm.processing.inputs import Inputs, Picture, Row
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.rows import Pictures, RowProcessor, as_list, open_rows
from minivlm.processing.tokens import IMAGE, settings_in

SETTINGS, TEMPLATE = "processor_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class LlavaImageProcessor(CLIPImageProcessor):
    """CLIP's, with `do_pad` for the square. Where an odd pixel is left over, it is as in transformers."""

    kind: ClassVar[str] = "LlavaImageProcessor"

    image_size: int = 336
    do_pad: bool = False

    @property
    def fitted(self) -> Fitted:
        """How a long picture becomes a square."""
        return "padded" if self.do_pad else "cropped"

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> RGB of image_size x image_size: padded to a square, or its middle.

        Raises InputError: as in `CLIPImageProcessor`.
        """
        return super().fit(self.pad(to_rgb(image)) if self.do_pad else image)

    def pad(self, image: Image.Image) -> Image.Image:
        """An RGB picture in the middle of a square of the mean color.

        Raises InputError: a picture so long that the square would not fit into memory.
        """
        side, limit = max(image.size), Image.MAX_IMAGE_PIXELS
        if limit is not None and side * side > limit:
            raise InputError(
                f"the picture has {image.width} x {image.height} pixels, too many for a square: crop "
                "it to the part that matters"
            )
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in self.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    @staticmethod
    def margin(spare: int) -> int:
        """Half of the pixels that are left over, rounded down."""
        return spare // 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As in `ImageProcessor`. CLIP's own processor, which older folders name, does not pad."""
        kind = values.get("image_processor_type") or values.get("feature_extractor_type") or cls.kind
        clip = CLIPImageProcessor.kind
        if kind in (clip, f"{clip}Fast", f"{clip}Pil", cls.old_kind):
            CLIPImageProcessor.from_dict(values)  # refuses what that one does not know
            values = {**values, "image_processor_type": cls.kind}
        do_pad = values.get("do_pad") or False
        if not isinstance(do_pad, bool):
            raise InputError(f"do_pad is {do_pad!r}: expected true or false")
        return replace(super().from_dict({**values, "do_pad": None}), do_pad=do_pad)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a preprocessor_config.json, which `transformers` reads the same way."""
        return {**super().to_dict(), "do_pad": self.do_pad}


class LlavaProcessor(RowProcessor):
    """A tokenizer, an image processor, and the form of a chat.

    Args:
        patch_size: pixels, of the image tower's patches.
        vision_feature_select_strategy: "default", or "full" with one more image token for the class token.
        system: the sentence that chats begin with; may be empty.
        num_additional_image_tokens: 1 if the tower gives a class token, 0 if it has none.

    Raises InputError: another strategy.
    """

    tokenizer: LlamaTokenizer

    def __init__(
        self,
        tokenizer: LlamaTokenizer,
        image_processor: LlavaImageProcessor,
        patch_size: int = 14,
        vision_feature_select_strategy: str = "default",
        system: str = SYSTEM,
        num_additional_image_tokens: int = 1,
    ) -> None:
        if vision_feature_select_strategy not in ("default", "full"):
            raise InputError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}: "
                "expected 'default' or 'full'"
            )
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.system = system
        patches: int = (image_processor.image_size // patch_size) ** 2
        taken_off = vision_feature_select_strategy == "default"
        self.image_seq_length = patches + num_additional_image_tokens - taken_off

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 1,
    ) -> LlavaProcessor:
        """Load tokenizer.json, preprocessor_config.json, processor_config.json and the chat template.

        Args:
            patch_size, vision_feature_select_strategy, num_additional_image_tokens: where
                processor_config.json lacks them, as in old folders.

        The first sentence of a chat is that of the folder's template; without a template, Vicuna's.

        Raises InputError: a file is missing, unreadable or unsupported; the patch size is unknown.
        """
        folder = Path(folder)
        values = settings_in(folder / SETTINGS)
        patch_size = values.get("patch_size") or patch_size
        if not isinstance(patch_size, int) or patch_size < 1:
            raise InputError(f"{folder / SETTINGS} has no patch_size: take it from the model's config.json")
        class_tokens = values.get("num_additional_image_tokens", num_additional_image_tokens)
        if class_tokens not in (0, 1):
            raise InputError(
                f"num_additional_image_tokens is {class_tokens!r} in {folder / SETTINGS}: expected 1 beside "
                "a tower with a class token, 0 beside another"
            )
        template = template_in(folder)
        return cls(
            LlamaTokenizer.from_pretrained(folder),
            LlavaImageProcessor.from_pretrained(folder),
            patch_size,
            values.get("vision_feature_select_strategy") or vision_feature_select_strategy,
            SYSTEM if template is None else system_of(template),
            int(class_tokens),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder; `transformers`' AutoProcessor reads them too.

        Its `apply_chat_template` then gives the same ids as a call here.
        """
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        settings = {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": self.patch_size,
            # The tower's class token, which "default" takes off again.
            "num_additional_image_tokens": self.num_additional_image_tokens,
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
        }
        with write_aside(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        with write_aside(folder / TEMPLATE) as temporary:
            temporary.write_text(chat_template(self.system, self.tokenizer.names.eos), encoding="utf-8")

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

    def captions(
        self,
        images: Picture | Sequence[Pictures],
        captions: str | Sequence[str],
        padding_side: str = "right",
        max_length: int | None = None,
    ) -> Inputs:
        """A batch for the first stage of training: pictures with captions, and no questions.

        Raises InputError: as a call; a row without a picture, or with several.
        """
        texts = as_list(captions, "caption")
        pictures = open_rows(images, len(texts))
        for number, of_row in enumerate(pictures):
            if len(of_row) != 1:
                raise InputError(f"caption {number + 1} has {len(of_row)} pictures: expected one")
        rows = [encode_caption(self.tokenizer, text, self.image_seq_length) for text in texts]
        return self.batch(rows, pictures, padding_side, max_length)

    def decode(self, ids: Tensor) -> list[str]:
        """Ids [B, n] -> B texts, without the space between "ASSISTANT:" and an answer."""
        return [text.strip() for text in super().decode(ids)]


def template_in(folder: Path) -> str | None:
    """A folder's chat template, from the file of today or from those of older folders."""
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / TEMPLATE} cannot be read ({error}): download it again") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = settings_in(folder / name).get("chat_template")
        if isinstance(template, str):
            return template
    return None
