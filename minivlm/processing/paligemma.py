"""Pictures and prompts in, the tensors of one batch out.

As in PaliGemma (https://arxiv.org/abs/2407.07726), a row is `<image>` * N, `<bos>`, prompt, newline
(segment 0, visible to every position) and, in training, answer and `<eos>` (segment 1, causal). The tensors
equal those of `PaliGemmaProcessor` in `transformers`, with three differences: text typed by a user never
becomes a placeholder, rows without a picture are possible, and unequal numbers of pictures and prompts are
refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.images import ImageProcessor, load_picture
from minivlm.processing.inputs import Picture
from minivlm.processing.tokens import Tokenizer

IGNORE = -100  # the label that torch's cross-entropy ignores


class Processor:
    """A tokenizer and an image processor that agree on the number of image tokens N.

    Raises InputError: the image processor does not define N (`image_seq_length`).
    """

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor) -> None:
        if image_processor.image_seq_length is None:
            raise InputError(
                "the number of image tokens is unknown: "
                "set image_seq_length to (image_size / patch_size) squared"
            )
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_seq_length: int = image_processor.image_seq_length

    @classmethod
    def from_pretrained(cls, folder: str | Path, image_seq_length: int | None = None) -> Processor:
        """Load tokenizer.json and preprocessor_config.json; `image_seq_length` overrides the file's.

        Raises InputError: a file is missing, unreadable or unsupported, or nothing defines image_seq_length.
        """
        image_processor = ImageProcessor.from_pretrained(folder)
        if image_seq_length is not None:
            image_processor = replace(image_processor, image_seq_length=image_seq_length)
        return cls(Tokenizer.from_pretrained(folder), image_processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder; `transformers`' AutoProcessor reads them too."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def __call__(
        self,
        images: Picture | Sequence[Picture | None] | None,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """One batch: a row for each prompt, with one picture or none.

        Pictures are PIL images or paths. A row whose picture is None is text only: it has no image tokens,
        and pixel_values holds the other pictures in order. Pad on the left for generation, so that every row
        ends where the answer begins; either side will do for training.

        Returns, with S the length of the longest row and M the number of pictures:
          input_ids       [B, S] int64
          attention_mask  [B, S] int64, 1 for tokens, 0 for padding
          token_type_ids  [B, S] int64, 0 for the prefix and padding, 1 for the suffix
          pixel_values    [M, C, H, W] fp32; absent without pictures
          labels          [B, S] int64, ids of the suffix, -100 elsewhere; only with suffixes

        Raises InputError: unequal numbers of pictures, prompts and suffixes; an empty prompt; a row longer
        than max_length (nothing is truncated: training would silently use half a picture or an answer without
        its end); a picture that cannot be read; an argument of the wrong type.
        """
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side is {padding_side!r}: expected 'left' or 'right'")
        prompts = _as_list(prompts, "prompt")
        if not prompts:
            raise InputError("there are no prompts: give at least one, such as 'caption en'")
        pictures = self._pictures(images, len(prompts))
        answers = None if suffixes is None else _as_list(suffixes, "suffix")
        if answers is not None and len(answers) != len(prompts):
            raise InputError(
                f"got {len(answers)} suffixes for {len(prompts)} prompts: give one suffix per prompt"
            )

        rows: list[tuple[list[int], list[int]]] = []  # prefix ids, suffix ids
        for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            if not prompt.strip():
                raise InputError(f"prompt {number + 1} is empty: ask something, such as 'caption en'")
            prefix = self.tokenizer.encode_prefix(prompt, self.image_seq_length if picture is not None else 0)
            suffix = [] if answers is None else self.tokenizer.encode_suffix(answers[number])
            if max_length is not None and len(prefix) + len(suffix) > max_length:
                raise InputError(
                    f"row {number + 1} has {len(prefix)} tokens before the answer and {len(suffix)} in it, "
                    f"over max_length {max_length}: shorten the text or raise max_length"
                )
            rows.append((prefix, suffix))

        batch = self._pad(rows, padding_side)
        if answers is not None:
            batch["labels"] = batch["input_ids"].masked_fill(batch["token_type_ids"] == 0, IGNORE)
        existing = [picture for picture in pictures if picture is not None]
        if existing:
            batch["pixel_values"] = self.image_processor(existing)
        return batch

    def decode(self, ids: Tensor) -> list[str]:
        """Ids [B, n] -> B texts. Each row ends before its first `<eos>`; special tokens are dropped.

        Raises InputError: another shape.
        """
        if ids.ndim != 2:
            raise InputError(f"ids have shape {list(ids.shape)}: expected [B, n], one row per answer")
        texts = []
        for row in ids.tolist():
            end = row.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in row else len(row)
            texts.append(self.tokenizer.decode(row[:end]))
        return texts

    def batch_decode(
        self, ids: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """As the tokenizer's `batch_decode`, under the name that processors of `transformers` have."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens)

    def _pictures(
        self, images: Picture | Sequence[Picture | None] | None, num_prompts: int
    ) -> list[Image.Image | None]:
        """One opened picture, or None, for each prompt."""
        if images is None:
            return [None] * num_prompts
        given = [images] if isinstance(images, (Image.Image, str, Path)) else list(images)
        if len(given) != num_prompts:
            raise InputError(
                f"got {len(given)} pictures for {num_prompts} prompts: give one picture per prompt, the "
                "same one twice if two prompts are about it, or None for a prompt without a picture"
            )
        opened: list[Image.Image | None] = []
        for number, picture in enumerate(given):
            if isinstance(picture, (str, Path)):
                picture = load_picture(picture)
            elif picture is not None and not isinstance(picture, Image.Image):
                raise InputError(
                    f"picture {number + 1} is of type {type(picture).__name__}: "
                    "expected a PIL image, a path or None"
                )
            opened.append(picture)
        return opened

    def _pad(self, rows: list[tuple[list[int], list[int]]], padding_side: str) -> dict[str, Tensor]:
        """Rows of different lengths -> [B, S] tensors."""
        longest = max(len(prefix) + len(suffix) for prefix, suffix in rows)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.tokenizer.pad_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        token_type_ids = torch.zeros(shape, dtype=torch.long)
        for row, (prefix, suffix) in enumerate(rows):
            length = len(prefix) + len(suffix)
            start = longest - length if padding_side == "left" else 0
            input_ids[row, start : start + length] = torch.tensor(prefix + suffix)
            attention_mask[row, start : start + length] = 1
            token_type_ids[row, start + len(prefix) : start + length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}


def _as_list(texts: str | Sequence[str], name: str) -> list[str]:
    """One or several texts as a list; `name` is what the error calls them."""
    given = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(given):
        if not isinstance(text, str):
            raise InputError(f"{name} {number + 1} is of type {type(text).__name__}: expected a string")
    return given
