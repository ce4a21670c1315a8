"""What a processor hands to a model: tensors by name, and the protocol of the processors that make them.

Every system has its own prompt form, and so its own processor. Evaluation, commands and fine-tuning need only
what is listed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from minivlm.processing.images import ImageProcessor
from minivlm.processing.tokens import BaseTokenizer
from minivlm.processing.video import Video
from minivlm.processing.video_budget import VideoBudget

Picture = Image.Image | str | Path
Inputs = dict[str, Tensor]

IGNORE = -100  # the label that torch's cross-entropy ignores


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """The same batch where the model computes."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def check_rows(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> None:
    """Raise ValueError unless each row is a prefix, then a suffix, with padding outside of them.

    A mask for anything else (a second prefix, a hole) would be another computation.

    Args:
        input_ids, attention_mask, token_type_ids: [B, S]; None means that everything is prefix.
    """
    types = torch.zeros_like(attention_mask) if token_type_ids is None else token_type_ids
    for name, tensor in {"attention_mask": attention_mask, "token_type_ids": types}.items():
        if tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected that of input_ids, {list(input_ids.shape)}"
            )
    real = attention_mask.bool()
    between = (real.cumsum(dim=1) > 0) & (real.flip(1).cumsum(dim=1).flip(1) > 0)
    if bool((between & ~real).any()):
        raise ValueError("attention_mask has a hole: expected padding before or after a row, not inside it")
    in_suffix = real & (types != 0)
    if bool(((in_suffix.cumsum(dim=1) > 0) & real & ~in_suffix).any()):
        raise ValueError("token_type_ids have a prefix (0) after a suffix (1): expected 0 ... 0 1 ... 1")


class Row(NamedTuple):
    """The tokens of one row, and which of them the model is to write, its end included."""

    ids: list[int]
    written: list[bool]


class AnswerProcessor(Protocol):
    """Pictures and prompts in, a batch out; and from the ids of an answer back to its words."""

    image_processor: ImageProcessor

    @property
    def tokenizer(self) -> BaseTokenizer:
        """Words to ids and back."""

    def __call__(
        self,
        images: Picture | Video | Sequence[Picture | Video | Sequence[Picture | Video] | None] | None,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> Inputs:
        """One row for each prompt; with suffixes (the answers) there are labels, too."""

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """The ids of one row; pictures have their places in it."""

    def make_room(self, row: Row, pictures: Sequence[Picture | Video]) -> Row:
        """The row with as many image tokens as these pictures take. They are opened only if that varies."""

    def pixels(self, pictures: Sequence[Image.Image | Video]) -> Inputs:
        """What the tower reads of the opened pictures of a batch."""

    def to_pictures(self, inputs: Inputs) -> Tensor:
        """The pictures of a batch as the tower sees them, [M, C, height, width], to be looked at."""

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """The other way around, for versions of the picture that `inputs` holds, with parts hidden."""

    def decode(self, ids: Tensor) -> list[str]:
        """Generated ids [B, n] -> B answers."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a checkpoint folder."""


@runtime_checkable
class ReadsVideos(Protocol):
    """A processor that takes a `Video` wherever it takes a picture."""

    video_budget: VideoBudget
