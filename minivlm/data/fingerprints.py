"""Which pictures are the same, and which look alike, whatever their files are called.

Two pictures are the same if every pixel is, as a model sees it: upright, in RGB. Two that look alike have
nearly the same perceptual hash (pHash, C. Zauner, 2010): the picture in gray, shrunk to 32 x 32, as the
waves of a cosine transform, of which the 8 x 8 slowest count; each is a bit, 1 if it is above the median.
Saving with losses, resizing or brightening leaves most bits as they are. A crop or a mirrored copy is not
found, and two drawings of few parts may look alike without being related: it is a hint, to be looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from minivlm.processing import load_picture, to_rgb

SIDE, WAVES = 32, 8
ALIKE = 4  # bits of 64 in which pictures that look alike differ, at most

Key = TypeVar("Key", bound=Hashable)


class Fingerprint(NamedTuple):
    """What a picture shows, in a few bytes."""

    content: str  # changes with any pixel
    look: int  # 64 bits of which few change with what the eye does not see


def fingerprint(path: Path) -> Fingerprint:
    """Raises InputError: the picture is missing or damaged."""
    picture = to_rgb(load_picture(path))
    content = hashlib.sha256(f"{picture.width} x {picture.height}".encode() + picture.tobytes())
    return Fingerprint(content.hexdigest(), perceptual_hash(picture))


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits of an RGB picture."""
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    places = np.arange(SIDE)
    waves = np.cos(np.pi * (2 * places + 1) * np.arange(WAVES)[:, None] / (2 * SIDE))  # [8, 32]
    strengths = (waves @ np.asarray(small, dtype=np.float64) @ waves.T).round(6).ravel()
    bits = strengths > np.median(strengths[1:])  # the first is the mean brightness
    return int("".join("1" if bit else "0" for bit in bits), 2)


def look_alike(pictures: Mapping[Key, Fingerprint]) -> list[tuple[Key, Key]]:
    """Pairs that look alike but are not the same, each picture with the first one that it looks like."""
    firsts: dict[str, Key] = {}
    for key, one in pictures.items():
        firsts.setdefault(one.content, key)
    first = list(firsts.values())
    looks = np.array([pictures[key].look for key in first], dtype=np.uint64)
    ones = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
    pairs = []
    for number in range(1, len(looks)):
        apart = ones[(looks[:number] ^ looks[number]).view(np.uint8).reshape(number, 8)].sum(axis=1)
        if apart.min() <= ALIKE:
            pairs.append((first[int((apart <= ALIKE).argmax())], first[number]))
    return pairs
