"""MP4, MOV, WebM, AVI and their like, read by PyAV (https://pyav.basswood.io), the extra [video].

A container holds packets, compressed frames, each with the tick at which its frame is shown. Finding all
ticks needs no decoding. Decoding begins at the first packet, since a frame is stored as its difference from
others, and keeps one frame at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from minivlm.errors import InputError, extra
from minivlm.processing.images import MAX_SIDE, open_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# What FFmpeg may take a file for. Others are lists of further files and addresses, which it would open.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,ivf,m4v,mxf"


class Index(NamedTuple):
    """When the frames of a container are shown."""

    ticks: list[int]  # of each frame, ascending, as the file counts
    times: tuple[float, ...]  # the same in seconds, from 0
    seconds: float  # when the last frame ends: it lasts as long as the others on average


def read_index(path: Path, most: int) -> Index:
    """The frames of a container, at most so many.

    Raises InputError: PyAV is not installed; no video, a damaged one, one without frames or with too many.
    """
    ticks = []
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or 0)
        tick = float(stream.time_base or 0)
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:  # the last packet is empty
                ticks.append(packet.pts)
            if len(ticks) > most:
                raise InputError(f"it has more than {most} frames: cut out the part that matters")
    ticks.sort()
    if not ticks:
        raise InputError(f"{path} has no frames that say when they are shown: save it again as MP4")
    times = tuple((number - ticks[0]) * tick for number in ticks)
    if times[-1] > 0:
        return Index(ticks, times, times[-1] * len(times) / (len(times) - 1))
    if len(times) > 1 or rate <= 0:
        raise InputError(f"{path} has frames that are all shown at once: save it again as MP4")
    return Index(ticks, times, 1 / rate)


def decode(path: Path, ticks: Sequence[int], numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Some frames, upright, RGB; `numbers` are ascending. In place of a frame that the decoder leaves out
    comes the next one.

    Raises InputError: a damaged frame, or the file ends before the last of them.
    """
    number_of = {tick: number for number, tick in enumerate(ticks)}
    wanted = list(reversed(numbers))
    number = -1
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            # Where a file stores no ticks for its frames, the decoder's order counts.
            number = number_of.get(-1 if frame.pts is None else frame.pts, number + 1)
            while wanted and wanted[-1] <= number:
                if frame.is_corrupt:
                    raise InputError(f"frame {number} is damaged")
                # The angle by which a camera was held otherwise, against the clock.
                yield frame.to_image().rotate(frame.rotation, expand=True)
                wanted.pop()
            if not wanted:
                return
        raise InputError(f"it ends before frame {wanted[-1]}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container and its first stream of pictures. Whatever goes wrong with it is an InputError."""
    with extra("video"):
        import av
    with open_file(path, "video") as file:
        try:
            with av.open(file, "r", container_options={"format_whitelist": FORMATS}) as container:
                if not container.streams.video:
                    raise InputError("it holds no pictures, only sound or text")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise InputError("PyAV has no decoder for it: save it again as MP4 with H.264")
                _check_size(stream.codec_context.width, stream.codec_context.height)
                yield container, stream
        except InputError as error:
            raise InputError(f"{path} cannot be used as a video: {error}") from error
        except Exception as error:  # damaged files make decoders raise almost anything
            raise InputError(
                f"{path} is no video in a known format, or a damaged one ({error}): copy or download it "
                "again, or save it as MP4, GIF or WebP"
            ) from error


def _check_size(width: int, height: int) -> None:
    """Raises InputError: so many pixels that Pillow would refuse a picture, too."""
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf) or max(width, height) > MAX_SIDE:
        raise InputError(
            f"its frames have {width} x {height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS} "
            f"against decompression bombs, or of {MAX_SIDE} on a side"
        )
