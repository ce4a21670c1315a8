"""Which of the files and folders that `minivlm ask` is given are videos, and how often they are looked at."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from minivlm.cli import options as shared
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED, system_of
from minivlm.processing import AnswerProcessor, Video, open_video
from minivlm.processing.inputs import ReadsVideos
from minivlm.processing.video import ENDINGS, FOLDER_FPS, is_animation


def open_videos(options: argparse.Namespace) -> dict[str, Video]:
    """The videos among what the user named, opened. The rest are pictures, and nothing is said of them.

    A model that reads videos takes animations and folders of pictures for videos, too.

    Raises InputError: a video, for a model that reads pictures; a damaged one; an option that does not fit.
    """
    name = options.model or SHIPPED
    if not system_of(name, options.revision if options.model else None, "answers").videos:
        _refuse_videos(options, str(name))
        return {}
    videos = {
        path: open_video(path, options.fps or FOLDER_FPS)
        for path in options.pictures
        if _is_video(Path(path))
    }
    if options.fps is not None and not videos:
        raise InputError("--fps is of videos, and there are only pictures: leave it out")
    if options.draw is not None and videos:
        raise InputError(f"--draw draws on pictures, and {next(iter(videos))} is a video: leave it out")
    return videos


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS or path.is_dir() or is_animation(path)


def _refuse_videos(options: argparse.Namespace, name: str) -> None:
    """Raises InputError: a video, or an option of videos. A note says what is left of an animation."""
    if options.fps is not None:
        raise InputError(f"--fps is of videos, and {name} reads pictures: leave it out")
    for path in map(Path, options.pictures):
        if path.suffix.lower() in ENDINGS:
            raise InputError(
                f"{path} is a video, and {name} reads pictures: save a frame as a picture, or choose a model "
                "that reads videos, such as Qwen2-VL"
            )
        if is_animation(path):
            shared.tell(f"{path} moves, and the model reads pictures: it sees the first frame", "note")


def set_rate(processor: AnswerProcessor, fps: float | None) -> None:
    """How many frames of a second are read; None: as the model's folder says."""
    if fps is not None and isinstance(processor, ReadsVideos):
        processor.video_budget = replace(processor.video_budget, fps=fps)
