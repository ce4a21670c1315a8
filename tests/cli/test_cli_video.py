"""`minivlm ask` about videos: MP4, animations and folders of pictures; what is refused, and what is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qwen2_folders import write_folder

import minivlm
from minivlm.cli import main
from minivlm.models.answering import answer
from minivlm.processing import open_video
from minivlm.world.clip_files import save_clip
from minivlm.world.clip_making import make_clip

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its videos have small frames, and eight of them at most."""
    folder = write_folder(tmp_path_factory.mktemp("folder"), request.param)
    budget = {"min_pixels": 64, "max_pixels": 1024, "max_frames": 8}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(budget))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Ask what moves. What is printed, and the notes and refusals."""

    def ask(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        line = ["ask", *map(str, arguments), "--prompt", "what is it?", "--max-new-tokens", "4"]
        assert main(line) == code
        out, err = capsys.readouterr()
        assert code == 0 or (out == "" and err.startswith("minivlm: error: ") and err.count("\n") == 1)
        return out, err

    return ask


def clip(path: Path, seconds: int = 3) -> Path:
    save_clip(make_clip(np.random.default_rng(2), seconds=seconds, fps=4), path, 48)
    return path


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp"])
def test_a_file_is_asked_about(ending: str, folder: Path, run: Run, tmp_path: Path) -> None:
    if ending == "mp4":
        pytest.importorskip("av", reason="PyAV is not installed")
    path = clip(tmp_path / f"clip.{ending}")
    out, err = run(path, "--model", folder, "--json")
    said = answer(open_video(path), "what is it?", minivlm.load(folder), max_new_tokens=4)
    assert json.loads(out)["answer"] == said
    assert "may be missed" not in err


def test_more_frames_are_another_video(folder: Path, run: Run, tmp_path: Path) -> None:
    path, (model, processor) = clip(tmp_path / "clip.gif"), minivlm.load(folder)
    steps = []
    for fps in (1, 2):
        out, _ = run(path, "--model", folder, "--fps", str(fps), "--json")
        processor.video_budget = replace(processor.video_budget, fps=fps)
        steps.append(int(processor([open_video(path)], ["what?"])["video_grid_thw"][0, 0]))
        said = answer(open_video(path), "what is it?", (model, processor), max_new_tokens=4)
        assert json.loads(out)["answer"] == said
    assert steps == [2, 3]


def test_a_folder_of_pictures(folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(4):
        Image.effect_noise((32, 16), 40 + number).save(tmp_path / "clip" / f"{number}.png")
    out, _ = run(tmp_path / "clip", "--model", folder, "--fps", "4")
    assert out.startswith(f"{tmp_path / 'clip'} | what is it?\n")
    (tmp_path / "clip" / "3.png").write_bytes(b"broken")
    assert "3.png is not a picture" in run(tmp_path / "clip", "--model", folder, code=2)[1]
    (tmp_path / "none").mkdir()
    assert "no pictures, and so no frames" in run(tmp_path / "none", "--model", folder, code=2)[1]


def test_one_frame_and_pictures_beside_videos(folder: Path, run: Run, tmp_path: Path) -> None:
    still = tmp_path / "still.png"
    Image.effect_noise((32, 16), 40).save(still)
    (tmp_path / "one").mkdir()
    Image.effect_noise((32, 16), 40).save(tmp_path / "one" / "1.png")
    out, _ = run(still, tmp_path / "one", clip(tmp_path / "clip.gif"), "--model", folder, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["picture"]).name for line in lines] == ["still.png", "one", "clip.gif"]


def test_what_is_dropped_is_told(folder: Path, run: Run, tmp_path: Path) -> None:
    _, err = run(clip(tmp_path / "clip.gif", seconds=6), "--model", folder)
    assert "note: the video lasts 6 seconds, and at most 8 frames are read" in err
    assert "may be missed" in err


@pytest.mark.parametrize("fps", ["0", "-1", "nan", "inf", "often"])
def test_rates_that_are_refused(fps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask", str(clip(tmp_path / "clip.gif")), "--prompt", "what?", f"--fps={fps}"])
    assert f"'{fps}' is not a number above 0" in capsys.readouterr().err


def test_options_that_do_not_fit(folder: Path, run: Run, tmp_path: Path) -> None:
    still = tmp_path / "still.png"
    Image.new("RGB", (32, 16)).save(still)
    assert "--fps is of videos" in run(still, "--model", folder, "--fps", "2", code=2)[1]
    moving = clip(tmp_path / "clip.gif")
    drawing = run(moving, "--model", folder, "--draw", tmp_path / "out.png", code=2)[1]
    assert "--draw draws on pictures, and" in drawing
    assert "clip.gif is a video: leave it out" in drawing


def test_a_model_that_reads_pictures(run: Run, tmp_path: Path) -> None:
    """The shipped one: it refuses videos by name, and says that it sees the first frame of an animation."""
    (tmp_path / "clip.mp4").write_bytes(b"never looked at")
    refusal = run(tmp_path / "clip.mp4", code=2)[1]
    assert "clip.mp4 is a video, and" in refusal
    assert "such as Qwen2-VL" in refusal
    assert "is a folder, not a picture" in run(tmp_path, code=2)[1]
    moving = clip(tmp_path / "clip.gif")
    assert "clip.gif moves, and the model reads pictures: it sees the first frame" in run(moving)[1]
    assert "--fps is of videos, and" in run(moving, "--fps", "2", code=2)[1]
