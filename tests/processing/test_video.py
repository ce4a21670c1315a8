"""Video files: frames and their times from animations, folders and containers, sampling, every refusal.

Containers are read by PyAV, which is an extra. Where it is missing, a stand-in plays its part: a module with
those functions of PyAV that minivlm calls, on files that this test invents. Where it is installed, an MP4 is
written and read in earnest as well.
"""

from __future__ import annotations

import ast
import gc
import io
import json
import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from garbage import only_new_garbage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minivlm.errors import InputError
from minivlm.processing.frame_sampling import (
    even_frames,
    frame_count,
    frames_at,
    spread_frames,
    stepped_frames,
)
from minivlm.processing.video import UNSAID, Video, open_video, video_of
from minivlm.world.clip_files import save_clip
from minivlm.world.clip_making import make_clip
from minivlm.world.clips import Clip

RED, GREEN, BLUE, GRAY = (200, 30, 30), (30, 160, 30), (30, 30, 200), (120, 120, 120)


def plain(color: tuple[int, int, int], size: tuple[int, int] = (16, 12)) -> Image.Image:
    return Image.new("RGB", size, color)


def animation(path: Path, colors: Sequence[tuple[int, int, int]], durations: int | list[int]) -> Path:
    first, *others = [plain(color) for color in colors]
    first.save(path, save_all=True, append_images=others, duration=durations, lossless=True)
    return path


def colors_of(video: Video, numbers: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    return [frame.getpixel((3, 3)) for frame in video.frames(numbers)]  # type: ignore[misc]


# Animations


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_has_frames_and_times(ending: str, tmp_path: Path) -> None:
    path = animation(tmp_path / f"clip.{ending}", [RED, GREEN, BLUE], [500, 250, 1000])
    video = open_video(path)
    assert video.name == path.name
    assert video.times == pytest.approx((0, 0.5, 0.75))
    assert video.seconds == pytest.approx(1.75)
    assert (video.num_frames, video.size) == (3, (16, 12))
    assert video.fps == pytest.approx(3 / 1.75)
    assert colors_of(video) == [RED, GREEN, BLUE]
    assert colors_of(video, [2]) == [BLUE]
    assert colors_of(video, [0, 0, 2, 2]) == [RED, RED, BLUE, BLUE]
    assert colors_of(video, []) == []
    assert all(frame.mode == "RGB" for frame in video.frames())


@pytest.mark.parametrize("ending", ["gif", "webp"])
@pytest.mark.parametrize("fps", [1, 2, 8])
def test_a_drawn_clip_comes_back_from_its_file(ending: str, fps: int, tmp_path: Path) -> None:
    """With its times, although things that stand make equal frames, which a file stores once."""
    clip = replace(make_clip(np.random.default_rng(4), seconds=4, fps=fps), noise=0.0)
    save_clip(clip, tmp_path / f"clip.{ending}", 64)
    video = open_video(tmp_path / f"clip.{ending}")
    assert video.seconds == pytest.approx(4)
    numbers = frames_at(video.times, video.seconds, fps)
    assert len(numbers) == len(clip.times)
    for frame, drawn in zip(video.frames(numbers), clip.frames(64), strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(drawn)).mean() < 4


def test_a_still_is_a_video_of_one_frame(tmp_path: Path) -> None:
    plain(RED).save(tmp_path / "one.gif")
    video = open_video(tmp_path / "one.gif")
    assert (video.times, video.seconds) == ((0.0,), UNSAID)
    assert colors_of(video) == [RED]


def test_frames_without_a_duration_last_as_long_as_in_browsers(tmp_path: Path) -> None:
    video = open_video(animation(tmp_path / "clip.gif", [RED, GREEN, BLUE], 0))
    assert video.times == pytest.approx((0, 0.1, 0.2))


def test_transparent_frames_lie_on_white(tmp_path: Path) -> None:
    first = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    second = Image.new("RGBA", (8, 8), (*RED, 255))
    first.save(tmp_path / "clip.png", save_all=True, append_images=[second], duration=100)
    assert colors_of(open_video(tmp_path / "clip.png")) == [(255, 255, 255), RED]


def test_a_damaged_frame_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    for ending in ("gif", "webp", "png"):
        whole = io.BytesIO()
        frames[0].save(whole, ending, save_all=True, append_images=frames[1:], duration=100)
        path = tmp_path / f"cut.{ending}"
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 7 // 10])
        with pytest.raises(InputError, match=r"cut\.\w+ is truncated or damaged") as caught:
            list(open_video(path).frames())
        assert "frame 2 of" in str(caught.value) or ending == "webp"


def test_frames_are_in_memory_only_while_they_are_used(tmp_path: Path) -> None:
    path = animation(tmp_path / "clip.gif", [(number, 90, 2 * number) for number in range(40)], 100)
    decoded = []
    with only_new_garbage():
        for frame in open_video(path).frames():
            decoded.append(weakref.ref(frame))
            del frame
            gc.collect()
            assert sum(reference() is not None for reference in decoded) <= 2
    assert len(decoded) == 40


# Folders


def test_a_folder_is_ordered_as_people_count(tmp_path: Path) -> None:
    for name, color in (("frame_10.png", BLUE), ("frame_9.png", GREEN), ("frame_1.jpg", RED)):
        plain(color).save(tmp_path / name, quality=100, subsampling=0)
    (tmp_path / "notes.txt").write_text("no picture")
    plain(GRAY).save(tmp_path / ".hidden.png")
    (tmp_path / "more.png").mkdir()
    video = open_video(tmp_path, folder_fps=4)
    assert (video.times, video.seconds, video.fps) == ((0, 0.25, 0.5), 0.75, 4)
    found = np.array(colors_of(video))
    assert np.abs(found - np.array([RED, GREEN, BLUE])).max() <= 3  # JPEG
    assert open_video(tmp_path).fps == 2


def test_pictures_of_a_folder_are_turned_upright(tmp_path: Path) -> None:
    picture = plain(RED, (20, 10))
    exif = Image.Exif()
    exif[274] = 6  # orientation
    picture.save(tmp_path / "a.jpg", exif=exif)
    video = open_video(tmp_path)
    assert video.size == (10, 20)
    assert [frame.size for frame in video.frames()] == [(10, 20)]


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no pictures, and so no frames: put PNG"):
        open_video(tmp_path)
    plain(RED).save(tmp_path / "1.png")
    for fps in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match=r"frames a second: expected a number above 0"):
            open_video(tmp_path, folder_fps=fps)
    plain(RED, (10, 10)).save(tmp_path / "2.png")
    frames = open_video(tmp_path).frames()
    next(frames)
    with pytest.raises(InputError, match=r"frame 1 of .* has 10 x 10 pixels, and the first has 16 x 12"):
        next(frames)
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"2\.png is not a picture"):
        list(open_video(tmp_path).frames())


def test_pictures_in_memory_are_a_video() -> None:
    video = video_of([plain(RED), plain(GREEN).convert("P"), plain(BLUE)], 0.5)
    assert (video.times, video.seconds, video.fps) == ((0, 2, 4), 6, 0.5)
    assert colors_of(video, [0, 2]) == [RED, BLUE]
    assert {frame.mode for frame in video.frames()} == {"RGB"}
    with pytest.raises(InputError, match=r"the video has no frames"):
        video_of([], 2)
    with pytest.raises(InputError, match=r"0 frames a second: expected a number above 0"):
        video_of([plain(RED)], 0)


# What is no video


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"none\.mp4: no such file: check the path of the video"):
        open_video(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(InputError, match=r"empty\.mp4 is empty: copy or download the video again"):
        open_video(tmp_path / "empty.mp4")
    plain(RED).save(tmp_path / "photo.jpg")
    with pytest.raises(InputError, match=r"photo\.jpg is a picture \(JPEG\), not a video"):
        open_video(tmp_path / "photo.jpg")
    animation(tmp_path / "clip.gif", [RED, GREEN, BLUE], 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"clip\.gif has more than 100 pixels.*bombs"):
        open_video(tmp_path / "clip.gif")
    monkeypatch.undo()
    monkeypatch.setattr("minivlm.processing.video.MAX_FRAMES", 2)
    with pytest.raises(InputError, match=r"clip\.gif has more than 2 frames: cut out"):
        open_video(tmp_path / "clip.gif")


@pytest.mark.parametrize("numbers", [[3], [-1], [1, 0], [0, 99]])
def test_frames_that_are_not_there_are_refused(numbers: list[int], tmp_path: Path) -> None:
    video = open_video(animation(tmp_path / "clip.gif", [RED, GREEN, BLUE], 100))
    with pytest.raises(InputError, match=r"clip\.gif has frames 0 to 2: ask for them in this order"):
        list(video.frames(numbers))


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # "not installed"
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42 and more")
    with pytest.raises(
        InputError, match=r"av is not installed.*extra \[video\].*pip install 'minivlm\[video"
    ):
        open_video(tmp_path / "clip.mp4")


# Containers, with a stand-in for PyAV


@dataclass
class Frame:
    """A frame as PyAV hands it over: its color says which one it is."""

    pts: int | None
    color: tuple[int, int, int]
    rotation: int = 0
    is_corrupt: bool = False

    def to_image(self) -> Image.Image:
        picture = plain(self.color, (20, 10))
        picture.putpixel((0, 0), (255, 255, 255))  # to see how it is turned
        return picture


def stand_in(stored: dict[str, Any], calls: list[dict[str, Any]]) -> ModuleType:
    """A module `av` that opens JSON as a container. `calls` gets the options that it is opened with."""
    packets = [SimpleNamespace(pts=p, is_discard=False) for p in stored["packets"]]
    frames = [Frame(*values) for values in stored["frames"]]

    def decode(stream: Any) -> Iterator[Frame]:
        for frame in frames:
            if frame.color == GRAY:
                raise ValueError("Invalid data found when processing input")
            yield frame

    @contextmanager
    def open_container(file: Any, mode: str, **options: Any) -> Iterator[Any]:
        calls.append(options)
        try:
            json.loads(file.read())
        except ValueError as error:
            raise ValueError("Invalid data found when processing input") from error
        stream = SimpleNamespace(
            codec_context=SimpleNamespace(width=stored.get("width", 20), height=10),
            time_base=Fraction(1, 100),
            average_rate=stored.get("rate", Fraction(4)),
            thread_type="SLICE",
        )
        streams = SimpleNamespace(video=[stream] * stored.get("streams", 1))
        yield SimpleNamespace(streams=streams, demux=lambda stream: iter(packets), decode=decode)

    module = ModuleType("av")
    module.open = open_container  # type: ignore[attr-defined]
    return module


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(packets: Sequence[int | None], frames: Sequence[tuple[Any, ...]], **other: Any) -> Path:
        calls: list[dict[str, Any]] = []
        stored = {"packets": packets, "frames": frames, **other}
        monkeypatch.setitem(sys.modules, "av", stand_in(stored, calls))
        make.calls = calls  # type: ignore[attr-defined]
        path = tmp_path / "clip.mp4"
        path.write_text("{}")
        return path

    return make


def test_a_container_has_frames_and_times(container: Any) -> None:
    """Packets are stored in the order of decoding, begin anywhere, and end with an empty one."""
    video = open_video(container([50, 125, 75, 100, None], [(50, RED), (75, GREEN), (100, BLUE), (125, RED)]))
    assert video.times == pytest.approx((0, 0.25, 0.5, 0.75))
    assert video.seconds == pytest.approx(1)
    assert video.fps == pytest.approx(4)
    assert video.size == (20, 10)
    assert colors_of(video) == [RED, GREEN, BLUE, RED]
    assert colors_of(video, [1, 1, 2]) == [GREEN, GREEN, BLUE]


def test_ffmpeg_may_open_no_lists_of_other_files(container: Any) -> None:
    open_video(container([0, 25], [(0, RED), (25, GREEN)]))
    allowed = container.calls[0]["container_options"]["format_whitelist"].split(",")
    assert {"mov", "matroska", "avi"} <= set(allowed)
    assert not {"hls", "concat", "dash", "sdp", "rtsp", "image2", "lavfi"} & set(allowed)


def test_a_video_held_otherwise_is_turned_upright(container: Any) -> None:
    """By PyAV's angle, which is counterclockwise: the white corner goes from top left to bottom left."""
    video = open_video(container([0, 25], [(0, RED, 90), (25, GREEN, 90)]))
    assert video.size == (10, 20)
    (first, _) = video.frames()
    assert first.getpixel((0, 19)) == (255, 255, 255)


def test_a_frame_left_out_by_the_decoder_is_the_next_one(container: Any) -> None:
    video = open_video(container([0, 25, 50], [(0, RED), (50, BLUE)]))
    assert colors_of(video) == [RED, BLUE, BLUE]
    assert colors_of(video, [1]) == [BLUE]


def test_without_ticks_the_order_of_frames_counts(container: Any) -> None:
    video = open_video(container([0, 25, 50], [(None, RED), (None, GREEN), (None, BLUE)]))
    assert colors_of(video, [0, 2]) == [RED, BLUE]


def test_one_frame_lasts_as_the_rate_says(container: Any) -> None:
    video = open_video(container([7], [(7, RED)]))
    assert (video.times, video.seconds, video.fps) == ((0.0,), 0.25, 4)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"packets": []}, r"clip\.mp4 has no frames"),
        ({"packets": [None, None]}, r"clip\.mp4 has no frames"),
        ({"packets": [5, 5, 5]}, r"clip\.mp4 has frames that are all shown at once"),
        ({"packets": [5], "rate": None}, r"clip\.mp4 has frames that are all shown at once"),
        ({"streams": 0}, r"clip\.mp4 cannot be used as a video: it holds no pictures, only sound"),
        ({"width": 10**9}, r"clip\.mp4.*1000000000 x 10 pixels, more than the limit"),
        ({"frames": []}, r"clip\.mp4.*ends before frame 0"),
    ],
)
def test_what_is_wrong_with_a_container(stored: dict[str, Any], message: str, container: Any) -> None:
    good = {"packets": [0, 25], "frames": [(0, RED), (25, GREEN)]}
    with pytest.raises(InputError, match=message):
        open_video(container(**(good | stored)))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([(0, RED)], r"ends before frame 1"),
        ([(0, RED), (25, GRAY)], r"no video in a known format, or a damaged one \(Invalid data"),
        ([(0, RED), (25, GREEN, 0, True)], r"frame 1 is damaged"),
        ([(0, RED), (25, GREEN, 90)], r"frame 1 of clip\.mp4 has 10 x 20 pixels"),
    ],
)
def test_broken_frames_are_named(frames: list[tuple[Any, ...]], message: str, container: Any) -> None:
    frames_read = open_video(container([0, 25], frames)).frames()
    next(frames_read)  # what comes before it can be used
    with pytest.raises(InputError, match=message):
        next(frames_read)


def test_too_many_frames_are_refused(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivlm.processing.video.MAX_FRAMES", 2)
    with pytest.raises(InputError, match=r"it has more than 2 frames: cut out the part that matters"):
        open_video(container([0, 25, 50], [(0, RED)]))


def test_a_file_that_is_no_video_says_so(container: Any) -> None:
    path = container([0], [(0, RED)])
    path.write_bytes(b"%PDF-1.7 and so on")
    with pytest.raises(InputError, match=r"clip\.mp4 is no video in a known format, or a damaged one"):
        open_video(path)


# Containers in earnest


@pytest.fixture
def mp4(tmp_path: Path) -> tuple[Clip, Path]:
    pytest.importorskip("av", reason="PyAV is not installed")
    clip = make_clip(np.random.default_rng(1), seconds=4, fps=4, width=96, height=48)
    save_clip(clip, tmp_path / "clip.mp4", 193)  # an odd column is cut off
    return clip, tmp_path / "clip.mp4"


def test_an_mp4_comes_back(mp4: tuple[Clip, Path]) -> None:
    clip, path = mp4
    video = open_video(path)
    assert video.times == pytest.approx(clip.times)
    assert video.seconds == pytest.approx(4)
    assert video.size == (192, 96)
    for frame, drawn in zip(video.frames(), clip.frames(193), strict=True):
        cut = np.asarray(drawn)[:96, :192].astype(int)
        assert np.abs(np.asarray(frame).astype(int) - cut).mean() < 8
    (second,) = video.frames(frames_at(video.times, video.seconds, 0.25)[:1])
    assert second.size == (192, 96)


def test_a_cut_mp4_is_refused(mp4: tuple[Clip, Path]) -> None:
    _, path = mp4
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"clip\.mp4"):
        list(open_video(path).frames())


def test_a_playlist_is_not_followed(mp4: tuple[Clip, Path]) -> None:
    _, path = mp4
    playlist = path.with_name("list.m3u8")
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{path}\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError, match=r"list\.m3u8 is no video in a known format"):
        open_video(playlist)


# Sampling


def test_frames_at_a_rate() -> None:
    tenths = [number / 10 for number in range(30)]
    assert frames_at(tenths, 3, 2) == [0, 5, 10, 15, 20, 25]
    assert frames_at(tenths, 3, 1) == [0, 10, 20]
    assert frames_at(tenths, 3, 0.1) == [0]
    assert frames_at(tenths, 3, 10) == list(range(30))
    assert frames_at(tenths[:2], 0.2, 20) == [0, 0, 1, 1]  # more than there are: some come twice
    assert frames_at([0], 0.1, 2) == [0]


def test_what_is_shown_is_sampled_and_not_what_comes_next() -> None:
    """Of an animation that holds its first frame for three seconds, second 2 shows the first."""
    assert frames_at([0, 3], 4, 1) == [0, 0, 0, 1]
    # Hundredths of a second, as GIF rounds eighths.
    assert frames_at([0, 0.12, 0.25, 0.38, 0.5], 0.625, 8) == [0, 1, 2, 3, 4]


def test_even_frames() -> None:
    assert even_frames([0, 0.033, 0.067, 0.1], 0.133) == [0, 1, 2, 3]  # thousandths, as WebM rounds them
    assert even_frames([0, 3, 3.5], 4) == [0] * 6 + [1, 2]
    assert even_frames([0, 0, 1], 2) == [1, 2]  # nobody sees the first
    assert even_frames([7.0], 8) == [0]


@given(st.integers(1, 400), st.floats(0.5, 120), st.floats(0.1, 60))
def test_sampled_frames_ascend_and_are_the_shown_ones(number: int, video_fps: float, fps: float) -> None:
    times = [index / video_fps for index in range(number)]
    chosen = frames_at(times, number / video_fps, fps)
    assert len(chosen) == max(math.ceil(round(number / video_fps * fps, 6)), 1)
    for index, which in enumerate(chosen):
        assert times[which] <= index / fps + 0.0102
        assert which == number - 1 or times[which + 1] > index / fps
    assert chosen == sorted(chosen)


def reference_counts(total: int, video_fps: float, fps: float) -> int:
    """`smart_nframes` of qwen-vl-utils 0.0.14, in our words."""
    most = min(768, total) // 2 * 2
    wanted = min(min(max(total / video_fps * fps, 4), most), total)
    return int(wanted // 2 * 2)


@given(st.integers(2, 5000), st.sampled_from([1.0, 10.0, 23.976, 25.0, 29.97, 60.0]), st.floats(0.2, 8))
def test_counts_are_those_of_qwen(total: int, video_fps: float, fps: float) -> None:
    count = frame_count(total, video_fps, fps)
    assert count == reference_counts(total, video_fps, fps)
    assert count % 2 == 0
    assert 2 <= count <= min(768, total)


def test_counts_by_hand() -> None:
    assert frame_count(300, 30) == 20  # ten seconds
    assert frame_count(310, 30) == 20  # 20.67, rounded down to an even number
    assert frame_count(329, 30) == 20  # 21.9; 0.0.8 rounded to 22
    assert frame_count(30, 30) == 4  # at least 4
    assert frame_count(3, 30) == 2  # as many as there are
    assert frame_count(1, 30) == 1
    assert frame_count(10**6, 30) == 768
    assert frame_count(300, 30, fps=1, least=6, most=8) == 8


def sample_frames_of_transformers() -> Any:
    """The method of Qwen2-VL's video processor, cut out of a file that imports torchvision."""
    file = Path(transformers.__file__).parent / "models" / "qwen2_vl" / "video_processing_qwen2_vl.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (method,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "sample_frames"
    ]
    for argument in method.args.args:
        argument.annotation = None
    names: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(ast.Module([method], []), str(file), "exec"), names)
    processor = SimpleNamespace(
        num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768
    )
    return lambda total, video_fps, fps: names["sample_frames"](
        processor, SimpleNamespace(total_num_frames=total, fps=video_fps), fps=fps
    ).tolist()


def test_stepped_frames_are_those_of_transformers() -> None:
    theirs = sample_frames_of_transformers()
    longer = 0
    for total in (2, 3, 4, 7, 48, 100, 299, 300, 1199, 5000):
        for video_fps in (1.0, 24.0, 29.97):
            for fps in (0.5, 2.0, 14.55):
                count = frame_count(total, video_fps, fps)
                wanted = theirs(total, video_fps, fps)
                longer += len(wanted) - count
                assert stepped_frames(total, count) == wanted[:count], (total, video_fps, fps)
    assert theirs(1199, 1199 / 582, 1.0)[582:]  # one more than asked for, by rounding
    assert longer < 5


def test_spread_frames_are_those_of_qwen() -> None:
    """From the first frame to the last, halves to the even number, as torch.linspace(...).round()."""
    assert spread_frames(10, 4) == [0, 3, 6, 9]
    assert spread_frames(6, 3) == [0, 2, 5]  # 2.5
    assert spread_frames(300, 4) == [0, 100, 199, 299]
    assert spread_frames(1, 1) == [0]
    assert stepped_frames(10, 4) == [0, 2, 5, 7]
    assert stepped_frames(300, 4) == [0, 75, 150, 225]
    for total in (2, 5, 31, 4000):
        for count in range(2, min(total, 40), 2):
            spread, stepped = spread_frames(total, count), stepped_frames(total, count)
            assert len(spread) == len(stepped) == count
            assert (spread[0], spread[-1], stepped[0]) == (0, total - 1, 0)
            assert max(spread + stepped) < total
            assert spread != stepped


@pytest.mark.parametrize("fps", [0, -2, math.nan, math.inf])
def test_rates_that_are_none_are_refused(fps: float) -> None:
    for attempt in (
        lambda: frames_at([0.0], 1, fps),
        lambda: frame_count(10, fps),
        lambda: frame_count(10, 30, fps),
    ):
        with pytest.raises(InputError, match=r"frames a second: expected a number above 0"):
            attempt()


def test_counts_that_cannot_be_are_refused() -> None:
    for attempt in (lambda: frames_at([], 0, 2), lambda: frame_count(0, 30), lambda: spread_frames(0, 1)):
        with pytest.raises(InputError, match=r"the video has no frames"):
            attempt()
    for function in (spread_frames, stepped_frames):
        for count in (0, 11):
            with pytest.raises(InputError, match=rf"{count} of 10 frames cannot be taken: expected 1 to 10"):
                function(10, count)
    with pytest.raises(InputError, match=r"3600 seconds are 36000000 frames: take at most"):
        frames_at([0.0], 3600, 10_000)
    with pytest.raises(InputError, match=r"between 8 and 4 frames"):
        frame_count(100, 30, least=8, most=4)
