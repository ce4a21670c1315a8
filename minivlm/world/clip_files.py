"""A clip as a file to look at: GIF or WebP by Pillow, MP4 by PyAV (the extra [video])."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image

from minivlm.errors import InputError, extra
from minivlm.files import write_aside
from minivlm.world.clips import Clip

TICKS = {".gif": 100, ".webp": 1000}  # the parts of a second that a format counts in


def save_clip(clip: Clip, path: Path, pixels: int = 256) -> None:
    """Write all frames of a clip, `pixels` wide, in the format that the name's ending says.

    A GIF has 256 colors, and MP4 and WebP compress: for training, take the frames themselves.

    Raises InputError: another ending; MP4 without PyAV; the file cannot be written.
    """
    ending = path.suffix.lower()
    if ending not in (*TICKS, ".mp4"):
        raise InputError(f"{path} has an ending that no clip is written with: use .gif, .webp or .mp4")
    frames = list(clip.frames(pixels))
    with write_aside(path) as temporary:
        if ending == ".mp4":
            _write_mp4(frames, clip.fps, temporary)
            return
        # Differences of rounded times, so that roundings do not add up: 12 and 13 hundredths at 8 a second.
        ends = [round(TICKS[ending] * second) for second in (*clip.times, clip.seconds)]
        durations = [(end - start) * 1000 // TICKS[ending] for start, end in pairwise(ends)]
        frames[0].save(
            temporary,
            format=ending[1:].upper(),
            save_all=True,
            append_images=frames[1:],
            duration=durations,  # milliseconds
            loop=0,  # for ever
        )


def _write_mp4(frames: Sequence[Image.Image], fps: int, path: Path) -> None:
    """H.264 where PyAV has it. Its colors come in blocks of 2 x 2: an odd row or column is cut off."""
    with extra("video"):
        import av
    width, height = (side - side % 2 for side in frames[0].size)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(container.default_video_codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            cut = frame.crop((0, 0, width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(cut)))
        container.mux(stream.encode(None))  # what the encoder still holds
