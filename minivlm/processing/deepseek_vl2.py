"""DeepSeek-VL2's processor (https://arxiv.org/abs/2412.10302): pictures and chats in, a batch out.

What differs from DeepSeek-VL's: a picture is cut into tiles, and takes as many tokens as their grid asks for,
so a row is finished only once its pictures are known. More than two pictures in a row are not cut, to spare
its context: each is seen whole, twice (deepseek_vl2_tiles.py). The folder has one file for all of it,
processor_config.json, and no template of a chat (deepseek_vl2_chat.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.chat import Turn
from minivlm.processing.deepseek_vl2_chat import encode_chat
from minivlm.processing.deepseek_vl2_tiles import (
    Size,
    TiledImageProcessor,
    choose_candidate,
    join_tiles,
    num_tokens,
    place_in,
)
from minivlm.processing.deepseek_vl2_tokens import PAD, DeepseekVL2Tokenizer
from minivlm.processing.images import open_header
from minivlm.processing.inputs import Inputs, Picture, Row
from minivlm.processing.llava import SETTINGS
from minivlm.processing.rows import Pictures, RowProcessor, open_rows
from minivlm.processing.tokens import IMAGE, settings_in
from minivlm.processing.video import Video

MOST_CUT = 2  # pictures of a row that are cut into tiles
FORM: dict[str, Any] = {  # what the file may say in one way only
    "processor_class": DeepseekVL2Tokenizer.processor_class,
    "normalize": True,
    "sft_format": "deepseek",
    "image_token": IMAGE,
    "pad_token": PAD,
}
ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # of EXIF, and its values for pictures that lie on a side


class DeepseekVL2Processor(RowProcessor):
    """A tokenizer, an image processor, and how patches become tokens.

    Args:
        patch_size: pixels, of the tower.
        downsample_ratio: patches, on a side, that become one token.
    """

    tokenizer: DeepseekVL2Tokenizer
    image_processor: TiledImageProcessor

    def __init__(
        self,
        tokenizer: DeepseekVL2Tokenizer,
        image_processor: TiledImageProcessor,
        patch_size: int = 14,
        downsample_ratio: int = 2,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio

    @property
    def tokens_in_a_row(self) -> int:
        """Image tokens in a row of a view, and in a column."""
        return -(-(self.image_processor.image_size // self.patch_size) // self.downsample_ratio)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load tokenizer.json and processor_config.json.

        Raises InputError: a file is missing, unreadable or unsupported.
        """
        path = Path(folder) / SETTINGS
        values = settings_in(path)
        for name, supported in FORM.items():
            if values.get(name, supported) != supported:
                raise InputError(
                    f"{path} has {name} = {values[name]!r}; only {supported!r} is supported here"
                )
        patch, ratio = values.get("patch_size"), values.get("downsample_ratio")
        if not isinstance(patch, int) or not isinstance(ratio, int) or min(patch, ratio) < 1:
            raise InputError(
                f"{path} has patch_size and downsample_ratio = {[patch, ratio]}: expected two numbers, such "
                "as 14 and 2"
            )
        try:
            pictures = TiledImageProcessor.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return cls(DeepseekVL2Tokenizer.from_pretrained(folder), pictures, patch, ratio)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder, as the original program reads them."""
        folder, pictures = Path(folder), self.image_processor
        self.tokenizer.save_pretrained(folder)
        settings: dict[str, Any] = {
            **FORM,
            "candidate_resolutions": [list(size) for size in pictures.candidate_resolutions],
            "patch_size": self.patch_size,
            "downsample_ratio": self.downsample_ratio,
            "image_mean": list(pictures.image_mean),
            "image_std": list(pictures.image_std),
            "add_special_token": False,
            "mask_prompt": True,
            "ignore_id": -100,
        }
        with write_aside(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """One question with pictures before it, a placeholder for each, and its answer. See `make_room`."""
        return encode_chat(self.tokenizer, [(prompt, answer)], pictures)

    def chat(
        self,
        images: Picture | Sequence[Pictures] | None,
        chats: Sequence[Sequence[Turn]],
        padding_side: str = "left",
        max_length: int | None = None,
        *,
        tags: bool = False,
    ) -> Inputs:
        """A batch of chats of several turns, see `encode_chat`; otherwise as a call.

        >>> processor.chat([[first, second]], [[("what differs?", "the color"), ("which color?", None)]])

        Labels are there if every chat ends with an answer; then all its answers have a loss.
        """
        pictures = open_rows(images, len(chats))
        rows = [
            encode_chat(self.tokenizer, turns, len(of_row), tags=tags)
            for turns, of_row in zip(chats, pictures, strict=True)
        ]
        return self.batch(rows, pictures, padding_side, max_length)

    def batch(
        self,
        rows: Sequence[Row],
        pictures: Sequence[Sequence[Image.Image | Video]],
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> Inputs:
        """As in the base class. Where a row has more than two pictures, each is made to fit into one tile."""
        fitted = [
            [self.image_processor.fit(cast(Image.Image, picture)) for picture in of_row]
            if len(of_row) > MOST_CUT
            else of_row
            for of_row in pictures
        ]
        return super().batch(rows, fitted, padding_side, max_length)

    def make_room(self, row: Row, pictures: Sequence[Picture | Video]) -> Row:
        """A row with as many placeholders as its pictures take.

        Raises InputError: another number of them than the row has places; as `grid_of`.
        """
        image_id, waiting = self.tokenizer.image_id, list(pictures)
        if row.ids.count(image_id) != len(waiting):
            raise InputError(
                f"a row has places for {row.ids.count(image_id)} pictures, and {len(waiting)} are given: "
                "give one for each place"
            )
        ids: list[int] = []
        written: list[bool] = []
        for token, is_answer in zip(row.ids, row.written, strict=True):
            times = 1
            if token == image_id:
                grid = self.grid_of(cast(Picture, waiting.pop(0))) if len(pictures) <= MOST_CUT else (1, 1)
                times = num_tokens(*grid, self.tokens_in_a_row)
            ids += [token] * times
            written += [is_answer] * times
        return Row(ids, written)

    def grid_of(self, picture: Picture) -> tuple[int, int]:
        """Columns and rows of a picture's tiles; of a file, only the header is read.

        Raises InputError: as `choose_candidate`.
        """
        if isinstance(picture, str | Path):
            with open_header(picture) as opened:
                size = _upright(opened)
        else:
            size = _upright(picture)
        reads = self.image_processor
        width, height = choose_candidate(*size, reads.candidate_resolutions)
        return width // reads.image_size, height // reads.image_size

    def pixels(self, pictures: Sequence[Image.Image | Video]) -> Inputs:
        """What the tower reads of the M pictures of a batch, in order.

        Returns:
          pixel_values         [V, C, side, side], of each picture the whole, then its tiles row by row
          images_spatial_crop  [M, 2], columns and rows of tiles
          image_sizes          [M, 2], width and height: for those who ask where in a picture a token lies
        """
        views, grids, sizes = self.image_processor.read(cast(Sequence[Image.Image], pictures))
        return {"pixel_values": views, "images_spatial_crop": grids, "image_sizes": sizes}

    def to_pictures(self, inputs: Inputs) -> Tensor:
        """The views of the whole: [M, C, side, side]."""
        views = 1 + inputs["images_spatial_crop"].prod(dim=1)
        return inputs["pixel_values"][views.cumsum(dim=0) - views]

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """Versions of the view of the whole [M, C, side, side] -> what `pixels` returns.

        Where a version differs from the view of `inputs`, the tiles show the same color: what is hidden in
        one is hidden in all.
        """
        tiles, side = inputs["pixel_values"], self.image_processor.image_size
        columns, rows = inputs["images_spatial_crop"][0].tolist()
        width, height = inputs["image_sizes"][0].tolist()
        whole = (side, side)
        canvas = join_tiles(tiles[1:].permute(0, 2, 3, 1), columns, rows).permute(
            2, 0, 1
        )  # [C, height, width]
        across, down = (
            places.to(pictures.device)
            for places in same_places(width, height, (columns * side, rows * side), whole)
        )
        hidden = (pictures != tiles[:1]).any(dim=1, keepdim=True)  # [M, 1, side, side]
        hidden, shown = (
            part[:, :, down.clamp(min=0)][..., across.clamp(min=0)] for part in (hidden, pictures)
        )
        hidden = hidden & (down >= 0)[:, None] & (across >= 0)  # bars are no part of the picture
        canvas = torch.where(hidden, shown, canvas)  # [M, C, height, width]
        cut = canvas.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [M, tiles, C, side, side]
        return {
            "pixel_values": torch.cat([pictures[:, None], cut], dim=1).flatten(0, 1),
            "images_spatial_crop": inputs["images_spatial_crop"].expand(len(pictures), -1),
            "image_sizes": inputs["image_sizes"].expand(len(pictures), -1),
        }


def same_places(width: int, height: int, size: Size, other: Size) -> tuple[Tensor, Tensor]:
    """For each column and each row of pixels of a view, the one of another view that shows the same.

    Args:
        width, height: of the picture that both views show in its shape.
        size, other: widths and heights of the views.

    Returns:
        [size[0]] and [size[1]]; -1 for bars.
    """
    here, there = place_in(width, height, size), place_in(width, height, other)
    found = []
    for axis in (0, 1):
        start, length = here[axis], here[axis + 2]
        share = (torch.arange(size[axis]) + 0.5 - start) / length
        places = (there[axis] + share * there[axis + 2]).floor().long().clamp(0, other[axis] - 1)
        found.append(places.where((share > 0) & (share < 1), -1))
    return found[0], found[1]


def _upright(picture: Image.Image) -> Size:
    """The size of a picture once it is turned as its camera noted."""
    width, height = picture.size
    try:
        turned = picture.getexif().get(ORIENTATION) in TURNED
    except Exception:  # a damaged note, which turns nothing
        turned = False
    return (height, width) if turned else (width, height)
