"""What evaluation, inspection, commands and training ask of a model: that it answers, or that it matches.

A system belongs to a kind by what it offers, not by what it inherits. Which kind the folder of a checkpoint
holds is said by `SYSTEMS` in load.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from minivlm.generate import Decodable
from minivlm.processing.inputs import Inputs


class PatchEmbeddings(Protocol):
    """Where a picture becomes one vector per patch, with a learned vector per position."""

    patch_embedding: nn.Conv2d  # the first layer: of a stem, the first of several convolutions
    position_embedding: nn.Embedding  # a class token's row comes before those of the patches


class PatchSize(Protocol):
    """A config that says how a picture is cut."""

    @property
    def patch_size(self) -> int:
        """Pixels from one patch to the next."""


class Tower(Protocol):
    """An image tower over a square grid of patches."""

    @property
    def config(self) -> PatchSize:
        """The tower's own part of the config."""

    @property
    def embeddings(self) -> PatchEmbeddings:
        """The first layer."""


@runtime_checkable
class ConvolutionalTower(Protocol):
    """An image tower without patches, which attends only at its end, to a square grid of places."""

    @property
    def place_size(self) -> int:
        """Pixels of the picture for each place, height = width."""


@runtime_checkable
class MergesPatches(Protocol):
    """An image tower that makes one image token of several patches, for pictures of any shape."""

    @property
    def token_size(self) -> int:
        """Pixels of the picture for each image token, height = width."""

    def token_maps(self, maps: list[Tensor], grid_thw: Tensor) -> list[Tensor]:
        """Attention maps of one picture, as recorded -> one for each layer, among tokens: [1, H, N, N]."""


def place_size(tower: Tower) -> int:
    """Pixels of the picture, on a side, for each of the places that a decoder may look at."""
    return tower.token_size if isinstance(tower, MergesPatches) else tower.config.patch_size


class ContextLength(Protocol):
    """A config that says how much a decoder reads."""

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of picture, prompt and answer together."""


class Decoder(Protocol):
    """The language model that writes the answer."""

    embed_tokens: nn.Embedding

    @property
    def config(self) -> ContextLength:
        """The decoder's own part of the config."""


class AnswerOutput(Protocol):
    """Scores of the next token at every position, and the loss where labels were given."""

    logits: Tensor  # [B, S, V]
    loss: Tensor | None


class Answers(Decodable, Protocol):
    """A model that answers prompts about pictures. Its processor is an `AnswerProcessor`."""

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs have to be."""

    @property
    def vision_tower(self) -> Tower:
        """What looks at the picture."""

    @property
    def language_model(self) -> Decoder:
        """What reads the prompt and writes the answer."""

    @property
    def encode_image(self) -> Callable[..., Tensor]:
        """What the processor's `pixels` returns -> what the decoder gets in place of patches, [B, N, D]."""

    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> AnswerOutput:
        """Logits of every position of a prompt with its answer, and the loss when labels are given."""

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, **inputs: Any) -> Tensor:
        """New tokens only, [B, n], padded after each row's end."""

    def stream(self, input_ids: Tensor, max_new_tokens: int = 64, **inputs: Any) -> Iterator[Tensor]:
        """The same, token by token: [B] as soon as it is known."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""


@runtime_checkable
class SortsMaps(Protocol):
    """A model whose decoder does not look at patches in its own row. Without this method it does."""

    def sort_maps(
        self, encoding: list[Tensor], reading: list[Tensor], pixels: Inputs
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Attention maps [B, H, T, S] by where they come from.

        Args:
            encoding: recorded during `encode_image`.
            reading: recorded while the decoder read.
            pixels: what the processor's `pixels` gave for the picture.

        Returns:
            Those of the tower; those of the decoder among the S tokens of its row; and where each token of
            the first row looks in the picture, [layers, H, S, N], or None where no place is left in it.
        """


@runtime_checkable
class Resamples(Protocol):
    """A model whose image tokens are no patches: each is what one of its queries saw of all of them.

    Of the attention maps that `encode_image` leaves, the last is that of the queries, [B, H, n, N].
    """

    resampler: nn.Module


@runtime_checkable
class HasTwoTowers(Protocol):
    """A model with a second image tower beside `vision_tower`, whose places are others than image tokens."""

    def maps_of_tokens(self, maps: list[Tensor]) -> list[Tensor]:
        """Of the maps recorded during `encode_image`, those of `vision_tower`."""


@runtime_checkable
class HasTiles(Protocol):
    """A model that sees a picture whole and in tiles. Its places are those of the view of the whole.

    Of the attention maps that `encode_image` leaves, the first of the batch is that of this view.
    """

    def places_of_tokens(self, pixels: Inputs) -> Tensor:
        """How much of each image token of one picture is of each place: [n, N], 0 for tokens of no place.

        Args:
            pixels: what the processor's `pixels` gave for the picture.
        """


class Matches(Protocol):
    """A model that says how well a picture and a text fit. Its processor is a `PairProcessor`."""

    has_class_token: bool  # ahead of the patches or places; without one, a pooling head reads the last layer

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs have to be."""

    @property
    def vision_model(self) -> Tower | ConvolutionalTower:
        """The image tower."""

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, C, height, width] -> [B, D], of any length."""

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T] -> [B, D], of any length."""

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """How well each picture fits each text: [n, D], [m, D] -> [n, m]."""

    def probabilities(self, logits_per_image: Tensor) -> Tensor:
        """The same from 0 to 1: [n, m] -> [n, m]."""
