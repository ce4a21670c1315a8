"""Masks as words: 16 `<seg>` tokens after a box describe the shape inside it.

`<loc0256><loc0128><loc0767><loc0895><seg017>...<seg101> cat` is how PaliGemma
(https://arxiv.org/abs/2407.07726) segments a cat. The box alone gives position and size. The mask fills the
box, resized to 64 x 64 whatever its aspect ratio, and codebook.py turns it into 16 words. Conventions:
big_vision, `pp/proj/paligemma/segmentation.py` for encoding and
`evaluators/proj/paligemma/transfers/segmentation.py` for decoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.processing.boxes import NUM_BINS, OBJECT, Box, box_to_tokens, check_size, text_to_boxes
from minivlm.processing.codebook import (
    CODES_PER_MASK,
    MASK_SIDE,
    NUM_CODES,
    SHIPPED_MASKS,
    MaskCodebook,
    MaskCodebookConfig,
    load_codebook,
)

__all__ = [
    "CODES_PER_MASK",
    "MASK_SIDE",
    "NUM_CODES",
    "SHIPPED_MASKS",
    "Mask",
    "MaskCodebook",
    "MaskCodebookConfig",
    "codes_to_text",
    "crop_mask",
    "load_codebook",
    "mask_iou",
    "mask_to_tokens",
    "text_to_masks",
]

_SEG = r"<seg([0-9]{3})>"


class Mask(NamedTuple):
    """The shape of a named thing: its box, and a bool array [height, width], True where the thing is."""

    box: Box
    mask: np.ndarray


def crop_mask(mask: np.ndarray, box_xyxy: Sequence[float] | Box) -> np.ndarray:
    """A mask [height, width], bools or 0 to 255, cropped to a box in pixels: values 0 to 1, [64, 64].

    The edges are rounded to whole pixels, halves to even, with a pixel at least between them, and the crop is
    resized with the bilinear filter, which averages when it shrinks.

    Raises InputError: a mask with other values or axes, or one that is empty inside the box; otherwise as
    `box_to_tokens`.
    """
    if mask.ndim != 2:
        raise InputError(f"the mask is {list(mask.shape)}: expected [height, width]")
    if mask.dtype != np.bool_:
        low, high = mask.min(initial=0), mask.max(initial=0)
        if not (low == 0 and (high == 0 or 1 < high <= 255)):  # 0 and 1 as numbers would be almost empty
            raise InputError(
                f"the mask has values from {low} to {high}: expected bools, or 0 to 255; pass `mask > 0`"
            )
    box_to_tokens(box_xyxy, mask.shape[1], mask.shape[0])  # for its checks
    x0, y0, x1, y1 = (max(0, round(float(edge))) for edge in box_xyxy[:4])
    x0, y0 = min(x0, mask.shape[1] - 1), min(y0, mask.shape[0] - 1)
    part = mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].astype(np.float32)
    if not part.any():
        raise InputError(
            f"the mask is empty inside the box from {x0}, {y0} to {x1}, {y1}: a thing without a pixel has no "
            "shape. Leave it out, or choose the box around its mask"
        )
    resized = np.array(Image.fromarray(part).resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR))
    return resized if mask.dtype == np.bool_ else resized / np.float32(255)


def codes_to_text(codes: Iterable[int] | Tensor | np.ndarray) -> str:
    """`<seg017><seg003>...` for the codes of one mask. Raises InputError: not 16, or one not in 0 to 127."""
    numbers = [int(code) for code in codes]
    if len(numbers) != CODES_PER_MASK or not 0 <= min(numbers) <= max(numbers) < NUM_CODES:
        raise InputError(f"the codes are {numbers}: expected {CODES_PER_MASK} from 0 to {NUM_CODES - 1}")
    return "".join(f"<seg{number:03}>" for number in numbers)


@torch.no_grad()
def mask_to_tokens(
    mask: np.ndarray, box_xyxy: Sequence[float] | Box, codebook: MaskCodebook | None = None
) -> str:
    """Four `<loc>` and sixteen `<seg>` tokens for a mask [height, width] in a box in pixels.

    What is written can be read back: the box is widened where `text_to_masks` would find no pixel in it.

    codebook: None means the shipped one.
    Raises InputError: as `box_to_tokens` and `crop_mask`.
    """
    inside = torch.from_numpy(crop_mask(mask, box_xyxy))
    codes = (codebook or load_codebook()).encode(inside[None])
    height, width = mask.shape
    (box,) = text_to_boxes(box_to_tokens(box_xyxy, width, height), width, height)
    right, bottom = _reach(box.x0, box.x1, width), _reach(box.y0, box.y1, height)
    return box_to_tokens((box.x0, box.y0, right, bottom), width, height) + codes_to_text(codes[0])


def _reach(low: float, high: float, side: int) -> float:
    """`high`, or so much more that a pixel lies between the edges once both are written and truncated."""
    # Written, an edge moves by up to half a bin.
    return high if int(high) > int(low) else int(low) + 1 + 0.75 * side / (NUM_BINS - 1)


@torch.no_grad()
def text_to_masks(text: str, width: int, height: int, codebook: MaskCodebook | None = None) -> list[Mask]:
    """The masks in an answer about a width x height picture. Any text is accepted.

    As in `text_to_boxes`, a model may write malformed text. A part counts only if its box counts there and
    still contains a pixel after its edges are truncated to integers, and if exactly 16 `<seg>` tokens follow
    it. Everything else is skipped without an error.

    codebook: None means the shipped one.
    Raises InputError: a picture without area.
    """
    check_size(width, height)
    boxes, codes = [], []
    for part in OBJECT.finditer(text):
        numbers = [int(digits) for digits in re.findall(_SEG, part[0])]
        for box in text_to_boxes(part[0], width, height):
            x0, y0, x1, y1 = (int(edge) for edge in box[:4])
            if len(numbers) == CODES_PER_MASK and max(numbers) < NUM_CODES and x0 < x1 and y0 < y1:
                boxes.append(box)
                codes.append(numbers)
    if not boxes:
        return []
    masks = []
    drawn = (codebook or load_codebook()).decode(torch.tensor(codes)).numpy()
    for box, values in zip(boxes, drawn, strict=True):
        x0, y0, x1, y1 = (int(edge) for edge in box[:4])
        mask = np.zeros((height, width), dtype=np.bool_)
        resized = Image.fromarray(values).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        mask[y0:y1, x0:x1] = np.asarray(resized) > 0
        masks.append(Mask(box, mask))
    return masks


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Pixels in both masks over pixels in either; 0 if both are empty. Raises InputError: shapes differ."""
    if a.shape != b.shape:
        raise InputError(f"the masks are {list(a.shape)} and {list(b.shape)}: expected the same shape")
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 0.0
