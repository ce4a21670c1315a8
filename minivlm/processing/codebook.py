"""The vector-quantized autoencoder that turns a mask into 16 codes, and 16 codes into a mask.

A 64 x 64 mask is reduced to 4 x 4 vectors (https://arxiv.org/abs/2301.02229). A code is not a sixteenth of
the mask: each sees far beyond its cell, so only codes that fit together draw a good mask. The layers and
their names are those of the published codebook (big_vision, `vae-oid.npz`), which can be loaded as well.
"""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.files import write_aside

NUM_CODES = 128
MASK_SIDE = 64  # pixels, height = width
GRID = 4  # codes, height = width
CODES_PER_MASK = GRID * GRID
SHIPPED_MASKS = Path(__file__).parents[1] / "assets" / "masks.npz"


@dataclass(frozen=True)
class MaskCodebookConfig:
    """Widths of the autoencoder. The defaults are those of the shipped one."""

    encoder_widths: tuple[int, ...] = (8, 16, 32, 32)  # after each of four halvings
    decoder_widths: tuple[int, ...] = (32, 32, 16, 8, 8)  # before the first of four doublings, and after each
    embedding_dim: int = 16

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> MaskCodebookConfig:
        """From the shapes in a file. The published decoder: 128, 128, 64, 32, 16; its codes: 512."""
        return cls(
            encoder_widths=tuple(shapes[f"encoder.{number}.bias"][0] for number in (0, 2, 4, 6)),
            decoder_widths=tuple(shapes[f"decoder.{number}.bias"][0] for number in (0, 4, 6, 8, 10)),
            embedding_dim=shapes["encoder.10.bias"][0],
        )


class MaskCodebook(nn.Module):
    """The autoencoder, with the codes between its two halves. Shapes: M masks, D numbers per code."""

    def __init__(self, config: MaskCodebookConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MaskCodebookConfig()
        widths = config.encoder_widths
        halvings: list[nn.Module] = []
        for before, after in pairwise((1, *widths)):
            # For this kernel and an even length, TensorFlow's SAME padding is one pixel on each side.
            halvings += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(
            *halvings,
            _Residual(widths[-1]),
            _Residual(widths[-1]),
            nn.Conv2d(widths[-1], config.embedding_dim, 1),
        )
        widths = config.decoder_widths
        doublings: list[nn.Module] = []
        for before, after in pairwise(widths):
            doublings += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(
            nn.Conv2d(config.embedding_dim, widths[0], 1),
            nn.ReLU(),
            _Residual(widths[0]),
            _Residual(widths[0]),
            *doublings,
            nn.Conv2d(widths[-1], 1, 1),
        )
        self._vq_vae = _Codes(config.embedding_dim)

    @property
    def codes(self) -> nn.Parameter:
        """The learned vectors [128, D]."""
        return self._vq_vae._embedding

    def encode(self, masks: Tensor) -> Tensor:
        """Masks [M, 64, 64] with values from 0 to 1 as codes [M, 16], row by row.

        Raises InputError: masks of another shape.
        """
        if masks.shape[1:] != (MASK_SIDE, MASK_SIDE):
            raise InputError(
                f"the masks are {list(masks.shape)}: expected [M, {MASK_SIDE}, {MASK_SIDE}], see crop_mask"
            )
        return self.nearest(self.vectors(masks))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [M, 16] as masks [M, 64, 64]: about -1 outside, 1 inside, and 0 along the outline.

        Raises InputError: a wrong number of codes, or a code outside 0 to 127.
        """
        if codes.shape[1:] != (CODES_PER_MASK,):
            raise InputError(f"the codes are {list(codes.shape)}: expected [M, {CODES_PER_MASK}]")
        if ((codes < 0) | (codes >= NUM_CODES)).any():
            raise InputError(f"codes are {codes.min()} to {codes.max()}: expected 0 to {NUM_CODES - 1}")
        return self._draw(self.codes[codes])

    def forward(self, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: decoded masks [M, 64, 64], the encoder's vectors [M, 16, D] and the nearest codes.

        Choosing a code has no gradient. The decoder's gradient skips that step and goes to the encoder, as if
        its own vectors had been decoded (straight-through).
        """
        vectors = self.vectors(masks)
        chosen = self.codes[self.nearest(vectors)]
        return self._draw(vectors + (chosen - vectors).detach()), vectors, chosen

    def vectors(self, masks: Tensor) -> Tensor:
        """Masks [M, 64, 64] as vectors [M, 16, D], before each is replaced by a code."""
        grid: Tensor = self.encoder(2.0 * masks[:, None] - 1.0)  # [M, D, 4, 4]
        return grid.flatten(2).transpose(1, 2)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Indices [...] of the codes nearest to vectors [..., D]."""
        # |v - e|^2 without |v|^2, which is the same for all codes
        return (self.codes.square().sum(-1) - 2.0 * vectors @ self.codes.T).argmin(-1)

    def _draw(self, vectors: Tensor) -> Tensor:
        grid = vectors.transpose(1, 2).unflatten(2, (GRID, GRID))  # [M, D, 4, 4]
        masks: Tensor = self.decoder(grid)  # [M, 1, 64, 64]
        return masks[:, 0]

    @classmethod
    def from_file(cls, path: str | Path = SHIPPED_MASKS) -> MaskCodebook:
        """Load a codebook from an npz file, with the widths that the file has.

        Raises InputError: not an npz file, or arrays that are missing, unexpected or misshapen.
        """
        arrays = _read(Path(path))
        with torch.device("meta"):  # no weights, only names and shapes
            names = cls().state_dict().keys()
        _refuse(path, "has no", [name for name in names if name not in arrays])
        # Running sums from training may be stored next to the codes.
        others = [name for name in arrays if name not in names and not name.startswith("_vq_vae.")]
        _refuse(path, "has the unexpected", others)
        biases = [name for name in names if name.endswith(".bias")]
        shapeless = [name for name in biases if arrays[name].ndim != 1 or arrays[name].size == 0]
        _refuse(path, "has no 1-D array of numbers in", shapeless)
        with torch.device("meta"):
            codebook = cls(MaskCodebookConfig.from_shapes({name: arrays[name].shape for name in biases}))
        for name, weight in codebook.state_dict().items():
            array = arrays[name]
            if array.shape != weight.shape:
                _refuse(path, f"has {list(array.shape)} instead of {list(weight.shape)} in", [name])
            if not (np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all()):
                _refuse(path, "has values other than finite floats in", [name])
        weights = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in names}
        codebook.load_state_dict(weights, assign=True)
        return codebook.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write an npz file; equal weights give identical files. Raises InputError: it cannot be written."""
        arrays: dict[str, Any] = {name: value.numpy(force=True) for name, value in self.state_dict().items()}
        with write_aside(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


class _Residual(nn.Module):
    """x + convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class _Codes(nn.Module):
    """The learned vectors, under their published name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._embedding = nn.Parameter(torch.randn(NUM_CODES, dim))


def _read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file. Nothing pickled is loaded."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if arrays.zip.testzip():  # NumPy alone does not always verify the checksums
                raise zipfile.BadZipFile
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is another kind of file, or truncated"
        raise InputError(
            f"{path} cannot be read as an npz file ({reason}): expected a mask codebook"
        ) from error


def _refuse(path: str | Path, what: str, names: Sequence[str]) -> None:
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise InputError(
            f"{path} {what} {listed}: expected a complete mask codebook, encoder, codes and decoder, "
            "named as in vae-oid.npz"
        )


@functools.cache
def load_codebook() -> MaskCodebook:
    """The shipped codebook, read once and shared: do not modify it."""
    return MaskCodebook.from_file()
