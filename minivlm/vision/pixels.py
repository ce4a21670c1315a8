"""The check that every image tower runs on its input."""

from __future__ import annotations

from torch import Tensor


def check_pixels(pixel_values: Tensor, num_channels: int, image_size: int) -> None:
    """Raise ValueError unless the pictures are [B, num_channels, image_size, image_size]."""
    expected = (num_channels, image_size, image_size)
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}, expected [B, {str(expected)[1:-1]}]: "
            "prepare the pictures with the processor from the model's folder"
        )
