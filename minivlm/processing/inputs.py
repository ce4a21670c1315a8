"""What a processor hands to a model: tensors by name, and the protocol of the processors that make them.

Every system has its own prompt form, and so its own processor. Evaluation, commands and fine-tuning need only
what is listed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from minivlm.processing.images import ImageProcessor
from minivlm.processing.tokens import Tokenizer

Picture = Image.Image | str | Path
Inputs = dict[str, Tensor]


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same batch where the model computes."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class AnswerProcessor(Protocol):
    """Pictures and prompts in, a batch out; and from the ids of an answer back to its words."""

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    image_seq_length: int  # image tokens of one picture

    def __call__(
        self,
        images: Picture | Sequence[Picture | None] | None,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> Inputs:
        """One row for each prompt; with suffixes (the answers) there are labels, too."""

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids [B, n] -> B answers."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a checkpoint folder."""
