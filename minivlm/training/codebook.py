"""Training the small codebook of masks from nothing, on drawn figures, in minutes on one core.

More than half of the figures are shapes of the drawn world at any angle. The others are ellipses, polygons,
blobs, rings and unions of them, so that the codebook is good for other things too. Every mask fills its box.

Three things keep the codes useful:

- A code that is never the nearest gets no gradient and would stay unused. After a while it is moved to where
  the vectors are.
- A code that changes with every small turn of a figure is one that a language model cannot guess from a
  picture. So each figure is drawn twice, turned a little and with other pixels, and the vectors of each
  drawing are pulled toward the codes of the other.
- The encoder sees masks with noise, and has to recognize what is under it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from minivlm.errors import InputError
from minivlm.evaluation.waiting import Bar
from minivlm.processing.codebook import MASK_SIDE, NUM_CODES, MaskCodebook
from minivlm.training.schedule import cosine_fall, warm_up

CORNERS = {"circle": 64, "square": 4, "triangle": 3, "star": 10}
OTHER_KINDS = ("ellipse", "polygon", "blob", "ring", "union")

SHAPE_SHARE = 0.6  # of figures that are shapes of the drawn world
PIXELS = (12, 160)  # smallest and largest length of a figure before it is resized
PAIRS = 32  # figures per step, each drawn twice
TURN = 10.0  # degrees; the two drawings differ by at most this angle
NOISE = 0.2  # standard deviation, where a mask is 0 to 1
PEAK_RATE = 2e-3
WARMUP_STEPS = 100
COMMITMENT = 0.25  # weight of the distance from a vector to its own code
STABILITY = 0.5  # weight of the distance to the code of the other drawing
PATIENCE = 50  # steps that a code may stay unused
SETTLED = 0.7  # share of the steps after which unused codes are left alone


@dataclass(frozen=True)
class Figure:
    """The union of outlines [corners, 2], minus a hole, in any unit, with y pointing down."""

    outlines: tuple[np.ndarray, ...]
    hole: np.ndarray | None = None

    def draw(self, pixels: float, turn: float = 0.0) -> np.ndarray:
        """Turned clockwise by radians, drawn `pixels` long, cropped to its box: values 0 to 1, [64, 64]."""
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        points = np.concatenate(self.outlines) @ rotation
        low, high = points.min(0), points.max(0)
        scale = pixels / (high - low).max()
        width, height = (max(2, round(float(side))) for side in (high - low) * scale)
        mask = Image.new("L", (width, height))
        pen = ImageDraw.Draw(mask)
        for outline in self.outlines if self.hole is None else (*self.outlines, self.hole):
            corners = (outline @ rotation - low) * scale - 0.5  # PIL counts from the center of a pixel
            pen.polygon([(x, y) for x, y in corners.tolist()], fill=0 if outline is self.hole else 255)
        small = mask.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR)
        return np.asarray(small, dtype=np.float32) / 255


def shape_outline(shape: str, angle: float = 0.0) -> np.ndarray:
    """Corners [corners, 2] of a drawn world's shape of radius 1 around 0, turned clockwise by radians."""
    numbers = np.arange(CORNERS[shape])
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    radii = np.where(numbers % 2, 0.45 if shape == "star" else 1.0, 1.0)
    return _around(start + angle + 2 * math.pi * numbers / len(numbers), radii)


def random_figure(rng: np.random.Generator, shapes: float = SHAPE_SHARE) -> Figure:
    """A shape of the drawn world with probability `shapes`, often nearly upright, or another figure."""
    if rng.random() < shapes:
        shape = tuple(CORNERS)[rng.integers(len(CORNERS))]
        widest = math.pi / 6 if rng.random() < 0.6 else math.pi
        return Figure((shape_outline(shape, rng.uniform(-widest, widest)),))
    kind = OTHER_KINDS[rng.integers(len(OTHER_KINDS))]
    if kind == "ring":
        outline = _random_outline("blob" if rng.random() < 0.5 else "ellipse", rng)
        return Figure((outline,), hole=outline * rng.uniform(0.3, 0.75))
    if kind == "union":
        parts = [_random_outline(OTHER_KINDS[rng.integers(3)], rng) for _ in range(rng.integers(2, 4))]
        return Figure(tuple(part * rng.uniform(0.4, 1.0) + rng.uniform(-0.7, 0.7, 2) for part in parts))
    return Figure((_random_outline(kind, rng),))


def _random_outline(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Corners [corners, 2] of an ellipse, a polygon or a blob around 0."""
    if kind == "ellipse":
        points = shape_outline("circle") * (1.0, rng.uniform(0.25, 1.0))
        turn = rng.uniform(0, math.pi)
        return points @ np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    if kind == "polygon":
        angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 9)))
        return _around(angles, rng.uniform(0.4, 1.0, len(angles)))
    angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    waves = np.arange(1, 6)[
        :, None
    ]  # the radius of a blob rises and falls one to five times on the way around
    heights = rng.normal(0, 0.25, (5, 1)) / np.sqrt(waves)
    phases = rng.uniform(0, 2 * math.pi, (5, 1))
    return _around(angles, np.exp((heights * np.cos(waves * angles + phases)).sum(0)))


def _around(angles: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Points [corners, 2] at angles and distances from 0."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def train_masks(out: Path, steps: int = 2500, seed: int = 0, progress: bool | None = None) -> MaskCodebook:
    """Train a codebook from nothing and write it to `out`, an npz file.

    progress: True shows a bar, False none, None a bar on a terminal, lines elsewhere.
    Raises InputError: no steps; a file that is there already, or cannot be written.
    """
    if steps < 1:
        raise InputError(f"{steps} steps train nothing: choose 1 or more")
    _check_out(out)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        codebook = MaskCodebook()
    optimizer = torch.optim.AdamW(codebook.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    idle = torch.zeros(NUM_CODES)
    bar = Bar(range(steps), unit="step", progress=progress)
    for step in bar:
        rate = PEAK_RATE * warm_up(step, WARMUP_STEPS) * cosine_fall(step, steps)
        optimizer.param_groups[0]["lr"] = rate
        masks = torch.from_numpy(_pairs(rng))
        noisy = masks + NOISE * torch.randn(masks.shape, generator=generator)
        if step / steps < SETTLED:
            _revive(codebook, noisy, idle, generator, first=step == 0)
        drawing, others = _losses(codebook, masks, noisy)
        optimizer.zero_grad()
        (drawing + others).backward()
        optimizer.step()
        if step % 50 == 49:
            bar.set_postfix(drawing=f"{drawing.item():.3f}", others=f"{others.item():.3f}")
    codebook.eval().requires_grad_(False)
    codebook.save(out)
    return codebook


def _check_out(out: Path) -> None:
    """Before training, not after it. Raises InputError: the file is there already, or cannot be written."""
    if os.path.lexists(out):
        raise InputError(f"{out} already exists, and training would replace it: choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}. Choose another folder") from error


def _pairs(rng: np.random.Generator) -> np.ndarray:
    """Masks [2 x 32, 64, 64]: 32 figures, then the same ones, turned a little and with other pixels."""
    first, second = [], []
    for _ in range(PAIRS):
        figure = random_figure(rng)
        turn = math.radians(rng.uniform(-TURN, TURN))
        first.append(figure.draw(_random_length(rng)))
        second.append(figure.draw(_random_length(rng), turn))
    return np.stack(first + second)


def _random_length(rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(math.log(PIXELS[0]), math.log(PIXELS[1])))


def _losses(codebook: MaskCodebook, masks: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """How far the drawing is from the masks, and how far vectors and codes are from where they belong."""
    drawn, vectors, codes = codebook(noisy)
    drawing = F.mse_loss(drawn, 2.0 * masks - 1.0)
    to_vectors = F.mse_loss(codes, vectors.detach())  # moves the codes
    to_codes = F.mse_loss(vectors, codes.detach())  # moves the vectors
    to_others = F.mse_loss(vectors, codes.detach().roll(PAIRS, 0))
    # As a share of the variance: otherwise small vectors would do as well as stable ones.
    unstable = to_others / vectors.flatten(0, 1).var(0).mean()
    return drawing, to_vectors + COMMITMENT * to_codes + STABILITY * unstable


@torch.no_grad()
def _revive(
    codebook: MaskCodebook, masks: Tensor, idle: Tensor, generator: torch.Generator, first: bool
) -> None:
    """Move codes that were not used for long, and at the first step all codes, onto random vectors of masks.

    idle: for each code, the steps since it was used; updated here.
    """
    vectors = codebook.vectors(masks).flatten(0, 1)
    idle += 1
    idle[codebook.nearest(vectors)] = 0
    dead = (idle > PATIENCE) | first
    count = int(dead.sum())
    if count:
        codebook.codes[dead] = vectors[torch.randint(len(vectors), (count,), generator=generator)]
        idle[dead] = 0
