"""Polygons and run lengths become the masks that COCO's program makes; turned pictures turn them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from minivlm.data.converting import read_frame
from minivlm.data.shapes import (
    METHODS,
    RunLengths,
    bounds_of_mask,
    bounds_of_polygons,
    decode_counts,
    draw_polygons,
    points_of,
    turn_mask,
    turn_point,
)
from minivlm.errors import InputError
from minivlm.processing import load_picture, mask_iou, to_rgb


def test_known_run_lengths() -> None:
    """Worked out by hand from maskApi.c: five bits in each letter, from "0" on."""
    assert decode_counts("04T1") == (0, 4, 36)  # 36 = 4 + 1 * 32: "T" is 4 with a piece to follow, "1" is 1
    assert decode_counts("52203") == (
        5,
        2,
        2,
        2,
        5,
    )  # from the fourth on, differences to the one before the last
    assert decode_counts("592NM") == (5, 9, 2, 7, -1)  # "N" is -2, "M" is -3
    assert decode_counts("") == ()
    mask = RunLengths(2, 3, (2, 1, 1, 2)).to_mask()
    assert mask.tolist() == [[False, True, True], [False, False, True]]


def test_run_lengths_are_those_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = rng.integers(1, 70, 2).tolist()
        mask = rng.random((height, width)) < number / 59
        if number % 2:  # long runs, whose numbers take several letters
            mask = np.repeat(np.repeat(mask, 12, axis=0), 12, axis=1)
        encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        height, width = encoded["size"]
        counts = decode_counts(encoded["counts"].decode())
        assert (RunLengths(height, width, counts).to_mask() == mask).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0é", "the letter 'é': expected RLE"),
        ("0 4", "the letter ' '"),
        ("04T", "ends inside a number: it is truncated"),
        ("o" * 20, "an endless number"),
    ],
)
def test_bad_letters(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_counts(text)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (RunLengths(2, 3, (2, 1)), "the runs of a mask have 3 pixels in all: expected 3 x 2"),
        (RunLengths(2, 3, (2, 6, -2)), "a negative run"),
        (RunLengths(0, 3, ()), "a mask of 3 x 0 pixels"),
    ],
)
def test_bad_runs(runs: RunLengths, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runs.to_mask()


def test_polygons_on_whole_pixels() -> None:
    mask = draw_polygons(((1, 1, 4, 1, 4, 3, 1, 3),), 6, 5)
    assert bounds_of_mask(mask) == (1, 1, 4, 3)
    assert mask.sum() == 6
    both = draw_polygons(((1, 1, 4, 1, 4, 3, 1, 3), (4, 3, 99, 3, 99, 99, 4, 99)), 6, 5)
    assert both.sum() == 6 + 4  # what lies outside is cut off
    assert not draw_polygons(((-9, -9, -1, -9, -1, -1),), 6, 5).any()


def test_thin_polygons_have_the_pixels_they_touch() -> None:
    mask = draw_polygons(((1, 2, 5, 2, 5, 2.3, 1, 2.3),), 6, 5)
    assert bounds_of_mask(mask) == (1, 2, 5, 3)


def test_polygons_are_nearly_those_of_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = int(rng.integers(4, 9))
        angles, reach = np.sort(rng.random(corners)) * 2 * np.pi, rng.uniform(40, 75, corners)
        flat = np.stack([100 + reach * np.cos(angles), 80 + reach * np.sin(angles)], axis=1).ravel().tolist()
        theirs = coco.decode(coco.merge(coco.frPyObjects([flat], 160, 200))) > 0
        assert mask_iou(draw_polygons((tuple(flat),), 200, 160), theirs) > 0.94


def test_bounds() -> None:
    assert bounds_of_polygons(((1, 2, 5, 2, 5, 4), (0, 3, 2, 3, 1, 9))) == (0, 2, 5, 9)
    with pytest.raises(InputError, match="has no pixel"):
        bounds_of_mask(np.zeros((3, 3), dtype=np.bool_))
    for flat in ([1.0, 2, 3, 4], [1.0] * 7):
        with pytest.raises(InputError, match=f"a polygon has {len(flat)} numbers"):
            points_of(flat)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_turned_as_the_model_sees_it(turn: int, ending: str, tmp_path: Path) -> None:
    """One white pixel of a stored picture, and where it lies in the upright one."""
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[1, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = turn
    stored, path = (
        Image.fromarray(pixels).resize((64, 32), Image.Resampling.NEAREST),
        tmp_path / f"a.{ending}",
    )
    stored.save(path, exif=exif)
    frame = read_frame(path)
    upright = np.asarray(to_rgb(load_picture(path)))[..., 0] > 128
    assert frame.upright == upright.shape[::-1]
    if ending == "tif":  # Pillow has turned it already
        return
    assert frame.orientation == turn
    assert (turn_mask(np.asarray(stored) > 128, turn) == upright).all()
    x0, y0, x1, y1 = bounds_of_mask(upright)
    width, height = frame.upright
    corners = [turn_point(x / 8, y / 4, turn) for x, y in ((2, 1), (3, 2))]
    assert sorted(x for x, _ in corners) == [x0 / width, x1 / width]
    assert sorted(y for _, y in corners) == [y0 / height, y1 / height]


def test_methods_are_those_of_pillow() -> None:
    assert sorted(METHODS) == list(range(2, 9))
    assert turn_mask(np.eye(2, dtype=np.bool_), 1).tolist() == [[True, False], [False, True]]
    assert ImageOps.exif_transpose(Image.new("L", (3, 2))).size == (3, 2)
