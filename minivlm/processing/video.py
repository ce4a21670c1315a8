"""From a video file to frames and their times. Which frames a model sees is chosen in frame_sampling.py.

    >>> video = open_video("clip.gif")
    >>> batch = processor([video], ["what moves?"])
    >>> frames = list(video.frames(frames_at(video.times, video.seconds, fps=2)))  # to look at

GIF, animated WebP and PNG, and folders of pictures are read by Pillow, everything else by PyAV (see
video_container.py). A video in memory would be a thousand times its file: frames are decoded when they are
asked for, one after the other, and only the ones asked for are kept. `video_of` makes a video of pictures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from minivlm.errors import InputError
from minivlm.processing.frame_sampling import check_frames, check_rate
from minivlm.processing.images import check_sides, explained, load_picture, open_file, to_rgb
from minivlm.processing.video_container import decode, read_index

ANIMATIONS = ("GIF", "WEBP", "PNG")  # what Pillow reads all frames of
MAX_FRAMES = 2**18  # more than two hours at 30 frames a second
ENDINGS = (  # of names of videos
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
    ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
FOLDER_FPS = 2.0  # of a folder of pictures, which says nothing about time
UNSAID = 0.1  # seconds that browsers show a frame whose file says 0


@dataclass(frozen=True)
class Video:
    """Frames that can be read, and when each is shown. One frame alone is a video, too.

    Args:
        name: of the file, for messages.
        times: the second at which each frame begins, ascending from 0.
        seconds: when the last frame ends.
        size: width and height of every frame.
        read: decodes the frames of ascending numbers.
    """

    name: str
    times: tuple[float, ...]
    seconds: float
    size: tuple[int, int]
    read: Callable[[Sequence[int]], Iterator[Image.Image]]

    @property
    def num_frames(self) -> int:
        """F, how many frames there are."""
        return len(self.times)

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        return self.num_frames / self.seconds

    def frames(self, numbers: Sequence[int] | None = None) -> Iterator[Image.Image]:
        """Some frames, RGB and upright, in the order of time; None: all. A number may come several times.

        Raises InputError: numbers that are not there or not ascending; a damaged frame, or one of another
        size than the first. Frames before it have been delivered then.
        """
        numbers = range(self.num_frames) if numbers is None else numbers
        times_asked = Counter(numbers)
        wanted = sorted(times_asked)
        if list(numbers) != sorted(numbers) or (
            wanted and not 0 <= wanted[0] <= wanted[-1] < self.num_frames
        ):
            raise InputError(f"{self.name} has frames 0 to {self.num_frames - 1}: ask for them in this order")
        for number, frame in zip(wanted, self.read(wanted), strict=True):
            if frame.size != self.size:
                raise InputError(
                    f"frame {number} of {self.name} has {frame.width} x {frame.height} pixels, and the first "
                    f"has {self.size[0]} x {self.size[1]}: give all frames one size"
                )
            for _ in range(times_asked[number]):
                yield frame


def open_video(path: str | Path, folder_fps: float = FOLDER_FPS) -> Video:
    """A video file, an animation, or a folder of pictures in the order of their names.

    The times of all frames are read here, not yet the frames, except for those of an animation, which has no
    list of times: it is decoded once.

    Args:
        folder_fps: pictures per second in a folder. Qwen2-VL's own program takes them for 2 a second, too.

    Raises InputError: no such file, an empty one, a still picture of another format than ANIMATIONS, no
    video, no frames, more than MAX_FRAMES, frames with too many pixels, a damaged animation, a frame rate
    that is not above 0; a format that only PyAV reads, where it is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, folder_fps)
    kind = _picture_format(path)
    if kind in ANIMATIONS:
        return _of_animation(path)
    if kind not in (None, "MPEG"):  # whose name is all that Pillow knows of it
        raise InputError(f"{path} is a picture ({kind}), not a video: ask about it as a picture")
    index = read_index(path, MAX_FRAMES)
    read = partial(decode, path, index.ticks)
    first = next(read([0]))
    return Video(path.name, index.times, index.seconds, first.size, read)


def is_animation(path: Path) -> bool:
    """Whether a file is a picture that moves. What is wrong with another one, says who opens it."""
    with suppress(InputError), open_file(path, "picture") as file, explained(path):
        image = Image.open(file)
        return image.format in ANIMATIONS and getattr(image, "is_animated", False)
    return False


def video_of(frames: Sequence[Image.Image], fps: float) -> Video:
    """Pictures in memory as a video, each shown for 1/fps seconds.

    Raises InputError: no pictures; fps that is not above 0.
    """
    check_rate(fps)
    check_frames(len(frames))
    return _evenly_timed("the video", len(frames), fps, lambda numbers: (to_rgb(frames[n]) for n in numbers))


def _picture_format(path: Path) -> str | None:
    """What Pillow takes a file for; None: for no picture."""
    with open_file(path, "video") as file, explained(path):
        try:
            return Image.open(file).format
        except UnidentifiedImageError:
            return None


# ---- animations --------------------------------------------------------------------------------------------


def _of_animation(path: Path) -> Video:
    durations: list[float] = []
    size = 0, 0
    for frame in _decode_animation(path):
        size = size if durations else frame.size
        durations.append(frame.info.get("duration", 0) / 1000 or UNSAID)  # said in milliseconds
        if len(durations) > MAX_FRAMES:
            raise InputError(f"{path} has more than {MAX_FRAMES} frames: cut out the part that matters")
    *times, seconds = accumulate(durations, initial=0.0)
    return Video(path.name, tuple(times), seconds, size, partial(_read_animation, path))


def _read_animation(path: Path, numbers: Sequence[int]) -> Iterator[Image.Image]:
    wanted = list(reversed(numbers))
    for number, frame in enumerate(_decode_animation(path)):
        if not wanted:
            return
        if number == wanted[-1]:
            wanted.pop()
            yield to_rgb(frame)


def _decode_animation(path: Path) -> Iterator[Image.Image]:
    """One picture that becomes frame after frame: copy what is to be kept."""
    with open_file(path, "video") as file:
        with explained(path):
            image = Image.open(file)
            check_sides(image)
        number = 0
        while True:
            with explained(Path(f"frame {number} of {path}")):
                try:
                    image.seek(number)
                except EOFError:
                    return
                image.load()
            yield image
            number += 1


# ---- folders and lists of pictures -------------------------------------------------------------------------


def _of_folder(path: Path, fps: float) -> Video:
    check_rate(fps)
    endings = Image.registered_extensions()
    pictures = [
        file
        for file in path.iterdir()
        if file.suffix.lower() in endings and file.is_file() and not file.name.startswith(".")
    ]
    if not pictures:
        raise InputError(f"{path} holds no pictures, and so no frames: put PNG or JPEG files into it")
    if len(pictures) > MAX_FRAMES:
        raise InputError(f"{path} holds more than {MAX_FRAMES} pictures: take out the part that matters")
    pictures.sort(key=_natural)
    return _evenly_timed(path.name, len(pictures), fps, partial(_read_folder, pictures))


def _read_folder(pictures: Sequence[Path], numbers: Sequence[int]) -> Iterator[Image.Image]:
    return (to_rgb(load_picture(pictures[number])) for number in numbers)


def _evenly_timed(
    name: str, num_frames: int, fps: float, read: Callable[[Sequence[int]], Iterator[Image.Image]]
) -> Video:
    times = tuple(number / fps for number in range(num_frames))
    return Video(name, times, num_frames / fps, next(read([0])).size, read)


def _natural(path: Path) -> list[tuple[int, str]]:
    """So that frame_2 comes before frame_10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
