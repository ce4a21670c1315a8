"""Canvases and pixels are those of transformers' PIL processor, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from minivlm.errors import InputError
from minivlm.processing import CanvasImageProcessor
from minivlm.processing.canvases import choose_canvas, size_on_canvas, supported_canvases
from minivlm.processing.crops import CLIPImageProcessor

SIDE = 28
MEAN, STD = CLIPImageProcessor.image_mean, CLIPImageProcessor.image_std
OURS = CanvasImageProcessor(image_size=SIDE, image_mean=MEAN, image_std=STD)
THEIRS = MllamaImageProcessorPil(
    size={"height": SIDE, "width": SIDE}, image_mean=list(MEAN), image_std=list(STD), max_image_tiles=4
)
# Small, long, wide, larger than any canvas, exactly a tile, a line.
SIZES = [
    (10, 10),
    (50, 20),
    (20, 50),
    (20, 80),
    (28, 28),
    (60, 25),
    (25, 90),
    (300, 200),
    (200, 30),
    (57, 56),
    (1, 200),
    (90, 90),
]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("tiles", [1, 2, 4, 6])
def test_canvases_are_those_of_transformers(tiles: int):
    assert supported_canvases(tiles) == get_all_supported_aspect_ratios(tiles)
    random = np.random.default_rng(tiles)
    sizes = random.integers(1, 2000, (1500, 2)).tolist() + [
        [448 * i, 448 * j] for i in (1, 2, 4) for j in (1, 3)
    ]
    for width, height in sizes:
        for side in (224, 560):
            canvas = choose_canvas(width, height, side, tiles)
            rows, columns = get_optimal_tiled_canvas(height, width, tiles, side)
            assert (canvas[0] * side, canvas[1] * side) == (rows, columns)
            size = get_image_size_fit_to_canvas(height, width, rows, columns, side)
            assert size_on_canvas(width, height, side, canvas) == (size[1], size[0])


def test_pixels_are_those_of_transformers():
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    theirs = THEIRS([[image] for image in pictures], return_tensors="pt")
    tiles, ids = OURS.read(pictures)
    assert torch.equal(tiles, theirs["pixel_values"][:, 0])
    assert torch.equal(ids, theirs["aspect_ratio_ids"][:, 0])
    assert len(ids.unique()) == 8
    counts = torch.tensor([0, *(rows * columns for rows, columns in supported_canvases(4))])[ids]
    assert torch.equal(torch.arange(4) < counts[:, None], theirs["aspect_ratio_mask"][:, 0].bool())
    assert torch.equal(OURS(pictures), tiles)


def test_a_picture_is_enlarged_up_to_a_tile_and_lies_top_left():
    """On its black canvas; in another order, tiles would show other parts."""
    canvas = np.asarray(OURS.fit(Image.new("RGB", (60, 20), "white")))
    assert canvas.shape == (28, 3 * 28, 3)
    assert (canvas[:20, :60] == 255).all()
    assert not canvas[20:].any()
    assert not canvas[:, 60:].any()
    assert np.asarray(OURS.fit(Image.new("RGB", (7, 14), "white")))[:, :14].all()  # to a side of 28
    image = picture(56, 56)
    (tiles,), (number,) = OURS.read([image])
    assert supported_canvases(4)[int(number) - 1] == (2, 2)
    upper_right = OURS.read([image.crop((28, 0, 56, 28))])[0][0, 0]
    assert torch.equal(tiles[1], upper_right)


def test_cut_and_join_are_inverse():
    for rows, columns in supported_canvases(4):
        canvases = torch.randn(2, 3, rows * SIDE, columns * SIDE)
        tiles, ids = OURS.cut(canvases)
        assert tiles.shape == (2, 4, 3, SIDE, SIDE)
        assert not tiles[:, rows * columns :].any()
        assert torch.equal(OURS.join(tiles, ids), canvases)
    with pytest.raises(InputError, match="lie on 2 canvases: look at one at a time"):
        OURS.join(torch.zeros(2, 4, 3, SIDE, SIDE), torch.tensor([1, 2]))
    with pytest.raises(InputError, match="84 x 56 pixels is no canvas of at most 4 tiles of 28 x 28"):
        OURS.cut(torch.zeros(1, 3, 2 * SIDE, 3 * SIDE))
    with pytest.raises(InputError, match="30 x 28 pixels is no canvas"):
        OURS.cut(torch.zeros(1, 3, SIDE, 30))


def test_settings(tmp_path: Path):
    THEIRS.save_pretrained(tmp_path / "theirs")
    assert CanvasImageProcessor.from_pretrained(tmp_path / "theirs") == OURS
    OURS.save_pretrained(tmp_path / "ours")
    again = MllamaImageProcessorPil.from_pretrained(tmp_path / "ours")
    image = picture(60, 25)
    assert torch.equal(again([[image]], return_tensors="pt")["pixel_values"][0], OURS([image]))
    assert CanvasImageProcessor.from_dict({}).image_mean == tuple(MllamaImageProcessorPil().image_mean)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_pad": False}, "do_pad is False: only True"),
        ({"max_image_tiles": 0}, "max_image_tiles is 0: expected 1 to 64"),
        ({"size": {"height": 28, "width": 56}}, "expected a square"),
        ({"image_processor_type": "CLIPImageProcessor"}, "only 'MllamaImageProcessor'"),
    ],
)
def test_what_is_refused(values: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        CanvasImageProcessor.from_dict(values)


def test_no_pictures():
    with pytest.raises(InputError, match="there are no pictures"):
        OURS.read([])
