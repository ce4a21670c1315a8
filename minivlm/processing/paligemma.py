"""Pictures and prompts in, the tensors of one batch out.

As in PaliGemma (https://arxiv.org/abs/2407.07726), a row is `<image>` * N, `<bos>`, prompt, newline
(segment 0, visible to every position) and, in training, answer and `<eos>` (segment 1, causal). The tensors
equal those of `PaliGemmaProcessor` in `transformers`, with three differences: text typed by a user never
becomes a placeholder, rows without a picture are possible, and unequal numbers of pictures and prompts are
refused rather than guessed at.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minivlm.errors import InputError
from minivlm.processing.images import ImageProcessor
from minivlm.processing.inputs import Row
from minivlm.processing.rows import RowProcessor
from minivlm.processing.tokens import Tokenizer


class Processor(RowProcessor):
    """A tokenizer and an image processor that agree on the number of image tokens N.

    Raises InputError: the image processor does not define N (`image_seq_length`).
    """

    has_segments = True
    tokenizer: Tokenizer

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

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """Prefix and suffix. Raises InputError: several pictures, which PaliGemma never saw in a row."""
        if pictures > 1:
            raise InputError(
                f"got {pictures} pictures for one prompt: PaliGemma reads one picture per prompt"
            )
        prefix = self.tokenizer.encode_prefix(prompt, self.image_seq_length * pictures)
        suffix = [] if answer is None else self.tokenizer.encode_suffix(answer)
        return Row(prefix + suffix, [False] * len(prefix) + [True] * len(suffix))
