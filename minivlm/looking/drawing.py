"""Boxes and masks drawn on pictures.

In black with a white edge, which is seen on any ground. Colors would contradict the names: a "cyan star" in
a red frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from minivlm.errors import InputError
from minivlm.processing import Box, Mask

LINE, EDGE = "black", "white"
SHORTEST_SIDE = 320  # pixels; smaller pictures are enlarged, so that labels are readable


def draw_boxes(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture, enlarged if small, with boxes (in pixels of `picture`) and their names."""
    canvas = _enlarged(picture)
    _add_boxes(canvas, boxes, canvas.width / picture.width, canvas.height / picture.height)
    return canvas


def draw_masks(picture: Image.Image, masks: Sequence[Mask]) -> Image.Image:
    """Like `draw_boxes`, with the shape of each thing tinted and outlined inside its box.

    Raises InputError: a mask is not the size of the picture.
    """
    canvas = _enlarged(picture)
    width = _line_width(canvas)
    for _, mask in masks:
        if mask.shape != (picture.height, picture.width):
            size = [picture.height, picture.width]
            raise InputError(f"the mask is {list(mask.shape)}: expected {size}, as large as the picture")
        inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.NEAREST)
        core = inside.filter(ImageFilter.MinFilter(2 * width + 1))
        canvas.paste(EDGE, mask=inside.point(lambda value: 0.4 * value))  # darker, orange would be brown
        canvas.paste(LINE, mask=ImageChops.subtract(inside, core))
        canvas.paste(EDGE, mask=ImageChops.subtract(core, core.filter(ImageFilter.MinFilter(3))))
    _add_boxes(
        canvas, [box for box, _ in masks], canvas.width / picture.width, canvas.height / picture.height
    )
    return canvas


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the drawing of a picture of this size: small ones are enlarged."""
    scale = max(1.0, SHORTEST_SIDE / min(width, height))
    # A strip a few pixels high would become enormous.
    scale = min(scale, max(1.0, 4096 / max(width, height)))
    return round(width * scale), round(height * scale)


def _enlarged(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize(drawn_size(*picture.size), Image.Resampling.BICUBIC)


def _line_width(canvas: Image.Image) -> int:
    return max(2, min(canvas.size) // 160)


def _add_boxes(canvas: Image.Image, boxes: Sequence[Box], across: float, down: float) -> None:
    """Draw boxes and their names; a pixel of theirs is `across` pixels of the canvas wide and `down` high."""
    size = canvas.size
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(12, min(size) // 24))
    width = _line_width(canvas)
    for box in boxes:
        x0, y0, x1, y1 = (
            round(value * scale) for value, scale in zip(box[:4], 2 * (across, down), strict=True)
        )
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=EDGE, width=width + 2)
        pen.rectangle((x0, y0, x1, y1), outline=LINE, width=width)
        if box.name:
            _, _, long, high = pen.textbbox((0, 0), box.name, font=font)
            left = max(0, min(x0, size[0] - int(long) - 6))
            top = y0 - high - 4 if y0 > high + 4 else min(y1 + 2, size[1] - high - 4)
            pen.rectangle((left, top, left + long + 6, top + high + 4), fill=LINE, outline=EDGE)
            pen.text((left + 3, top + 1), box.name, fill=EDGE, font=font)
