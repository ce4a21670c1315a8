"""Which frames of a video are read, and how large: the original program's numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from minivlm.errors import InputError
from minivlm.processing.video import Video, open_video, video_of
from minivlm.processing.video_budget import VideoBudget

TOKEN = 28 * 28


def film(frames: int, fps: float, size: tuple[int, int] = (8, 8)) -> Video:
    return video_of([Image.new("RGB", size)] * frames, fps)


@pytest.mark.parametrize(
    ("frames", "fps", "count"),
    [
        (300, 30.0, 20),  # ten seconds, two a second
        (90, 30.0, 6),
        (31, 30.0, 4),  # a second: four at least
        (30, 30.0, 4),
        (7, 1.0, 6),  # no more than there are, and an even number
        (9, 30.0, 4),
        (5, 30.0, 4),
        (3, 30.0, 2),
        (2, 30.0, 2),
        (1, 30.0, 1),  # as a picture
        (90000, 30.0, 768),
    ],
)
def test_how_many_frames(frames: int, fps: float, count: int):
    chosen = VideoBudget().choose(film(frames, fps))
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == frames - 1  # both ends are seen


def test_roundings_of_times_lose_no_frames():
    for seconds in (math.nextafter(10, 0), 10, math.nextafter(10, 11)):
        assert len(VideoBudget().choose(replace(film(300, 30.0), seconds=seconds))) == 20


def test_which_frames():
    assert VideoBudget().choose(film(31, 30.0)) == [0, 10, 20, 30]
    assert VideoBudget(fps=1.0, min_frames=2).choose(film(100, 25.0)) == [0, 33, 66, 99]


def test_a_frame_that_lasts_comes_several_times(tmp_path: Path):
    """Times count, not frames: a thing stands for three seconds, and moves in the fourth."""
    colors = ("red", "green", "blue")
    first, *others = [Image.new("RGB", (8, 8), color) for color in colors]
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=[3000, 500, 500])
    video = open_video(tmp_path / "clip.gif")
    assert VideoBudget().choose(video) == [0, 0, 0, 0, 0, 0, 1, 2]
    assert VideoBudget(fps=1.0).choose(video) == [0, 0, 0, 2]
    assert len(VideoBudget().read(video, 28)) == 8


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        (4, 768),  # the limit of a frame
        (64, 768),
        (128, 384),  # 24576 tokens for 64 pairs
        (256, 192),
        (768, 134),  # the floor: 5 % above the smallest frame
    ],
)
def test_tokens_of_a_pair_of_large_frames(frames: int, tokens: int):
    width, height = VideoBudget().size_of(1920, 1080, frames, 28)
    assert width % 28 == height % 28 == 0
    assert 0.85 * tokens < width * height / TOKEN <= tokens


def test_small_frames_grow_to_the_least():
    width, height = VideoBudget().size_of(64, 48, 8, 28)
    assert width * height >= 128 * TOKEN


def test_frames_and_tokens():
    video = film(60, 30.0, (64, 48))
    budget = VideoBudget(min_pixels=TOKEN, max_pixels=12 * TOKEN)
    assert [frame.size for frame in budget.read(video, 28)] == [(56, 56)] * 4
    assert budget.num_tokens(video, 28) == 2 * 2 * 2


def test_what_is_dropped_is_said():
    budget = VideoBudget(max_frames=8)
    assert budget.dropped(film(40, 10.0)) is None
    assert budget.dropped(film(8, 1.0)) is None  # fewer than it might be, but all are read
    told = budget.dropped(film(100, 10.0))
    assert told is not None
    assert told.startswith("the video lasts 10 seconds, and at most 8 frames are read: 0.8 a second in place")
    assert "shorter than 1.2 seconds may be missed" in told


def test_what_is_refused(tmp_path: Path):
    for fps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="fps of a video"):
            VideoBudget(fps=fps)
    with pytest.raises(InputError, match="between 8 and 4 frames"):
        VideoBudget(min_frames=8, max_frames=4).choose(film(9, 1.0))
    with pytest.raises(InputError, match="more than 200 times"):
        VideoBudget().read(film(1, 30.0, (1, 201)), 28)
    sizes = [Image.new("RGB", size) for size in ((8, 8), (8, 9))]
    with pytest.raises(InputError, match="frame 1 of the video has 8 x 9 pixels, and the first has 8 x 8"):
        VideoBudget().read(video_of(sizes, 30.0), 28)
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    frames = [Image.open(tmp_path / name) for name in ("whole.png", "cut.png")]
    with pytest.raises(InputError, match="cannot be read as RGB"):
        VideoBudget().read(video_of(frames, 30.0), 28)


def test_files(tmp_path: Path):
    budget = VideoBudget(fps=1.0, max_frames=16, min_pixels=TOKEN, max_pixels=4 * TOKEN, total_pixels=9999)
    budget.save_pretrained(tmp_path, {"patch_size": 14})
    assert VideoBudget.from_pretrained(tmp_path) == budget
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": "often"}')
    with pytest.raises(InputError, match="often"):
        VideoBudget.from_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").unlink()
    assert VideoBudget.from_pretrained(tmp_path) == VideoBudget()
