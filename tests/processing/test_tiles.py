"""LLaVA-NeXT's tiles: pixels, grids and the order of tokens against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoders import VISION
from llama_backends import llama_backend
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, PreTrainedTokenizerFast
from transformers import LlavaNextForConditionalGeneration as ReferenceModel
from transformers import LlavaNextProcessor as Reference
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from minivlm.errors import InputError
from minivlm.processing import LlavaImageProcessor
from minivlm.processing.tiles import (
    GRIDS,
    arrange_tokens,
    choose_grid,
    cut_into_tiles,
    num_tokens,
    resize_and_pad,
    without_padding,
)

SIDE, N = 28, 2  # pixels and tokens along a tile
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in GRIDS]
SIZES = [
    (28, 28),
    (56, 28),
    (28, 57),
    (300, 97),
    (97, 301),
    (30, 200),
    (500, 499),
    (9, 5),
    (61, 40),
    (84, 29),
]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference() -> LlavaNextImageProcessorPil:
    side = {"height": SIDE, "width": SIDE}
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=side, image_grid_pinpoints=PINPOINTS
    )


def test_the_grids_are_those_of_the_published_model() -> None:
    published = LlavaNextImageProcessorPil().image_grid_pinpoints
    assert [[rows * 336, columns * 336] for rows, columns in GRIDS] == published


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_reference_bit_for_bit(size: tuple[int, int]) -> None:
    tiles = cut_into_tiles(noise(*size), LlavaImageProcessor(image_size=SIDE))
    expected = reference()(noise(*size), return_tensors="pt")
    assert torch.equal(tiles.pixel_values, expected["pixel_values"][0])
    assert [tiles.height, tiles.width] == expected["image_sizes"][0].tolist()
    assert len(tiles.pixel_values) == 1 + tiles.grid[0] * tiles.grid[1]


def test_every_step_is_noticed() -> None:
    image, settings = noise(61, 40), LlavaImageProcessor(image_size=SIDE)
    right = cut_into_tiles(image, settings).pixel_values
    squeezed = image.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)  # not padded
    assert not torch.equal(cut_into_tiles(squeezed, settings).pixel_values[1:], right[1:])
    assert not torch.equal(right[[0, 1, 3, 2, 4]], right)  # column by column


def test_grids_equal_the_reference() -> None:
    rng = np.random.default_rng(0)
    chosen = set()
    for width, height in np.exp(rng.uniform(np.log(10), np.log(3000), (3000, 2))).astype(int).tolist():
        rows, columns = choose_grid(width, height, 336)
        pinpoints = [[r * 336, c * 336] for r, c in GRIDS]
        assert [rows * 336, columns * 336] == list(select_best_resolution((height, width), pinpoints))
        chosen.add((rows, columns))
    assert chosen == set(GRIDS)


def model() -> ReferenceModel:
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**text, num_attention_heads=2),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=8,
    )
    return ReferenceModel(config)


@pytest.mark.parametrize("size", SIZES)
def test_tokens_equal_the_reference(size: tuple[int, int]) -> None:
    grid = choose_grid(*size, SIDE)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1 + grid[0] * grid[1], N * N, 8, generator=generator)
    newline = torch.randn(8, generator=generator)
    sizes = torch.tensor([[size[1], size[0]]])
    expected, lengths = model().pack_image_features([features], sizes, "default", newline)
    ours = arrange_tokens(features, newline, grid, *size)
    assert torch.equal(ours, expected[0])
    assert len(ours) == int(lengths[0]) == num_tokens(*size, grid, N)
    if size == (500, 499):  # with the tiles in another order
        assert not torch.equal(
            arrange_tokens(features[[0, 2, 1, *range(3, len(features))]], newline, grid, *size), ours
        )


def test_numbers_of_tokens_equal_the_reference() -> None:
    """With the published tiles of 24 x 24 tokens. A large square has most: 576, then 48 rows of 48 + 1."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama_backend())
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor: Any = Reference(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(20), np.log(3000), (2000, 2))).astype(int).tolist()
    theirs = processor._get_num_multimodal_tokens([[height, width] for width, height in sizes])
    ours = [num_tokens(width, height, choose_grid(width, height, 336), 24) for width, height in sizes]
    assert ours == list(theirs["num_image_tokens"])
    assert num_tokens(672, 672, (2, 2), 24) == 576 + 48 * 49 == 2928


@pytest.mark.parametrize(("width", "height"), [(352, 110), (99, 88), (110, 352)])
def test_the_original_does_not_round(width: int, height: int) -> None:
    """Where rounding errors lead just below a whole number, it cuts off one more on each side."""
    grid = choose_grid(width, height, 336)
    rows, columns = (24 * count for count in grid)
    wide = width / height > columns / rows
    fits = height * (columns / width) if wide else width * (rows / height)
    assert 0 < round(fits) - fits < 1e-13
    margin = ((rows if wide else columns) - int(fits)) // 2
    kept = without_padding(rows, columns, width, height)[0 if wide else 1]
    assert (kept.start, kept.stop) == (margin - 1, (rows if wide else columns) - margin + 1)


@pytest.mark.parametrize("tiles", [1, 4, 6])
def test_a_wrong_number_of_tiles(tiles: int) -> None:
    message = f"got features of {tiles} tiles, expected 5: the base view and 2 x 2 tiles"
    with pytest.raises(ValueError, match=message):
        arrange_tokens(torch.zeros(tiles, 4, 8), torch.zeros(8), (2, 2), 50, 50)


def test_a_class_token_among_the_features() -> None:
    with pytest.raises(ValueError, match="a tile has 5 tokens, expected a square without a class token"):
        arrange_tokens(torch.zeros(5, 5, 8), torch.zeros(8), (2, 2), 50, 50)


def test_a_picture_too_narrow() -> None:
    with pytest.raises(InputError, match="has 2000 x 1 pixels, too narrow for any grid of tiles: crop it"):
        cut_into_tiles(Image.new("RGB", (2000, 1)), LlavaImageProcessor(image_size=SIDE))


def test_the_padding_is_black_and_around_the_picture() -> None:
    padded = np.asarray(resize_and_pad(Image.new("RGB", (4, 3), "white"), 8, 9, Image.Resampling.BICUBIC))
    assert padded.shape == (9, 8, 3)
    assert (padded[[0, 7, 8]] == 0).all()
    assert (padded[1:7] == 255).all()


def test_a_turned_picture_is_upright_first() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, upright = noise(61, 40), noise(61, 40).rotate(-90, expand=True)
    turned.info["exif"] = exif.tobytes()
    settings = LlavaImageProcessor(image_size=SIDE)
    ours, expected = cut_into_tiles(turned, settings), cut_into_tiles(upright, settings)
    assert ours[1:] == expected[1:]
    assert torch.equal(ours.pixel_values, expected.pixel_values)
