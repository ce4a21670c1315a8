"""Pictures of any size become the patches of transformers, bit for bit; and as in the original program."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from minivlm.errors import InputError
from minivlm.processing.patches import Qwen2VLImageProcessor, cut_into_patches, join_patches, smart_resize

SIDES = [1, 2, 13, 14, 15, 27, 28, 41, 42, 43, 70, 98, 140, 333, 1000, 1296, 4000]
LIMITS = [(56 * 56, 1280 * 28 * 28), (56 * 56, 30 * 28 * 28), (4 * 28 * 28, 16384 * 28 * 28)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("least_pixels", "most_pixels"), LIMITS)
def test_sizes_are_those_of_transformers(least_pixels: int, most_pixels: int):
    compared = 0
    for height in SIDES:
        for width in SIDES:
            if max(height, width) > 200 * min(height, width):
                continue
            found = smart_resize(height, width, 28, least_pixels, most_pixels)
            assert found == reference_resize(height, width, 28, least_pixels, most_pixels)
            assert found[0] % 28 == found[1] % 28 == 0 < min(found)
            compared += 1
    assert compared > 200


def original_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """By the words of the original: nearest multiple, one at least; then floor or ceil of what would fit."""
    nearest = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(nearest) > most:
        scale = math.sqrt(most / (height * width))
        return tuple(max(factor, int(s * scale / factor + 1e-9) * factor) for s in (height, width))  # type: ignore[return-value]
    if math.prod(nearest) < least:
        scale = math.sqrt(least / (height * width))
        return tuple(math.ceil(s * scale / factor - 1e-9) * factor for s in (height, width))  # type: ignore[return-value]
    return nearest[0], nearest[1]


def test_sizes_of_the_original_differ_only_where_a_side_is_half_a_factor():
    least, most = LIMITS[0]
    assert smart_resize(1296, 14, 28, least, most) == (560, 28)
    assert smart_resize(1296, 14, 28, least, most, least=28) == (1288, 28)
    differ = set()
    for height in SIDES:
        for width in SIDES:
            if max(height, width) <= 200 * min(height, width):
                found = smart_resize(height, width, 28, least, most, least=28)
                assert found == original_resize(height, width, 28, least, most)
                if found != smart_resize(height, width, 28, least, most):
                    differ.add(min(height, width))
    assert max(differ) == 14


def test_halves_go_to_the_even_number():
    assert smart_resize(42, 70, 28, 1, 10**6) == (56, 56)


@pytest.mark.parametrize("sides", [(201, 1), (1, 201), (28 * 201, 28)])
def test_a_ribbon_is_refused(sides: tuple[int, int]):
    with pytest.raises(InputError, match="more than 200 times as long"):
        smart_resize(*sides, 28, *LIMITS[0])
    assert smart_resize(200, 1, 28, *LIMITS[0])


@pytest.mark.parametrize("limits", LIMITS[:2])
def test_pixels_are_those_of_transformers_bit_for_bit(limits: tuple[int, int]):
    """Several sizes at once: larger, smaller, sides under a patch, long and high."""
    pictures = [picture(*size, seed) for seed, size in enumerate([(90, 130), (300, 70), (9, 5), (28, 28)])]
    ours, grids = Qwen2VLImageProcessor(min_pixels=limits[0], max_pixels=limits[1]).read(pictures)
    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    theirs = Qwen2VLImageProcessorPil(size=size)(pictures, return_tensors="pt")
    assert torch.equal(ours, theirs["pixel_values"])
    assert torch.equal(grids, theirs["image_grid_thw"])
    assert ours.dtype == torch.float32


def test_other_settings_and_modes():
    kinds = {"patch_size": 8, "temporal_patch_size": 3, "merge_size": 3}
    settings = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4), **kinds}
    pictures = [picture(100, 60).convert(mode) for mode in ("L", "P", "RGB")]
    ours, grids = Qwen2VLImageProcessor(**settings, min_pixels=1, max_pixels=10**5).read(pictures)
    size = {"shortest_edge": 1, "longest_edge": 10**5}
    theirs = Qwen2VLImageProcessorPil(**settings, size=size)(pictures, return_tensors="pt")
    assert torch.equal(ours, theirs["pixel_values"])
    assert torch.equal(grids, theirs["image_grid_thw"])


def test_the_order_of_patches_by_hand():
    """Each patch from its corner in the frames, counted as the drawing in the file counts them."""
    frames = torch.arange(3 * 2 * 8 * 16.0).view(3, 2, 8, 16)  # three frames, two channels, 4 x 8 patches
    patches, grid = cut_into_patches(frames, 2, 2, 2)
    assert grid == [2, 4, 8]
    number = 0
    for step in range(2):
        for block_row in range(2):
            for block_column in range(4):
                for row in range(2):
                    for column in range(2):
                        top, left = 4 * block_row + 2 * row, 4 * block_column + 2 * column
                        shown = frames[[2 * step, min(2 * step + 1, 2)], :, top : top + 2, left : left + 2]
                        assert torch.equal(patches[number], shown.transpose(0, 1).flatten())
                        number += 1
    assert number == len(patches)
    assert torch.equal(join_patches(patches, grid, 2, 2, 2), frames[[0, 1, 2, 2]])


def test_a_picture_is_a_film_of_one_frame():
    frame = torch.randn(1, 3, 8, 8)
    once, grid = cut_into_patches(frame, 2, 2, 2)
    twice, _ = cut_into_patches(frame.expand(2, -1, -1, -1), 2, 2, 2)
    assert torch.equal(once, twice)
    assert grid == [1, 4, 4]


@pytest.mark.parametrize("size", [(90, 130), (300, 70), (9, 5), (1000, 1000)])
def test_tokens_are_counted_before_anything_is_read(size: tuple[int, int]):
    processor = Qwen2VLImageProcessor(max_pixels=30 * 784)
    _, grids = processor.read([picture(*size)])
    assert processor.num_tokens(*size) == int(grids.prod()) // 4 <= 30


def test_the_largest_square():
    processor = Qwen2VLImageProcessor(max_pixels=30 * 784)
    assert processor.image_size == 140
    assert processor.size_of(140, 140) == (140, 140)
    assert processor.fitted == "kept"


# Files

PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def test_a_published_file():
    assert Qwen2VLImageProcessor.from_dict(PUBLISHED) == Qwen2VLImageProcessor(max_pixels=16384 * 784)


@pytest.mark.parametrize(
    "size",
    [{"shortest_edge": 3136, "longest_edge": 50176}, {"min_pixels": 3136, "max_pixels": 50176}],
)
def test_other_names_of_the_limits(size: dict[str, int]):
    assert Qwen2VLImageProcessor.from_dict({"size": size}) == Qwen2VLImageProcessor(max_pixels=50176)


def test_what_we_write_transformers_reads(tmp_path):
    ours = Qwen2VLImageProcessor(min_pixels=3000, max_pixels=90000, patch_size=7, merge_size=3)
    ours.save_pretrained(tmp_path)
    assert Qwen2VLImageProcessor.from_pretrained(tmp_path) == ours
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    shown = picture(90, 130)
    assert torch.equal(theirs([shown], return_tensors="pt")["pixel_values"], ours([shown]))
    theirs.save_pretrained(tmp_path / "again")
    assert Qwen2VLImageProcessor.from_pretrained(tmp_path / "again") == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_pixels": 783}, "room for .* an image token of 28 x 28"),
        ({"max_pixels": 4000, "min_pixels": 5000}, r"room for min_pixels \(5000\)"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": "large"}, "wrong type"),
        ({"do_resize": False}, "do_resize is False"),
        ({"image_processor_type": "SiglipImageProcessor"}, "only 'Qwen2VLImageProcessor'"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        Qwen2VLImageProcessor.from_dict({**PUBLISHED, **changes})


def test_no_pictures():
    with pytest.raises(InputError, match="there are no pictures"):
        Qwen2VLImageProcessor().read([])
