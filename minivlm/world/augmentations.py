"""Other ways to see a scene: other grounds, turned things, blur, JPEG, other programs' edges.

A model that has only seen one renderer learns its pixels. The edges of a shape look different when another
program drew it, a picture from the Web was compressed, and nobody hangs a triangle straight. Half of the
training pictures are therefore changed here at random; what they show, and what is true about them, is not.

Turning a thing changes its box and its outline, so scenes are varied before questions are made about them.
Everything in `as_photographed` leaves things where they are.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from minivlm.world.scenes import Scene

PLAIN_SHARE = 0.5  # of training pictures that stay as they are
MOST_DEGREES = 20  # by which a thing is turned in training
GRAYS = (40, 251)  # of the ground in training; `make_scene` draws from 165 on
FILTERS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.HAMMING,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def on_gray(scene: Scene, rng: np.random.Generator, least: int, below: int) -> Scene:
    """The scene on another ground: a gray level from `least` to `below` - 1."""
    return replace(scene, background=int(rng.integers(least, below)))


def turned(scene: Scene, rng: np.random.Generator, degrees: int) -> Scene:
    """Each thing turned by a whole number of degrees, up to `degrees` to either side."""
    angles = rng.integers(-degrees, degrees + 1, size=len(scene.things)).tolist()
    things = [replace(thing, angle=angle) for thing, angle in zip(scene.things, angles, strict=True)]
    return replace(scene, things=tuple(things))


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """The picture after compression, with its blocks and halos; quality 1 (worst) to 95."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def varied(scene: Scene, rng: np.random.Generator) -> Scene:
    """For training: in half of the cases another ground, in half turned things."""
    if rng.random() < 0.5:
        scene = on_gray(scene, rng, *GRAYS)
    if rng.random() < 0.5:
        scene = turned(scene, rng, MOST_DEGREES)
    return scene


def as_photographed(scene: Scene, pixels: int, rng: np.random.Generator) -> Image.Image:
    """For training: the scene with other edges, and now and then lighter or darker, blurred, as a JPEG."""
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
