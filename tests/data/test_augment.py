"""Other views of a picture: what a line says stays true, to the pixel."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm.data.augment import KINDS, Augment, check_kinds, choose_window
from minivlm.data.samples import Opened, Sample
from minivlm.errors import InputError
from minivlm.processing import Box, boxes_to_text, text_to_boxes

SEG = "".join(f"<seg{number:03}>" for number in range(16))
WIDTH, HEIGHT = 200, 120


def row(*boxes: tuple[int, int, int, int]) -> Opened:
    """Black boxes on white, and an answer that names them."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 0
    text = boxes_to_text([Box(*box, "cup") for box in boxes], WIDTH, HEIGHT)
    return Opened([Image.fromarray(pixels)], "detect cup", text)


def black(picture: Image.Image) -> tuple[int, int, int, int]:
    """The edges of what is dark."""
    dark = np.asarray(picture.convert("L")) < 128
    across, down = np.flatnonzero(dark.any(axis=0)), np.flatnonzero(dark.any(axis=1))
    return int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1


@pytest.mark.parametrize("kinds", [*combinations(("shift", "zoom", "crop"), 1), ("shift", "zoom", "crop")])
def test_boxes_move_with_what_they_show(kinds: tuple[str, ...]) -> None:
    change, moves = Augment(kinds, seed=0), set()
    for number in range(40):
        seen = change(row((30, 40, 90, 70)), number)
        assert seen.pictures[0].size == (WIDTH, HEIGHT)
        (box,) = text_to_boxes(seen.suffix, WIDTH, HEIGHT)
        assert np.allclose(box[:4], black(seen.pictures[0]), atol=1.1)
        assert box.name == "cup"
        assert seen.prefix == "detect cup"
        moves.add(box[:4])
    assert len(moves) > 20


def test_no_box_is_cut() -> None:
    """Also where there is hardly room: all of the dark area is still there."""
    change = Augment(("shift", "crop"), seed=0)
    for number in range(40):
        seen = change(row((2, 2, 20, 20), (150, 90, 198, 118)), number)
        assert len(text_to_boxes(seen.suffix, 1, 1)) == 2
        x0, y0, x1, y1 = black(seen.pictures[0])
        assert x0 >= 0
        assert (x1 - x0, y1 - y0) >= (194, 115)
    windows = {
        choose_window(("crop",), [row((0, 0, 199, 119)).suffix], np.random.default_rng(n)) for n in range(9)
    }
    assert windows == {(0.0, 0.0, 1.0)}


def test_other_words_stay() -> None:
    text = f"<loc0100><loc0100><loc0500><loc0500>{SEG} cup ; <loc0600><loc0600><loc0700><loc0700> left"
    opened = row()._replace(prefix="name <loc0100><loc0100><loc0500><loc0500>", suffix=text)
    seen = Augment(("zoom",), seed=0)(opened, 3)
    assert seen.suffix != text
    assert seen.suffix.count(SEG) == 1
    assert seen.suffix.endswith(" left")
    assert seen.prefix.removeprefix("name ") == seen.suffix[:36]  # the same box
    lines = Augment(("zoom",), seed=0)(row()._replace(suffix="no box"), 3)
    assert (lines.prefix, lines.suffix) == ("detect cup", "no box")


def test_a_row_depends_on_seed_and_number_alone() -> None:
    def seen(seed: int, number: int) -> tuple[bytes, str]:
        one = Augment(KINDS, seed)(row((30, 40, 90, 70)), number)
        return one.pictures[0].tobytes(), one.suffix

    assert seen(0, 5) == seen(0, 5)
    assert len({seen(0, 5), seen(0, 6), seen(1, 5)}) == 3


def test_color_moves_nothing_and_several_pictures_stay() -> None:
    opened = row((30, 40, 90, 70))
    for number in range(9):
        seen = Augment(("color",), seed=0)(opened, number)
        assert seen.suffix == opened.suffix
        assert black(seen.pictures[0]) == (30, 40, 90, 70)
    gray = opened._replace(pictures=[Image.new("RGB", (8, 8), (90, 120, 150))])
    shades = {Augment(("color",), seed=0)(gray, number).pictures[0].getpixel((0, 0)) for number in range(9)}
    assert len(shades) == 9
    several = opened._replace(pictures=opened.pictures * 2)
    assert Augment(KINDS, seed=0)(several, 0) == several


def test_what_is_refused() -> None:
    def sample(suffix: str) -> Sample:
        return Sample(7, ("x.png",), (Path("x.png"),), "p", suffix)

    check_kinds(KINDS, [sample("<loc0100><loc0100><loc0500><loc0500> cup")])
    with pytest.raises(InputError, match="flip is no choice: it exchanges left and right"):
        check_kinds(["flip"], [])
    with pytest.raises(InputError, match="'spin' is unknown: choose from shift, zoom, crop, color"):
        check_kinds(["spin"], [])
    for foreign in ("<box>(1,2),(3,4)</box>", "<|box_start|>(1,2)", '{"bbox_2d": [1, 2, 3, 4]}'):
        check_kinds(["color"], [sample(foreign)])
        with pytest.raises(InputError, match="line 7 has a box in other words than <loc>"):
            check_kinds(["shift", "color"], [sample(foreign)])
