"""Other programs draw the same scenes: shapes, colors, positions and noise are those of `Scene.draw`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from minivlm.errors import InputError
from minivlm.world import renderers
from minivlm.world.augmentations import turned
from minivlm.world.renderers import as_html, draw_with_browser, draw_with_matplotlib, find_browser
from minivlm.world.scenes import COLORS, SHAPES, WORLD, Scene, Thing, make_scene

Draw = Callable[[Sequence[Scene], int], list[Image.Image]]

needs_browser = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
RENDERERS = [draw_with_matplotlib, pytest.param(draw_with_browser, marks=needs_browser)]


def scenes(number: int) -> list[Scene]:
    """Every other one is rotated."""
    made = [make_scene(np.random.default_rng(seed), "test") for seed in range(number)]
    return [
        turned(scene, np.random.default_rng(seed), 15) if seed % 2 else scene
        for seed, scene in enumerate(made)
    ]


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


def lone(shape: str, angle: int) -> Scene:
    """One thing of fractional position and size, without noise."""
    thing = Thing(shape, "blue", "large", 27.3, 35.8, 13.6, COLORS["blue"], angle)
    return Scene((thing,), 200, 0.0, 0)


def box_of(picture: Image.Image, ground: int) -> np.ndarray:
    """x0, y0, x1, y1 of what is not background, in pixels; of a pixel at an edge, the covered part."""
    covered = np.abs(levels(picture) - ground).max(axis=2) / np.abs(levels(picture) - ground).max()
    columns, rows = covered.max(axis=0), covered.max(axis=1)
    edges = []
    for line in (columns, rows):
        (inside,) = np.nonzero(line > 0.02)
        first, last = inside[0], inside[-1]
        edges.append((first + 1 - line[first], last + line[last]))
    (x0, x1), (y0, y1) = edges
    return np.array([x0, y0, x1, y1])


@pytest.mark.parametrize("draw", RENDERERS)
def test_pictures_are_nearly_ours(draw: Draw) -> None:
    """Edges differ; background, noise and the order of scenes do not."""
    batch = scenes(45)  # more than two rows of a browser's page
    pictures = draw(batch, 64)
    assert len(pictures) == len(batch)
    for scene, picture in zip(batch, pictures, strict=True):
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
        difference = np.abs(levels(picture) - levels(scene.draw(64)))
        assert 0.01 < difference.mean() < 2
        assert np.median(difference) == 0  # the background with its noise is the same, level by level
    other = np.abs(levels(pictures[0]) - levels(batch[1].draw(64)))
    assert other.mean() > 5


@pytest.mark.parametrize("draw", RENDERERS)
def test_scenes_of_any_shape(draw: Draw) -> None:
    """Wide, high and square ones on one page; 70 pixels make heights of fractions."""
    sides = [(96.0, 40.0), (40.0, 96.0), (64.0, 64.0), (50.0, 33.0)] * 6
    batch = [make_scene(np.random.default_rng(i), "test", False, *side) for i, side in enumerate(sides)]
    for scene, picture in zip(batch, draw(batch, 70), strict=True):
        ours = scene.draw(70)
        assert picture.size == ours.size == (70, round(70 * scene.height / scene.width))
        assert np.abs(levels(picture) - levels(ours)).mean() < 3
        assert np.median(np.abs(levels(picture) - levels(ours))) == 0


@pytest.mark.parametrize("draw", RENDERERS)
@pytest.mark.parametrize("pixels", [64, 224])
def test_boxes_agree_to_a_pixel(draw: Draw, pixels: int) -> None:
    """With the things' own boxes, and so with what our renderer draws."""
    batch = [lone(shape, angle) for shape in SHAPES for angle in (0, 12)]
    for scene, picture in zip(batch, draw(batch, pixels), strict=True):
        truth = np.array(scene.things[0].box) * pixels / WORLD
        assert np.abs(box_of(picture, 200) - truth).max() < 1, scene.things[0]
        assert np.abs(box_of(scene.draw(pixels), 200) - truth).max() < 1


@pytest.mark.parametrize("draw", RENDERERS)
def test_nothing_is_moved_and_nothing_grows(draw: Draw) -> None:
    """Centers and areas of single shapes, to a small fraction of a pixel."""
    batch = [lone(shape, angle) for shape in SHAPES for angle in (0, 7)]
    for scene, picture in zip(batch, draw(batch, 64), strict=True):
        for one, tolerance in ((picture, 0.01), (scene.draw(64), 0.06)):  # ours fills both ends of a line
            weights = (200 - levels(one)[..., 0]) / (200 - COLORS["blue"][0])
            y, x = np.mgrid[:64, :64] + 0.5
            (thing,) = scene.things
            middle = thing.mask(512)
            wanted = [np.nonzero(middle)[axis].mean() / 8 + 1 / 16 for axis in (1, 0)]
            found = [(weights * axis).sum() / weights.sum() for axis in (x, y)]
            assert np.abs(np.array(found) - wanted).max() < 0.1
            outline = np.array(thing.outline)
            area = np.pi * thing.radius**2
            if thing.shape != "circle":
                following = np.roll(outline, -1, axis=0)
                area = abs((outline[:, 0] * following[:, 1] - outline[:, 1] * following[:, 0]).sum()) / 2
            assert weights.sum() == pytest.approx(area, rel=tolerance)


@pytest.mark.parametrize("draw", RENDERERS)
def test_colors_are_exact(draw: Draw) -> None:
    """In the center of each thing and on each background, dark ones too."""
    batch = [
        Scene((Thing("circle", color, "large", 32, 32, 14, rgb),), background, 0.0, 0, tint=(9, 0, -7))
        for (color, rgb), background in zip(COLORS.items(), range(40, 250, 27), strict=True)
    ]
    for scene, picture in zip(batch, draw(batch, 64), strict=True):
        assert picture.getpixel((32, 32)) == scene.things[0].rgb
        assert picture.getpixel((2, 61)) == (scene.background + 9, scene.background, scene.background - 7)


@pytest.mark.parametrize("draw", RENDERERS)
def test_edges_are_mixed(draw: Draw) -> None:
    """A square between pixels: its edge mixes both colors, in every column and row alike."""
    square = Thing("square", "blue", "large", 32.25, 32.25, 10 * 2**0.5, (0, 0, 0))  # from 22.25 to 42.25
    (picture,) = draw([Scene((square,), 200, 0.0, 0)], 64)
    row = levels(picture)[32, :, 0]
    assert row[21] == 200
    assert row[22] == pytest.approx(200 * 0.25, abs=8)
    assert row[23] == row[41] == 0
    assert row[42] == pytest.approx(200 * 0.75, abs=8)
    assert row[43] == 200
    assert np.array_equal(row, levels(picture)[:, 32, 0])


@pytest.mark.parametrize("draw", RENDERERS)
def test_the_same_scenes_give_the_same_pictures(draw: Draw) -> None:
    batch = scenes(3)
    first, again = draw(batch, 64), draw(batch[::-1], 64)[::-1]  # also elsewhere on a page
    assert all(np.array_equal(levels(a), levels(b)) for a, b in zip(first, again, strict=True))
    assert draw([], 64) == []


def test_settings_of_the_user_change_nothing() -> None:
    batch = scenes(2)
    wanted = draw_with_matplotlib(batch, 64)
    settings = {
        "figure.facecolor": "red",
        "patch.force_edgecolor": True,
        "patch.linewidth": 5,
        "savefig.dpi": 300,
    }
    with matplotlib.rc_context(settings):
        found = draw_with_matplotlib(batch, 64)
    assert all(np.array_equal(levels(a), levels(b)) for a, b in zip(found, wanted, strict=True))


# The browser


@needs_browser
def test_a_page_ends_and_another_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = scenes(7)
    wanted = draw_with_browser(batch, 64)
    monkeypatch.setattr(renderers, "SCENES_PER_PAGE", 3)
    found = draw_with_browser(batch, 64)
    assert len(found) == 7
    assert all(np.array_equal(levels(a), levels(b)) for a, b in zip(found, wanted, strict=True))


def test_a_page_is_svg() -> None:
    html = as_html(scenes(25), 64)
    assert html.count("<svg ") == 25
    assert html.count("<circle ") + html.count("<polygon ") == sum(len(s.things) for s in scenes(25))
    assert "left:256px;top:64px" in html  # number 24: in the second row of 20, the fifth
    assert "http" not in html  # nothing is fetched


def test_browsers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLM_CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser() is None
    with pytest.raises(InputError, match="no chromium, chromium-browser, google-chrome was found: install"):
        draw_with_browser(scenes(1), 64)
    for name in ("google-chrome", "chromium", "mine"):
        program(tmp_path / name, "exit 0")
        assert find_browser() == str(tmp_path / ("google-chrome" if name == "google-chrome" else "chromium"))
    monkeypatch.setenv("MINIVLM_CHROMIUM", str(tmp_path / "mine"))
    assert find_browser() == str(tmp_path / "mine")
    monkeypatch.setenv("MINIVLM_CHROMIUM", "mine")
    assert find_browser() == str(tmp_path / "mine")
    monkeypatch.setenv("MINIVLM_CHROMIUM", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"MINIVLM_CHROMIUM is '.*nothing', which is not a program"):
        find_browser()
    monkeypatch.setenv("MINIVLM_CHROMIUM", "")
    assert find_browser() == str(tmp_path / "chromium")


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# A shell script that finds out where the picture should go.
FIND_OUT = 'for word in "$@"; do case "$word" in --screenshot=*) out="${word#--screenshot=}";; esac; done'


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo it said this >&2; echo and that >&2; exit 3", r"drew nothing \(exit code 3; 'it said this'\)"),
        ("exec sleep 20", "took more than 0.5 seconds for a page"),
        (f'{FIND_OUT}; echo nonsense > "$out"', "did not work .cannot identify image file"),
        (f'{FIND_OUT}; cp "$SMALL" "$out"', "drew 8 x 8 pixels, not 1280 x 64"),
    ],
)
def test_a_browser_that_fails(
    script: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what to do, and nothing is left in the temporary folder."""
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    program(tmp_path / "browser", script)
    monkeypatch.setenv("SMALL", str(tmp_path / "small.png"))
    monkeypatch.setenv("MINIVLM_CHROMIUM", str(tmp_path / "browser"))
    if "sleep" in script:
        monkeypatch.setattr(renderers, "SECONDS_PER_PAGE", 0.5)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.raises(InputError, match=complaint) as caught:
        draw_with_browser(scenes(1), 64)
    assert "set MINIVLM_CHROMIUM to another browser, or leave out the column browser" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_browser_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "browser").write_bytes(b"\x7fELF")
    (tmp_path / "browser").chmod(0o755)
    monkeypatch.setenv("MINIVLM_CHROMIUM", str(tmp_path / "browser"))
    with pytest.raises(InputError, match=r"browser did not work .*Exec format error"):
        draw_with_browser(scenes(1), 64)
