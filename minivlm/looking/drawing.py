"""Boxes and masks drawn on pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from minivlm.errors import InputError
from minivlm.processing import Box, Mask

BOX_COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
SHORTEST_SIDE = 320  # pixels; smaller pictures are enlarged, so that labels are readable


def draw_boxes(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture, enlarged if small, with boxes (in pixels of `picture`) and their names."""
    canvas, scale = _enlarged(picture)
    _add_boxes(canvas, boxes, scale)
    return canvas


def draw_masks(picture: Image.Image, masks: Sequence[Mask]) -> Image.Image:
    """Like `draw_boxes`, with the shape of each thing tinted and outlined inside its box.

    Raises InputError: a mask is not the size of the picture.
    """
    canvas, scale = _enlarged(picture)
    for number, (_, mask) in enumerate(masks):
        if mask.shape != (picture.height, picture.width):
            size = [picture.height, picture.width]
            raise InputError(f"the mask is {list(mask.shape)}: expected {size}, as large as the picture")
        tint = Image.new("RGB", canvas.size, BOX_COLORS[number % len(BOX_COLORS)])
        inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.NEAREST)
        core = inside.filter(ImageFilter.MinFilter(2 * _line_width(canvas) + 1))
        canvas.paste(tint, mask=inside.point(lambda value: 0.4 * value))
        canvas.paste(tint, mask=ImageChops.subtract(inside, core))
    _add_boxes(canvas, [box for box, _ in masks], scale)
    return canvas


def _enlarged(picture: Image.Image) -> tuple[Image.Image, float]:
    """An RGB copy of the picture, enlarged if small, and the scale."""
    scale = max(1.0, SHORTEST_SIDE / min(picture.size))
    # A strip a few pixels high would become enormous.
    scale = min(scale, max(1.0, 4096 / max(picture.size)))
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), scale


def _line_width(canvas: Image.Image) -> int:
    return max(2, min(canvas.size) // 160)


def _add_boxes(canvas: Image.Image, boxes: Sequence[Box], scale: float) -> None:
    """Draw boxes, in pixels of a picture `scale` times smaller, and their names on the canvas."""
    size = canvas.size
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(12, min(size) // 24))
    for number, box in enumerate(boxes):
        color = BOX_COLORS[number % len(BOX_COLORS)]
        x0, y0, x1, y1 = (round(value * scale) for value in box[:4])
        pen.rectangle((x0, y0, x1, y1), outline=color, width=_line_width(canvas))
        if box.name:
            _, _, width, height = pen.textbbox((0, 0), box.name, font=font)
            left = max(0, min(x0, size[0] - int(width) - 6))
            top = y0 - height - 4 if y0 > height + 4 else min(y1 + 2, size[1] - height - 4)
            pen.rectangle((left, top, left + width + 6, top + height + 4), fill=color)
            pen.text((left + 3, top + 1), box.name, fill="white", font=font)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Several pictures as one, left to right on white, tops aligned."""
    gap = 8
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet
