"""Which frames of a video a model gets to see: numbers of frames, from their times alone.

- `frames_at`: what a viewer sees every 1/fps seconds.
- Qwen2-VL (https://arxiv.org/abs/2409.12191) takes an even number of frames, about two a second, spread
  over the video. Its own program spreads them from the first frame to the last (`spread_frames`), and the
  processor in `transformers` begins at the first and takes equal steps (`stepped_frames`). The two differ
  nearly everywhere: of 10 frames, 4 are 0, 3, 6, 9 or 0, 2, 5, 7. video_budget.py takes the first rule.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from minivlm.errors import InputError

FRAME_FACTOR = 2  # frames that Qwen2-VL merges into one
MOST_SAMPLES = 100_000

_ROUNDED = 0.0101  # seconds; GIF rounds the times of its frames to hundredths


def frames_at(times: Sequence[float], seconds: float, fps: float) -> list[int]:
    """The number of the frame that is shown at second 0, 1/fps, 2/fps, ... until the end of the video.

    A frame is shown until the next one begins: an animation may hold one for many seconds, and then it comes
    several times. A frame that begins within a hundredth of a second counts as shown.

    Args:
        times: the second at which each frame begins, ascending.
        seconds: when the last frame ends.

    Raises InputError: no frames; fps that is not above 0; more than MOST_SAMPLES frames.
    """
    check_frames(len(times))
    check_rate(fps)
    count = math.ceil(round(seconds * fps, 6)) or 1
    if count > MOST_SAMPLES:
        raise InputError(
            f"{fps:g} frames a second for {seconds:g} seconds are {count} frames: take at most {MOST_SAMPLES}"
        )
    wanted = (number / fps for number in range(count))
    return [max(bisect_right(times, second + _ROUNDED) - 1, 0) for second in wanted]


def even_frames(times: Sequence[float], seconds: float) -> list[int]:
    """The frames that are shown at even steps of time: all, each once, if all last about equally long.

    An animation keeps a frame that does not change for longer. Then the step is its shortest frame, and the
    others come several times. Arguments and errors as of `frames_at`.
    """
    check_frames(len(times))
    lengths = [end - start for start, end in pairwise([*times, seconds]) if end > start]
    if len(lengths) == len(times) and max(lengths) < 1.5 * min(lengths):
        return list(range(len(times)))
    return frames_at(times, seconds, min(1 / min(lengths), MOST_SAMPLES / seconds))


def frame_count(num_frames: int, video_fps: float, fps: float = 2.0, least: int = 4, most: int = 768) -> int:
    """How many frames Qwen2-VL takes of a video: `fps` for each second, within limits, and an even number.

    From 0.0.10 on, qwen-vl-utils rounds down to an even number (0.0.8 rounded to the nearest). It refuses a
    video of one frame; here it is taken as it is, and fills both places of a pair.

    Raises InputError: no frames, rates that are not above 0, limits under 2 or in the wrong order.
    """
    check_frames(num_frames)
    check_rate(video_fps)
    check_rate(fps)
    if not FRAME_FACTOR <= least <= most:
        raise InputError(f"between {least} and {most} frames: expected at least {FRAME_FACTOR}, and no less")
    if num_frames < FRAME_FACTOR:
        return num_frames
    count = max(num_frames / video_fps * fps, _even(least, math.ceil))
    count = min(count, _even(min(most, num_frames), math.floor))
    return _even(count, math.floor)


def spread_frames(num_frames: int, count: int) -> list[int]:
    """`count` of `num_frames`, evenly from the first to the last: the rule of qwen-vl-utils.

    Raises InputError: no frames, or more asked for than there are.
    """
    _check_count(num_frames, count)
    return torch.linspace(0, num_frames - 1, count).round().long().tolist()


def stepped_frames(num_frames: int, count: int) -> list[int]:
    """`count` of `num_frames` in equal steps from the first: the rule of `transformers`.

    There the rounding of the step yields one frame more in some cases, as for 582 of 1199; it is left out.

    Raises InputError: no frames, or more asked for than there are.
    """
    _check_count(num_frames, count)
    return torch.arange(0, num_frames, num_frames / count).int().tolist()[:count]


def _even(value: float, rounding: Callable[[float], int]) -> int:
    return rounding(value / FRAME_FACTOR) * FRAME_FACTOR


def check_frames(num_frames: int) -> None:
    """Raises InputError: none."""
    if num_frames < 1:
        raise InputError("the video has no frames: expected at least one")


def check_rate(fps: float) -> None:
    """Raises InputError: a rate at which no video can be shown."""
    if not (fps > 0 and math.isfinite(fps)):
        raise InputError(f"{fps:g} frames a second: expected a number above 0, such as 2")


def _check_count(num_frames: int, count: int) -> None:
    check_frames(num_frames)
    if not 1 <= count <= num_frames:
        raise InputError(f"{count} of {num_frames} frames cannot be taken: expected 1 to {num_frames}")
