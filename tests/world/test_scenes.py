"""The drawn world tells the truth about itself: pictures, boxes, outlines and labels of patches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from PIL import Image

from minivlm.errors import InputError
from minivlm.world.scenes import COLORS, HELD_OUT_PAIRS, SHAPES, SIZES, WORLD, Scene, Split, Thing, make_scene

SPLITS: tuple[Split, ...] = ("train", "test", "unseen")
GRAY = 200
BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


def scenes(number: int, split: Split = "train", first_seed: int = 0, easy: bool = False) -> list[Scene]:
    return [
        make_scene(np.random.default_rng(seed), split, easy)
        for seed in range(first_seed, first_seed + number)
    ]


def pixels(scene: Scene, side: int = 64, reducing: Image.Resampling = BOX) -> np.ndarray:
    return np.asarray(scene.draw(side, reducing)).astype(int)


def lone(shape: str, color: str, rng: np.random.Generator, angle: int = 0) -> Thing:
    radius = float(rng.uniform(6.5, 15))
    x, y = (float(v) for v in rng.uniform(radius + 0.5, WORLD - radius - 0.5, size=2))
    return Thing(shape, color, "medium", x, y, radius, COLORS[color], angle)


# Pictures


@pytest.mark.parametrize("split", SPLITS)
def test_a_seed_is_a_scene_and_a_picture(split: Split) -> None:
    first, again, other = scenes(30, split), scenes(30, split), scenes(30, split, first_seed=1000)
    assert first == again
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, other, strict=True))


def box_of(drawn: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 of what is True."""
    rows, columns = np.nonzero(drawn)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("angle", [0, 11, -20, 90])
@pytest.mark.parametrize("reducing", [BOX, BICUBIC])
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_fit_what_is_drawn(shape: str, reducing: Image.Resampling, angle: int) -> None:
    rng = np.random.default_rng(0)
    for color in COLORS:
        thing = lone(shape, color, rng, angle)
        drawn = np.abs(pixels(Scene((thing,), GRAY, 0.0, 0), 256, reducing) - GRAY).max(axis=2) > 8
        # 4 pixels per unit; the drawing library rounds edges to a quarter of a pixel, and fills both ends.
        assert np.abs(box_of(drawn) - 4 * np.array(thing.box)).max() <= 1.5, (shape, color)


def test_a_shape_has_its_form() -> None:
    """The fraction of the box that is filled tells the four apart."""
    shares = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "star": 0.384}
    rng = np.random.default_rng(1)
    for shape, share in shares.items():
        thing = lone(shape, "blue", rng)
        drawn = np.abs(pixels(Scene((thing,), GRAY, 0.0, 0), 256) - GRAY).max(axis=2) > 60
        x0, y0, x1, y1 = (4 * edge for edge in thing.box)
        assert drawn.sum() / ((x1 - x0) * (y1 - y0)) == pytest.approx(share, abs=0.06), shape


def test_things_turn_clockwise() -> None:
    """The tip of a triangle points up, and after a quarter turn to the right."""
    triangle = Thing("triangle", "red", "large", 32, 32, 14, COLORS["red"])
    assert triangle.outline[0] == pytest.approx((32, 18))
    assert replace(triangle, angle=90).outline[0] == pytest.approx((46, 32))
    assert replace(triangle, angle=-90).outline[0] == pytest.approx((18, 32))
    up, right = (pixels(Scene((replace(triangle, angle=angle),), GRAY, 0.0, 0)) for angle in (0, 90))
    turned = np.abs(np.rot90(up, k=-1) - right).max(axis=2) > 100
    assert turned.sum() < 10  # a pixel here and there, where an edge is rounded


@pytest.mark.parametrize(("shape", "symmetry"), [("square", 90), ("triangle", 120), ("star", 72)])
def test_turned_by_its_symmetry_a_shape_is_the_same(shape: str, symmetry: int) -> None:
    thing = lone(shape, "blue", np.random.default_rng(0), angle=7)
    again, half = replace(thing, angle=7 + symmetry), replace(thing, angle=7 + symmetry // 2)
    assert np.allclose(sorted(again.outline), sorted(thing.outline))
    assert not np.allclose(sorted(half.outline), sorted(thing.outline), atol=1)


def test_a_turned_circle_is_the_same() -> None:
    thing = lone("circle", "blue", np.random.default_rng(0))
    assert replace(thing, angle=13).outline == thing.outline


@pytest.mark.parametrize("angle", [0, 14])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_what_is_drawn(shape: str, angle: int) -> None:
    """White on black: a pixel belongs to the thing if the thing covers half of it."""
    rng = np.random.default_rng(4)
    for _ in range(5):
        thing = replace(lone(shape, "blue", rng, angle), rgb=(255, 255, 255))
        for side in (64, 128):
            mask = thing.mask(side)
            assert (mask.shape, mask.dtype) == ((side, side), np.bool_)
            assert np.array_equal(mask, pixels(Scene((thing,), 0, 0.0, 0), side)[..., 0] >= 128)
            assert np.abs(box_of(mask) - side / WORLD * np.array(thing.box)).max() <= 1.5


def test_masks_have_the_area_of_their_shape() -> None:
    areas = {"circle": math.pi, "square": 2.0, "triangle": 1.299, "star": 1.323}  # at radius 1
    rng = np.random.default_rng(5)
    for shape, area in areas.items():
        thing = lone(shape, "red", rng, angle=5)
        assert thing.mask(512).sum() / 64 == pytest.approx(area * thing.radius**2, rel=0.03), shape


def test_everything_is_inside_and_apart() -> None:
    for scene in scenes(300) + scenes(100, "unseen"):
        assert 1 <= len(scene.things) <= 5
        for thing in scene.things:
            assert min(thing.box) >= 0
            assert max(thing.box) <= WORLD
            low, high = SIZES[thing.size]
            assert low <= thing.radius <= high
            assert max(abs(a - b) for a, b in zip(thing.rgb, COLORS[thing.color], strict=True)) <= 12
        for a, b in combinations(scene.things, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_sizes_and_colors_cannot_be_confused() -> None:
    ranges = sorted(SIZES.values())
    assert all(smaller[1] + 1 < larger[0] for smaller, larger in pairwise(ranges))
    grays = [(level,) * 3 for level in range(40, 251)]
    for a, b in [*combinations(COLORS.values(), 2), *product(COLORS.values(), grays)]:
        most = max(abs(x - y) for x, y in zip(a, b, strict=True))
        assert most > 3 * 12, (a, b)  # 12: how much a color varies


def test_easy_scenes_have_one_or_two_things() -> None:
    assert {len(scene.things) for scene in scenes(100, easy=True)} == {1, 2}
    assert {len(scene.things) for scene in scenes(100)} == {1, 2, 3, 4, 5}


def test_some_scenes_have_twins_and_a_few_have_triplets() -> None:
    """So that counting and detecting take more than naming."""
    names = [[thing.name for thing in scene.things] for scene in scenes(3000)]
    several = [max(Counter(listed).values()) for listed in names if len(listed) > 1]
    assert set(several) == {1, 2, 3}
    assert 0.2 < sum(most > 1 for most in several) / len(several) < 0.3
    assert 0.01 < sum(most > 2 for most in several) / len(several) < 0.05


@pytest.mark.parametrize("supersampling", [2, 3, 5])
@pytest.mark.parametrize("reducing", [BOX, Image.Resampling.HAMMING, BICUBIC, Image.Resampling.LANCZOS])
def test_the_ways_of_drawing_differ_little(reducing: Image.Resampling, supersampling: int) -> None:
    for scene in scenes(10):
        other = np.asarray(scene.draw(64, reducing, supersampling)).astype(int)
        difference = np.abs(pixels(scene) - other)
        assert 0 < difference.mean() < 2.5
        assert difference.max() < 130  # at an edge


def test_box_takes_the_mean() -> None:
    for scene in (replace(scene, noise=0.0) for scene in scenes(5)):
        large = np.asarray(scene.draw(256, supersampling=1)).astype(float)
        means = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(pixels(scene) - means).max() <= 1  # rounded twice


def test_noise_is_as_strong_as_it_says() -> None:
    noisy = Scene((), 128, 4.0, 7)
    assert pixels(noisy).std() == pytest.approx(4, rel=0.05)
    assert pixels(Scene((), 128, 0.0, 7)).std() == 0


# Other shapes than a square


@pytest.mark.parametrize(("width", "height"), [(96, 48), (48, 96), (32, 128), (40, 40)])
def test_scenes_of_any_shape_are_drawn_as_they_say(width: int, height: int) -> None:
    for seed in range(40):
        made = make_scene(np.random.default_rng(seed), "unseen", width=width, height=height)
        scene = replace(made, noise=0.0, background=0)
        picture = scene.draw(2 * width)
        assert picture.size == (2 * width, 2 * height)
        for thing in scene.things:
            found = box_of((np.asarray(picture) == thing.rgb).all(axis=2))
            assert np.abs(found - 2 * np.array(thing.box)).max() < 5  # tips are blended
            x0, y0, x1, y1 = thing.box
            assert min(x0, y0, width - x1, height - y1) >= 0
        labels = scene.patch_labels(height // 8, width // 8)
        origin = np.array([[8 * x + 4, 8 * y + 4] * 2 for y in range(height // 8) for x in range(width // 8)])
        for box in (labels["box"] + origin)[labels["color"] > 0]:
            assert min(np.abs(box - thing.box).max() for thing in scene.things) < 1e-4
        for thing in scene.things:
            patch = width // 8 * int(thing.y / 8) + int(thing.x / 8)
            assert labels["color"][patch] == 1 + list(COLORS).index(thing.color)


def test_noise_of_other_shapes_is_new_everywhere() -> None:
    noisy = pixels(Scene((), 128, 4.0, 7, width=96, height=48), 96)
    assert noisy.shape == (48, 96, 3)
    assert noisy.std() == pytest.approx(4, rel=0.05)


def test_worlds_without_room_are_refused() -> None:
    with pytest.raises(InputError, match=r"64 x 31 units is too small: give each side at least 32"):
        make_scene(np.random.default_rng(0), height=31)


# What training never sees


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_held_out_pair_in_scenes(split: Split) -> None:
    pairs = {(thing.color, thing.shape) for scene in scenes(700, split) for thing in scene.things}
    assert len(pairs) == len(COLORS) * len(SHAPES) - len(HELD_OUT_PAIRS)  # all others do occur
    assert HELD_OUT_PAIRS.isdisjoint(pairs)


def test_every_unseen_scene_has_a_held_out_pair() -> None:
    found: set[tuple[str, str]] = set()
    for scene in scenes(300, "unseen"):
        pairs = HELD_OUT_PAIRS.intersection((thing.color, thing.shape) for thing in scene.things)
        assert pairs
        found |= pairs
    assert found == HELD_OUT_PAIRS


def test_every_color_and_every_shape_is_seen_in_training() -> None:
    seen = {(color, shape) for color in COLORS for shape in SHAPES} - HELD_OUT_PAIRS
    assert {color for color, _ in seen} == set(COLORS)
    assert {shape for _, shape in seen} == set(SHAPES)


# Captions


def test_a_caption_goes_from_left_to_right() -> None:
    for scene in scenes(200):
        places = [thing.x for thing in scene.things]
        assert all(left + 3 < right for left, right in pairwise(places))
        assert scene.caption() == ", ".join(f"a {t.size} {t.color} {t.shape}" for t in scene.things)


# Labels of patches


@pytest.mark.parametrize("grid", [4, 8, 16])
def test_patch_labels_agree_with_the_picture(grid: int) -> None:
    colors = np.array(list(COLORS.values()))
    side = 512
    checked = 0
    for seed in range(30):
        made = make_scene(np.random.default_rng(seed))
        scene = Scene(made.things, GRAY, 0.0, 0)
        picture, labels, cell = pixels(scene, side), scene.patch_labels(grid), side // grid
        for number in range(grid * grid):
            row, column = divmod(number, grid)
            middle = picture[
                row * cell + cell // 2 - 2 : row * cell + cell // 2 + 2,
                column * cell + cell // 2 - 2 : column * cell + cell // 2 + 2,
            ]
            is_ground = np.abs(middle - GRAY).max() == 0
            color = labels["color"][number]
            if not is_ground and middle.reshape(-1, 3).std(axis=0).max() < 1:  # wholly inside a thing
                mean = middle.reshape(-1, 3).mean(axis=0)
                assert color == 1 + np.abs(colors - mean).sum(axis=1).argmin(), (seed, number)
                checked += 1
            if color == 0:
                assert is_ground, (seed, number)
                assert labels["shape"][number] == labels["size"][number] == 0
                assert not labels["box"][number].any()
            else:
                origin = (np.array([column, row, column, row]) + 0.5) * WORLD / grid
                box = labels["box"][number] + origin
                (thing,) = [t for t in scene.things if np.abs(np.array(t.box) - box).max() < 1e-4]
                x, y = origin[:2]
                rims = {t: math.hypot(t.x - x, t.y - y) - t.radius for t in scene.things}
                assert rims[thing] == min(rims.values())  # the nearest one
                assert color == 1 + list(COLORS).index(thing.color)
                assert labels["shape"][number] == 1 + SHAPES.index(thing.shape)
                assert labels["size"][number] == 1 + list(SIZES).index(thing.size)
    assert checked > 50


def test_every_thing_lies_on_some_patch() -> None:
    for scene in scenes(100):
        labels = scene.patch_labels(8)
        for thing in scene.things:
            x, y = (int(value / WORLD * 8) for value in (thing.x, thing.y))
            assert labels["color"][8 * y + x] == 1 + list(COLORS).index(thing.color)
