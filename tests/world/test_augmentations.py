"""Augmentations change what they claim to and nothing else: things stay in place, the truth stays true."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minivlm.world.augmentations import (
    APART,
    FILTERS,
    GRAYS,
    MOST_DEGREES,
    STRONGEST_TINT,
    as_jpeg,
    as_photographed,
    half_as_large,
    on_gray,
    on_tint,
    turned,
    varied,
)
from minivlm.world.questions import TASKS, ask
from minivlm.world.scenes import WORLD, Scene, make_scene

PLAIN = [make_scene(np.random.default_rng(seed), "test") for seed in range(200)]
QUIET = [replace(scene, noise=0.0) for scene in PLAIN]


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


def shift(pictures: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """By how many pixels others [P, H, W, 3] are shifted right and down from pictures, on average.

    A picture that moves by d changes by -d times its slope: d is found by least squares.
    """
    down, right = np.gradient(pictures, axis=(1, 2))
    change = others - pictures
    return -float((change * right).sum() / (right**2).sum()), -float((change * down).sum() / (down**2).sum())


def test_the_measure_of_a_shift() -> None:
    pictures = np.stack([levels(scene.draw(64)) for scene in QUIET[:20]])
    moved = [
        replace(scene, things=tuple(replace(t, x=t.x + 0.3, y=t.y - 0.2) for t in scene.things))
        for scene in QUIET[:20]
    ]
    right, down = shift(pictures, np.stack([levels(scene.draw(64)) for scene in moved]))
    assert right == pytest.approx(0.3, abs=0.1)
    assert down == pytest.approx(-0.2, abs=0.1)


def test_another_ground_changes_nothing_but_the_ground() -> None:
    rng = np.random.default_rng(0)
    others = [on_gray(scene, rng, 40, 50) for scene in PLAIN]
    assert {scene.background for scene in others} == set(range(40, 50))
    assert [replace(o, background=s.background) for o, s in zip(others, PLAIN, strict=True)] == PLAIN


def test_a_tinted_ground_has_a_color_that_no_thing_blends_into() -> None:
    rng = np.random.default_rng(0)
    others = [on_tint(scene, rng) for scene in PLAIN * 10]
    for scene, other in zip(PLAIN * 10, others, strict=True):
        assert replace(other, background=scene.background, tint=(0, 0, 0)) == scene
        assert all(math.dist(other.ground, thing.rgb) >= APART for thing in other.things)
        assert other.draw(64).getpixel((0, 0)) == pytest.approx(other.ground, abs=5 * other.noise + 1)
    tints = np.array([other.tint for other in others])
    assert tints.min() == -STRONGEST_TINT
    assert tints.max() == STRONGEST_TINT
    assert np.abs(tints.mean(axis=0)).max() < 5  # no color is preferred


def test_turning_changes_nothing_but_angles() -> None:
    rng = np.random.default_rng(0)
    others = [turned(scene, rng, 15) for scene in PLAIN]
    angles = [thing.angle for scene in others for thing in scene.things]
    assert set(angles) == set(range(-15, 16))
    straight = [replace(o, things=tuple(replace(t, angle=0) for t in o.things)) for o in others]
    assert straight == PLAIN
    assert any(len({thing.angle for thing in scene.things}) > 1 for scene in others)  # each in its own way
    for scene in others:
        assert all(min(thing.box) >= 0 and max(thing.box) <= WORLD for thing in scene.things)


def test_turning_changes_boxes_of_all_but_circles() -> None:
    rng = np.random.default_rng(0)
    for scene in PLAIN:
        for thing, other in zip(scene.things, turned(scene, rng, 15).things, strict=True):
            same = thing.shape == "circle" or other.angle == 0
            assert (thing.box == other.box) == same


def test_a_jpeg_is_the_picture_with_flaws() -> None:
    for scene in PLAIN[:20]:
        picture = scene.draw(64)
        good, bad = as_jpeg(picture, 90), as_jpeg(picture, 20)
        assert (bad.size, bad.mode) == (picture.size, "RGB")
        flaws = [float(np.abs(levels(picture) - levels(other)).mean()) for other in (good, bad)]
        assert 0 < flaws[0] < flaws[1] < 12
        assert np.array_equal(levels(as_jpeg(picture, 20)), levels(bad))
    pictures = np.stack([levels(scene.draw(64)) for scene in QUIET])
    jpegs = np.stack([levels(as_jpeg(scene.draw(64), 50)) for scene in QUIET])
    assert np.abs(shift(pictures, jpegs)).max() < 0.02


def test_things_half_as_large_have_as_many_pixels_in_a_picture_twice_as_wide() -> None:
    for scene in PLAIN:
        small = half_as_large(scene)
        for thing, other in zip(scene.things, small.things, strict=True):
            assert (other.x, other.y, other.name, other.size) == (thing.x, thing.y, thing.name, thing.size)
            pixels, as_many = thing.mask(256).sum(), other.mask(512).sum()
            assert 0.95 * pixels < as_many < 1.05 * pixels


def test_half_of_the_varied_scenes_are_turned_and_half_have_another_ground() -> None:
    others = [varied(scene, np.random.default_rng(seed)) for seed, scene in enumerate(PLAIN * 5)]
    pairs = list(zip(PLAIN * 5, others, strict=True))
    is_turned = [any(thing.angle for thing in other.things) for _, other in pairs]
    is_tinted = [other.tint != (0, 0, 0) for _, other in pairs]
    is_gray = [scene.background != other.background and other.tint == (0, 0, 0) for scene, other in pairs]
    has_other = np.logical_or(is_tinted, is_gray)
    assert 0.4 < np.mean(is_turned) < 0.55
    assert 0.4 < np.mean(has_other) < 0.55
    assert 0.15 < np.mean(is_tinted) < 0.35
    assert 0.15 < np.mean(np.logical_and(is_turned, has_other)) < 0.35
    grounds = [other.background for (_, other), gray in zip(pairs, is_gray, strict=True) if gray]
    assert GRAYS[0] <= min(grounds) < GRAYS[0] + 5
    assert GRAYS[1] - 5 < max(grounds) < GRAYS[1]
    assert max(abs(thing.angle) for other in others for thing in other.things) == MOST_DEGREES
    assert all(scene.caption() == other.caption() for scene, other in pairs)


def test_the_same_questions_have_the_same_answers() -> None:
    """Except for boxes and outlines, which rotate with their things."""
    moved = 0
    for seed, scene in enumerate(PLAIN):
        other = turned(on_gray(scene, np.random.default_rng(seed), 40, 161), np.random.default_rng(seed), 15)
        for task in TASKS:
            first, second = (ask(one, task, np.random.default_rng([seed, 5])) for one in (scene, other))
            if first is None or second is None:
                assert first is second
                continue
            assert first.prefix == second.prefix
            if task in ("detect", "segment"):
                assert len(first.things) == len(second.things)
                moved += first.suffix != second.suffix
            else:
                assert first.suffix == second.suffix
    assert moved > 100


def photographs(scenes: list[Scene]) -> list[Image.Image]:
    return [as_photographed(scene, 64, np.random.default_rng(seed)) for seed, scene in enumerate(scenes)]


def test_a_photograph_leaves_things_where_they_are() -> None:
    """Edges, brightness and small flaws differ; nothing moves by more than a small fraction of a pixel."""
    taken = photographs(QUIET)
    assert all((picture.size, picture.mode) == ((64, 64), "RGB") for picture in taken)
    pictures = np.stack([levels(scene.draw(64)) for scene in QUIET])
    others = np.stack([levels(picture) for picture in taken])
    assert np.abs(shift(pictures, others)).max() < 0.05
    means = np.abs(pictures - others).mean(axis=(1, 2, 3))
    assert means.max() < 45  # .15 lighter or darker
    assert np.median(means) > 0.3
    assert np.array_equal(others, np.stack([levels(picture) for picture in photographs(QUIET)]))


def test_photographs_are_lighter_blurred_or_compressed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Image.Resampling, int]] = []
    draw = Scene.draw

    def spy(
        scene: Scene, pixels: int, reducing: Image.Resampling = FILTERS[0], supersampling: int = 4
    ) -> Image.Image:
        drawn.append((reducing, supersampling))
        return draw(scene, pixels, reducing, supersampling)

    monkeypatch.setattr(Scene, "draw", spy)
    taken = photographs(QUIET * 3)
    assert {reducing for reducing, _ in drawn} == set(FILTERS)
    assert {times for _, times in drawn} == {2, 3, 4, 5}
    as_drawn = [draw(scene, 64, *how) for scene, how in zip(QUIET * 3, drawn, strict=True)]
    same = [np.array_equal(levels(a), levels(b)) for a, b in zip(taken, as_drawn, strict=True)]
    assert 0.32 < np.mean(same) < 0.47  # .7 * .8 * .7 = .39 have none of the three
    lightness = [levels(a).mean() / levels(b).mean() for a, b in zip(taken, as_drawn, strict=True)]
    assert 0.2 < np.mean(np.abs(np.array(lightness) - 1) > 0.01) < 0.35
    assert 0.84 < min(lightness) < 0.9
    assert 1.05 < max(lightness) < 1.16
