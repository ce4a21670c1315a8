"""The image processors of CLIP and ViT: pixels against the reference, and settings files old and new."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from minivlm.errors import InputError
from minivlm.processing import CLIPImageProcessor, ImageProcessor, ViTImageProcessor

SIZES = [(1, 1), (2, 1), (600, 10), (10, 300), (64, 64), (65, 64), (64, 67), (224, 224), (301, 97), (97, 302)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(processor: Any, image: Image.Image, **settings: Any) -> torch.Tensor:
    pixels: torch.Tensor = processor(image, **settings, return_tensors="pt")["pixel_values"]
    return pixels


def center_crop(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """As in torchvision, with which CLIP was trained: `torchvision.transforms.functional.center_crop`."""
    height, width = pixels.shape[-2:]
    top, left = round((height - side) / 2.0), round((width - side) / 2.0)
    return pixels[..., top : top + side, left : left + side]


@pytest.mark.parametrize("image_size", [15, 64, 224])
@pytest.mark.parametrize("size", SIZES)
def test_clip_equals_the_reference_bit_for_bit(size: tuple[int, int], image_size: int) -> None:
    square = {"height": image_size, "width": image_size}
    reference = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)
    image = noise(*size)
    pixels = CLIPImageProcessor(image_size=image_size)([image])
    assert pixels.shape == (1, 3, image_size, image_size)
    # Resized and normalized by transformers, cropped as by torchvision.
    assert torch.equal(pixels, center_crop(theirs(reference, image, do_center_crop=False), image_size))


def test_transformers_crops_one_pixel_further_left_where_it_does_not_round() -> None:
    reference = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    same = 0
    for width in range(320, 720, 10):  # resized to 32, 33, ..., 71
        image = noise(width, 320)
        ours, other = CLIPImageProcessor(image_size=32)([image]), theirs(reference, image)
        same += torch.equal(ours, other)
        assert torch.equal(ours, other) or torch.equal(ours[..., :-1], other[..., 1:])
    assert same == 30  # of 40


@pytest.mark.parametrize("size", SIZES)
def test_vit_equals_the_reference_bit_for_bit(size: tuple[int, int]) -> None:
    reference = ViTImageProcessorPil(size={"height": 64, "width": 64})
    image = noise(*size)
    assert torch.equal(ViTImageProcessor(image_size=64)([image]), theirs(reference, image))


def test_each_step_of_clip_is_noticed() -> None:
    image = noise(301, 97)
    right = CLIPImageProcessor(image_size=64)
    pixels = right([image])
    for wrong in (
        ImageProcessor(64, None, right.image_mean, right.image_std),  # squeezed, not cropped
        replace(right, resample=2),
        replace(right, image_mean=(0.5, 0.5, 0.5)),
        replace(right, image_std=(0.5, 0.5, 0.5)),
    ):
        assert (wrong([image]) - pixels).abs().max() > 0.01
    # one pixel further left is not the center
    assert not torch.equal(right([image.crop((0, 0, 299, 97))]), pixels)
    assert not torch.equal(ViTImageProcessor(64)([image]), ImageProcessor(64)([image]))  # bilinear, bicubic


def test_the_bilinear_filter_of_siglip_2() -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    reference = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    image = noise(75, 41)
    assert torch.equal(
        ImageProcessor.from_dict({"size": {"height": 32, "width": 32}, "resample": 2})([image]),
        theirs(reference, image),
    )


# As published with openai/clip-vit-base-patch32 and google/vit-base-patch16-224-in21k.
OLD_CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
OLD_VIT = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": 224,
}


def test_old_settings() -> None:
    assert CLIPImageProcessor.from_dict(OLD_CLIP) == CLIPImageProcessor.from_dict({}) == CLIPImageProcessor()
    assert ViTImageProcessor.from_dict(OLD_VIT) == ViTImageProcessor.from_dict({}) == ViTImageProcessor()


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (CLIPImageProcessor(image_size=30), CLIPImageProcessorPil),
        (ViTImageProcessor(image_size=30, image_mean=(0.1, 0.2, 0.3)), ViTImageProcessorPil),
    ],
)
def test_settings_files_in_both_directions(ours: ImageProcessor, reference: Any, tmp_path: Path) -> None:
    image = noise(50, 41)
    ours.save_pretrained(tmp_path / "ours")
    assert type(ours).from_pretrained(tmp_path / "ours") == ours
    loaded = reference.from_pretrained(tmp_path / "ours")
    assert torch.equal(theirs(loaded, image), ours([image]))
    loaded.save_pretrained(tmp_path / "theirs")
    assert type(ours).from_pretrained(tmp_path / "theirs") == ours


@pytest.mark.parametrize(
    ("processor", "values", "message"),
    [
        (CLIPImageProcessor, {"do_center_crop": False}, "do_center_crop is False: only True"),
        (CLIPImageProcessor, {"image_processor_type": "ViTImageProcessor"}, "only 'CLIPImageProcessor'"),
        (CLIPImageProcessor, {"size": 256, "crop_size": 224}, "size is 256 and crop_size 224"),
        (CLIPImageProcessor, {"size": {"height": 224, "width": 224}}, "expected the same number"),
        (CLIPImageProcessor, {"crop_size": {"height": 224, "width": 200}}, "expected the same number"),
        (CLIPImageProcessor, {"resample": 1}, "resample is 1"),
        (ViTImageProcessor, {"do_center_crop": True}, "do_center_crop is True: only False"),
        (ViTImageProcessor, {"size": {"shortest_edge": 224}}, "expected a square"),
    ],
)
def test_refused_settings(processor: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor.from_dict(values)


def test_a_picture_too_narrow_to_be_cut() -> None:
    with pytest.raises(InputError, match="2 x 20000 pixels, and its long side would become 2240000"):
        CLIPImageProcessor()([Image.new("L", (2, 20000))])
