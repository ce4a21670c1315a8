"""From a video to the frames that Qwen2-VL reads: how many, and how large.

    frames of the file  -> 2 a second, between 4 and 768, an even number, evenly spread (frame_sampling.py)
    pixels of a frame   -> what the budget of the whole video leaves for each pair, within limits

So a longer video is seen at fewer frames a second, and each of them smaller. But no pair of frames gets less
than 134 tokens, 5 % above the smallest frame: a video of 768 frames takes more than the budget.

Source: `vision_process.py` of https://github.com/QwenLM/Qwen2.5-VL. transformers has no budget for the whole
unless it is told so (`cap_pixels_per_frame`).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.frame_sampling import FRAME_FACTOR, even_frames, frame_count, spread_frames
from minivlm.processing.patches import smart_resize
from minivlm.processing.tokens import settings_in
from minivlm.processing.video import Video

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

    def choose(self, video: Video) -> list[int]:
        """The numbers of the frames that are read. A video of one frame is read as a picture.

        Raises InputError: as `frame_count`.
        """
        even = even_frames(video.times, video.seconds)
        rate = round(len(even) / video.seconds, 9)  # 29.999999999999996 would lose two frames
        count = frame_count(len(even), rate, self.fps, self.min_frames, self.max_frames)
        return [even[place] for place in spread_frames(len(even), count)]

    def dropped(self, video: Video) -> str | None:
        """What a user should know of a video that is longer than the budget; None if it is not."""
        if min(video.seconds * self.fps, video.num_frames) <= self.max_frames:
            return None
        count = len(self.choose(video))
        return (
            f"the video lasts {video.seconds:.0f} seconds, and at most {self.max_frames} frames are read: "
            f"{count / video.seconds:.2g} a second in place of {self.fps:g}, so what is shorter than "
            f"{video.seconds / count:.1f} seconds may be missed. Cut it to the part that matters"
        )

    def size_of(self, width: int, height: int, frames: int, factor: int) -> tuple[int, int]:
        """The (width, height) at which each of so many frames is read. Raises InputError: as `smart_resize`.

        Args:
            factor: pixels of an image token on each side.
        """
        share = self.total_pixels * FRAME_FACTOR / frames
        most = max(min(self.max_pixels, share), int(1.05 * self.min_pixels))
        height, width = smart_resize(height, width, factor, self.min_pixels, most)
        return width, height

    def num_tokens(self, video: Video, factor: int) -> int:
        """Image tokens of a video. Raises InputError: as `choose` and `smart_resize`."""
        frames = len(self.choose(video))
        width, height = self.size_of(*video.size, frames, factor)
        return math.ceil(frames / FRAME_FACTOR) * (width // factor) * (height // factor)

    def read(self, video: Video, factor: int) -> list[Image.Image]:
        """The chosen frames of a video, RGB, resized.

        Raises InputError: as `choose`, `smart_resize` and `Video.frames`.
        """
        numbers = self.choose(video)
        size = self.size_of(*video.size, len(numbers), factor)
        return [frame.resize(size, Image.Resampling.BICUBIC) for frame in video.frames(numbers)]

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
