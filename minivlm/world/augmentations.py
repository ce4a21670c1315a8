"""Augmentations of a scene: other backgrounds, rotated things, blur, JPEG, other programs' edges.

A model that has seen only one renderer learns that renderer's pixels. But another program draws the edges of
a shape differently, a picture from the Web is compressed, and few triangles are perfectly upright. So half of
the training pictures are changed here at random. What they show, and what is true about them, stays the same.

Rotating a thing changes its box and its outline, so scenes are varied before questions are asked about them.
`as_photographed` leaves things where they are.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from minivlm.world.scenes import Scene

PLAIN_SHARE = 0.5  # fraction of training pictures that stay as they are
MOST_DEGREES = 20  # largest rotation of a thing in training
GRAYS = (0, 251)  # of the background in training; `make_scene` starts at 165
TINTED = (60, 251)  # the gray level that a tint changes
STRONGEST_TINT = 60  # in each of red, green and blue
APART = 75.0  # distance of a tinted background from the color of every thing on it
FILTERS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def on_gray(scene: Scene, rng: np.random.Generator, least: int, below: int) -> Scene:
    """The scene on another background: a gray level from `least` to `below` - 1."""
    return replace(scene, background=int(rng.integers(least, below)))


def on_tint(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene on a colored background, such as beige or pale green, that no thing blends into."""
    while True:
        red, green, blue = rng.integers(-STRONGEST_TINT, STRONGEST_TINT + 1, size=3).tolist()
        other = replace(on_gray(scene, rng, *TINTED), tint=(red, green, blue))
        if all(math.dist(other.ground, thing.rgb) >= APART for thing in scene.things):
            return other


def turned(scene: Scene, rng: np.random.Generator, degrees: int) -> Scene:
    """Each thing rotated by a whole number of degrees, at most `degrees` in either direction."""
    angles = rng.integers(-degrees, degrees + 1, size=len(scene.things)).tolist()
    things = [replace(thing, angle=angle) for thing, angle in zip(scene.things, angles, strict=True)]
    return replace(scene, things=tuple(things))


def half_as_large(scene: Scene, rng: np.random.Generator | None = None) -> Scene:
    """The same things at the same places, half as large: drawn twice as wide, they have as many pixels."""
    things = [replace(thing, radius=thing.radius / 2) for thing in scene.things]
    return replace(scene, things=tuple(things))


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture after compression, with its blocks and halos; quality 1 (worst) to 95."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def varied(scene: Scene, rng: np.random.Generator) -> Scene:
    """For training: another background half of the time (gray or tinted), rotated things half of the time."""
    if rng.random() < 0.5:
        scene = on_gray(scene, rng, *GRAYS) if rng.random() < 0.5 else on_tint(scene, rng)
    if rng.random() < 0.5:
        scene = turned(scene, rng, MOST_DEGREES)
    return scene


def as_photographed(scene: Scene, pixels: int, rng: np.random.Generator) -> Image.Image:
    """For training: the scene with other edges, and sometimes lighter or darker, blurred, or as a JPEG."""
    reducing = FILTERS[rng.integers(len(FILTERS))]
    lighter, blurred, compressed = rng.random(3)
    picture = scene.draw(pixels, reducing, supersampling=int(rng.integers(2, 6)))
    if lighter < 0.3:
        picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.85, 1.15))
    if blurred < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if compressed < 0.3:
        picture = as_jpeg(picture, int(rng.integers(35, 96)))
    return picture
