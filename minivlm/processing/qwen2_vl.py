"""Qwen2-VL's processor (https://arxiv.org/abs/2409.12191): pictures, videos and chats in, a batch out.

What differs from LLaVA's: a picture takes as many tokens as its size asks for, so a row is finished only once
its pictures are known; one row may hold several of them, of several sizes, and videos; and pixels come as
patches of all pictures in one tensor, with a grid for each. Qwen2.5-VL has the same processor, and also reads
how many seconds lie between two steps of a video.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.chat import Turn
from minivlm.processing.images import open_header
from minivlm.processing.inputs import Inputs, Picture, Row
from minivlm.processing.llava import SETTINGS, TEMPLATE, template_in
from minivlm.processing.patches import Qwen2VLImageProcessor, cut_into_patches, join_patches
from minivlm.processing.qwen2_chat import SYSTEM, chat_template, encode_chat, system_of
from minivlm.processing.qwen2_tokens import Qwen2Tokenizer
from minivlm.processing.rows import Pictures, RowProcessor, open_rows
from minivlm.processing.video import Video
from minivlm.processing.video_budget import VideoBudget


class Qwen2VLProcessor(RowProcessor):
    """A tokenizer, an image processor, and how much of a video is read.

    Args:
        system: what chats begin with; may be empty.
    """

    processor_class: ClassVar[str] = "Qwen2VLProcessor"  # in transformers
    tokenizer: Qwen2Tokenizer
    image_processor: Qwen2VLImageProcessor

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        image_processor: Qwen2VLImageProcessor,
        video_budget: VideoBudget | None = None,
        system: str = SYSTEM,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.video_budget = video_budget or VideoBudget()
        self.system = system

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load tokenizer.json, preprocessor_config.json, and video_preprocessor_config.json if there is one.

        Chats begin as the folder's template says; without a template, as the published ones do.

        Raises InputError: a file is missing, unreadable or unsupported.
        """
        template = template_in(Path(folder))
        return cls(
            Qwen2Tokenizer.from_pretrained(folder),
            Qwen2VLImageProcessor.from_pretrained(folder),
            VideoBudget.from_pretrained(folder),
            SYSTEM if template is None else system_of(template),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's files into a folder; `transformers` reads them too."""
        folder, pictures = Path(folder), self.image_processor
        self.tokenizer.save_pretrained(folder)
        pictures.save_pretrained(folder)
        sizes = {
            name: getattr(pictures, name) for name in ("patch_size", "temporal_patch_size", "merge_size")
        }
        self.video_budget.save_pretrained(folder, sizes)
        with write_aside(folder / SETTINGS) as temporary:
            temporary.write_text(
                json.dumps({"processor_class": self.processor_class}) + "\n", encoding="utf-8"
            )
        with write_aside(folder / TEMPLATE) as temporary:
            temporary.write_text(chat_template(self.system), encoding="utf-8")

    def encode_row(self, prompt: str, answer: str | None = None, pictures: int = 1) -> Row:
        """One question with pictures before it, a placeholder for each, and its answer. See `make_room`."""
        return encode_chat(self.tokenizer, [(prompt, answer)], pictures, system=self.system)

    def chat(
        self,
        images: Picture | Video | Sequence[Pictures] | None,
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
        shown = open_rows(images, len(chats), videos=True)
        rows = [
            encode_chat(self.tokenizer, turns, len(of_row), tags=tags, system=self.system)
            for turns, of_row in zip(chats, shown, strict=True)
        ]
        return self.batch(rows, shown, padding_side, max_length)

    def make_room(self, row: Row, pictures: Sequence[Picture | Video]) -> Row:
        """A row with as many placeholders as its pictures and videos take.

        Raises InputError: another number of them than the row has places; as `num_tokens`.
        """
        tokenizer, waiting = self.tokenizer, list(pictures)
        if row.ids.count(tokenizer.image_id) != len(waiting):
            raise InputError(
                f"a row has places for {row.ids.count(tokenizer.image_id)} pictures, and {len(waiting)} are "
                "given: give one for each place"
            )
        ids: list[int] = []
        written: list[bool] = []
        for token, is_answer in zip(row.ids, row.written, strict=True):
            times = 1
            if token == tokenizer.image_id:
                picture = waiting.pop(0)
                token = tokenizer.video_id if isinstance(picture, Video) else tokenizer.image_id
                times = self.num_tokens(picture)
            ids += [token] * times
            written += [is_answer] * times
        return Row(ids, written)

    def num_tokens(self, picture: Picture | Video) -> int:
        """Image tokens of a picture or a video; of a file, only the header is read.

        Raises InputError: as `smart_resize` and `VideoBudget.choose`.
        """
        pictures = self.image_processor
        if isinstance(picture, Video):
            return self.video_budget.num_tokens(picture, pictures.factor)
        if isinstance(picture, str | Path):
            with open_header(picture) as opened:
                size = opened.size
        else:
            size = picture.size
        return pictures.num_tokens(*size)

    def pixels(self, pictures: Sequence[Image.Image | Video]) -> Inputs:
        """What the tower reads of the pictures and videos of a batch, in order.

        Returns, for the M pictures and V videos, as far as there are any:
          pixel_values         [P, C * T * P * P], patches of all pictures
          image_grid_thw       [M, 3], steps (1), rows and columns of patches
          pixel_values_videos  [P, C * T * P * P]
          video_grid_thw       [V, 3]
          second_per_grid_ts   [V] fp32, seconds from one step to the next

        Raises InputError: as `Qwen2VLImageProcessor.fit` and `VideoBudget.read`.
        """
        inputs: Inputs = {}
        read = self.image_processor
        images = [picture for picture in pictures if not isinstance(picture, Video)]
        videos = [picture for picture in pictures if isinstance(picture, Video)]
        if images:
            inputs["pixel_values"], inputs["image_grid_thw"] = read.read(images)
        if videos:
            films = [self.video_budget.read(video, read.factor) for video in videos]
            inputs["pixel_values_videos"], inputs["video_grid_thw"] = read.read_fitted(films)
            of_frame = [video.seconds / len(film) for video, film in zip(videos, films, strict=True)]
            inputs["second_per_grid_ts"] = read.temporal_patch_size * torch.tensor(of_frame)
        return inputs

    def to_pictures(self, inputs: Inputs) -> Tensor:
        """The pictures of a batch, if all have one size: [M, C, height, width].

        Raises InputError: they have not.
        """
        grids = inputs["image_grid_thw"]
        if len(grids.unique(dim=0)) > 1:
            raise InputError(f"the pictures have {len(grids.unique(dim=0))} sizes: look at one at a time")
        patches = inputs["pixel_values"].split(int(grids[0].prod()))
        sizes = self.image_processor.patch_sizes
        return torch.stack([join_patches(picture, grids[0].tolist(), *sizes)[0] for picture in patches])

    def from_pictures(self, pictures: Tensor, inputs: Inputs) -> Inputs:
        """The other way around, as `pixels`, for pictures that are prepared but for cutting them."""
        cut = [cut_into_patches(picture[None], *self.image_processor.patch_sizes) for picture in pictures]
        grids = torch.tensor([grid for _, grid in cut], device=pictures.device)
        return {"pixel_values": torch.cat([patches for patches, _ in cut]), "image_grid_thw": grids}
