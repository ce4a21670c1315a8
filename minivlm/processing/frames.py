"""From a video to the frames that Qwen2-VL reads: how many, which, and how large.

    frames of the file  -> 2 a second, between 4 and 768, an even number, evenly spread
    pixels of a frame   -> what the budget of the whole video leaves for each pair, within limits

So a longer video is seen at fewer frames a second, and each of them smaller. Below 134 tokens a pair no frame
gets: a video of 768 frames takes more than the budget.

Source: `vision_process.py` of https://github.com/QwenLM/Qwen2.5-VL. transformers has the same frames up to
one frame's place, and no budget for the whole unless it is told so (`cap_pixels_per_frame`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.images import to_rgb
from minivlm.processing.inputs import Video
from minivlm.processing.patches import smart_resize
from minivlm.processing.tokens import settings_in

FRAMES = 2  # in each patch
VIDEO_SETTINGS = "video_preprocessor_config.json"


@dataclass(frozen=True)
class VideoBudget:
    """How much of a video is read. The defaults are the original program's, in version 0.0.8."""

    fps: float = 2.0  # frames a second
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * 28 * 28  # of a frame
    max_pixels: int = 768 * 28 * 28
    total_pixels: int = 24576 * 28 * 28  # of all pairs of frames

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} of a video is {value}: expected a number above 0")

    def indices(self, frames: int, fps: float) -> list[int]:
        """Which of a video's frames are read.

        A video of one frame is read as a picture.

        Args:
            frames, fps: how many there are, and how many a second.

        Raises InputError: a video without frames, or with a rate that is no number above 0.
        """
        if frames < 1:
            raise InputError("the video has no frames: check the file, or give its frames as pictures")
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"the video has {fps} frames a second: expected a number above 0, such as 30")
        most = min(self.max_frames, frames)
        wanted = min(max(frames / fps * self.fps, self.min_frames), most)
        count = max(1, math.floor(wanted / FRAMES) * FRAMES)
        return [int(i) for i in torch.linspace(0, frames - 1, count).round().tolist()]

    def sample(self, video: Video) -> Video:
        """The frames that are read, and their rate. Raises InputError: as `indices`."""
        indices = self.indices(len(video.frames), video.fps)
        rate = len(indices) / len(video.frames) * video.fps
        return Video([video.frames[i] for i in indices], rate)

    def dropped(self, video: Video) -> str | None:
        """What a user should know of a video that is longer than the budget; None if it is not."""
        indices = self.indices(len(video.frames), video.fps)
        seconds = len(video.frames) / video.fps
        wanted = seconds * self.fps
        if min(wanted, len(video.frames)) <= self.max_frames:
            return None
        return (
            f"the video lasts {seconds:.0f} seconds, and at most {self.max_frames} frames are read: "
            f"{len(indices) / seconds:.2g} a second in place of {self.fps:g}, so what is shorter than "
            f"{seconds / len(indices):.1f} seconds may be missed. Cut it to the part that matters"
        )

    def size_of(self, width: int, height: int, frames: int, factor: int) -> tuple[int, int]:
        """The (width, height) at which each of so many frames is read. Raises InputError: as `smart_resize`.

        Args:
            factor: pixels of an image token on each side.
        """
        share = self.total_pixels * FRAMES / frames
        most = max(min(self.max_pixels, share), int(1.05 * self.min_pixels))
        height, width = smart_resize(height, width, factor, self.min_pixels, most)
        return width, height

    def num_tokens(self, video: Video, factor: int) -> int:
        """Image tokens of a video. Raises InputError: as `indices` and `smart_resize`."""
        frames = len(self.indices(len(video.frames), video.fps))
        width, height = self.size_of(*video.frames[0].size, frames, factor)
        return math.ceil(frames / FRAMES) * (width // factor) * (height // factor)

    def resize(self, video: Video, factor: int) -> list[Image.Image]:
        """The frames of a sampled video as RGB, upright, of one size.

        Raises InputError: frames of different sizes; as `smart_resize` and `to_rgb`.
        """
        frames = [to_rgb(frame) for frame in video.frames]
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) > 1:
            listed = " and ".join(f"{width} x {height}" for width, height in sizes[:2])
            raise InputError(f"a video has frames of {listed} pixels: give frames of one size")
        size = self.size_of(*sizes[0], len(frames), factor)
        return [frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VideoBudget:
        """From a folder's video_preprocessor_config.json, where there is one.

        Raises InputError: the file cannot be read, or holds other than numbers.
        """
        values = settings_in(Path(folder) / VIDEO_SETTINGS)
        size = values.get("size") or {}
        found: dict[str, Any] = {name: values.get(name) for name in asdict(cls())}
        found["min_pixels"] = found["min_pixels"] or size.get("shortest_edge")
        found["max_pixels"] = found["max_pixels"] or size.get("longest_edge")
        try:
            fps = float(found.pop("fps") or cls.fps)
            return cls(fps, **{name: int(value) for name, value in found.items() if value is not None})
        except (TypeError, ValueError) as error:
            raise InputError(f"{Path(folder) / VIDEO_SETTINGS}: {error}") from error

    def save_pretrained(self, folder: str | Path, sizes: dict[str, int]) -> None:
        """Write video_preprocessor_config.json; `sizes` are those of a patch."""
        values = {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            **asdict(self),
            **sizes,
            "do_sample_frames": True,
            "cap_pixels_per_frame": True,
        }
        with write_aside(Path(folder) / VIDEO_SETTINGS) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
