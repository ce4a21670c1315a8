"""From a picture file to the numbers that the image tower reads: [B, C, H, W], fp32, in [-1, 1].

Open, rotate upright, convert to RGB, resize to a square (the aspect ratio is not kept), rescale to [0, 1],
normalize. The last three steps match the PIL image processor of SigLIP (https://arxiv.org/abs/2303.15343) in
`transformers` bit for bit. The tower was trained on exactly these pixels, and another library's bicubic
filter gives different ones (torchvision without antialiasing is off by up to 26 of 255 levels). The first
steps accept any picture a user may have. CLIP and the original ViT resize differently: see crops.py.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.processing.tars import open_member, tar_of

# 2 and 3 in preprocessor_config.json
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC

Fitted = Literal["squeezed", "cropped", "padded", "kept"]

MAX_SIDE = 2**17  # pixels; the widest JPEG has half as many

BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of a TIFF
SMALLER_WHITES = [2**bits - 1 for bits in range(9, 16)]


def load_picture(path: str | Path) -> Image.Image:
    """Open a picture file and decode it completely; of an animation, only the first frame.

    The picture is returned as it was stored, in any mode and not yet upright: `to_rgb` takes care of both.

    Raises InputError: no such file, a folder, an empty file, not a picture, a truncated or damaged picture,
    a picture with so many pixels that Pillow warns of a decompression bomb or with a side above MAX_SIDE, a
    file without read permission.
    """
    path = Path(path)
    with open_file(path, "picture") as file, explained(path):
        image = Image.open(file)
        check_sides(image)
        image.load()  # Image.open reads only the header; truncation shows up here
        return image


@contextmanager
def open_header(path: str | Path) -> Iterator[Image.Image]:
    """A picture file of which only the header is read: its size and mode, but no pixels yet.

    Raises InputError: as `open_file`; it is no picture.
    """
    path = Path(path)
    with open_file(path, "picture") as file, explained(path), Image.open(file) as image:
        yield image


def open_file(path: Path, kind: str) -> BinaryIO:
    """Open a picture, or a file of another kind, to read its bytes. It may lie in a tar, see tars.py.

    Raises InputError: no such file, a folder, a device, an empty file, a file without read permission.
    """
    if not os.path.exists(path) and (tar := tar_of(path)) is not None:
        return open_member(tar, path.relative_to(tar).as_posix())
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, not a {kind}: name one {kind} in it")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file: check the path of the {kind}")
    if not os.path.isfile(path):
        raise InputError(f"{path} is a device or a pipe, not a {kind}: save the {kind} to a file first")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise InputError(f"{path} is empty: copy or download the {kind} again")
    return file


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever Pillow raises about a file as an InputError; its warnings are silenced."""
    try:
        with _quiet_pillow():
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit against decompression bombs: "
            "make the picture smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture in a known format: use PNG, JPEG or WebP") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        if "MAX_TEXT" in str(error):
            raise InputError(
                f"{path} has a color profile or a text of more than {PngImagePlugin.MAX_TEXT_CHUNK} bytes, "
                "the limit against decompression bombs: save the picture again without it"
            ) from error
        raise InputError(f"{path} is truncated or damaged ({error}): copy or download it again") from error


def check_sides(image: Image.Image) -> None:
    """Raises InputError: a side so long that resizing would take gigabytes, however few pixels there are."""
    if max(image.size) > MAX_SIDE:
        raise InputError(
            f"the picture has {image.width} x {image.height} pixels: expected at most {MAX_SIDE} on a side. "
            "Crop it to the part that matters"
        )


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings, except that a decompression bomb becomes an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as upright 8-bit RGB. The given picture is not changed.

    - A camera stores pixels in the sensor's orientation and notes the rotation in EXIF: it is applied here.
    - Transparent pixels are blended onto white, as in the reference. (Its older versions and big_vision drop
      the alpha channel instead, which reveals the hidden color of transparent pixels, often black.)
    - 16-bit gray (I;16 and its byte orders) is scaled by 255/65535. Pillow's own conversion clips at 255
      instead, which turns nearly all of a 16-bit scan white. A TIFF may say that fewer bits are used: by
      BitsPerSample, or by a MaxSampleValue such as 4095, unless a pixel is brighter. Where a file holds 12
      bits in 16 without a word, nothing tells it from a dark picture, and it stays dark: scale it first.
    - 32-bit integers (I) and floats (F) do not define white. White is the smallest of 1 (F only), 255 and
      65535 that is not below the brightest pixel, or else the brightest pixel itself. Negative values and NaN
      become black.

    Raises InputError: a picture without pixels or with a side above MAX_SIDE; a mode that Pillow cannot
    convert; a picture opened lazily by the caller that turns out to be truncated.
    """
    if 0 in image.size:
        raise InputError(f"the picture has {image.width} x {image.height} pixels: expected at least 1 x 1")
    check_sides(image)
    with _quiet_pillow():
        try:
            image.load()
            # From tags that a turned copy no longer has.
            white = _white_of_16_bits(image) if image.mode.startswith("I;16") else None
            with suppress(Exception):  # a damaged EXIF note is no reason to reject the pixels
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                return _gray_to_rgb(image, white)
            if image.has_transparency_data:
                return _over_white(image)
            return image.convert("RGB")
        except Exception as error:  # see `explained`
            raise InputError(f"the picture (mode {image.mode}) cannot be read as RGB: {error}") from error


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # gray with premultiplied alpha: Pillow converts it only to LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _white_of_16_bits(image: Image.Image) -> float:
    """What white is in a file of 16-bit gray: 65535, or less where the tags of a TIFF say so."""
    said = []
    with suppress(Exception):  # other files have no tags, and damaged ones are no reason to reject the pixels
        tags = image.tag_v2  # type: ignore[attr-defined]
        said += [2**bits - 1 for bits in tags.get(BITS_PER_SAMPLE, ())]
        said += tags.get(MAX_SAMPLE_VALUE, ())
    # Other numbers are only what the brightest pixel has.
    said = [white for white in said if white in SMALLER_WHITES]
    brightest = np.asarray(image).max() if said else 0
    return float(min((white for white in said if white >= brightest), default=65535))


def _gray_to_rgb(image: Image.Image, white: float | None) -> Image.Image:
    """Scale gray values so that `white` becomes 255; None chooses white as `to_rgb` describes."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if white is None:
        brightest = float(values.max(initial=0, where=np.isfinite(values)))
        levels = [255.0, 65535.0] if image.mode == "I" else [1.0, 255.0, 65535.0]
        white = next((level for level in levels if brightest <= level), brightest)
    gray = np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


def rescale_and_normalize(
    picture: Image.Image, mean: Sequence[float], std: Sequence[float], rescale_factor: float
) -> Tensor:
    """An RGB picture as fp32 [C, H, W]: rescaled in float64, rounded once, then (pixels - mean) / std."""
    pixels = (np.asarray(picture).astype(np.float64) * rescale_factor).astype(np.float32)
    normalized = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))  # [H, W, C] -> [C, H, W]


def preprocess(
    image: Image.Image,
    image_size: int,
    mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
    rescale_factor: float = 1 / 255,
) -> Tensor:
    """A picture of any size and mode as fp32 [C, image_size, image_size], in [-1, 1] with the defaults.

    Matches `transformers`' SiglipImageProcessorPil on RGB pictures bit for bit, for which the dtypes in
    `rescale_and_normalize` matter.

    Raises InputError: as `to_rgb`.
    """
    resized = to_rgb(image).resize((image_size, image_size), BICUBIC)
    return rescale_and_normalize(resized, mean, std, rescale_factor)


@dataclass(frozen=True)
class ImageProcessor:
    """The settings of `preprocess`, as in the Hub's preprocessor_config.json.

    `image_seq_length` is the number of image tokens per picture, N = (image_size / patch_size)^2. Pixels do
    not depend on it, but PaliGemma's file stores it here, and the prompt needs it. SigLIP's own files lack
    it: None.
    """

    kind: ClassVar[str] = "SiglipImageProcessor"  # image_processor_type without "Fast" or "Pil"
    old_kind: ClassVar[str] = "SiglipFeatureExtractor"  # what old files say instead
    # Settings that affect pixels, each with the only value supported here.
    supported: ClassVar[dict[str, bool]] = {
        "do_resize": True,
        "do_center_crop": False,
        "do_pad": False,
        "do_rescale": True,
        "do_normalize": True,
    }

    image_size: int = 224  # pixels, height = width
    image_seq_length: int | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # after rescaling, one per channel
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = int(BICUBIC)  # SigLIP 2 has 2, bilinear

    def __post_init__(self) -> None:
        if self.resample not in (BILINEAR, BICUBIC):
            raise InputError(
                f"resample is {self.resample}: only 2 (bilinear) and 3 (bicubic) are supported here"
            )
        if self.image_size < 1:
            raise InputError(f"image_size is {self.image_size}: expected at least 1 pixel")
        if self.image_seq_length is not None and self.image_seq_length < 1:
            raise InputError(f"image_seq_length is {self.image_seq_length}: expected at least 1 image token")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise InputError(
                    f"{name} has {len(getattr(self, name))} numbers: expected 3, for red, green, blue"
                )
        if 0 in self.image_std:
            raise InputError("image_std contains 0, which pixels cannot be divided by: use 0.5 for SigLIP")

    @property
    def fitted(self) -> Fitted:
        """How a long picture becomes a square; or that it does not, and is kept."""
        return "squeezed"

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any sizes and modes -> pixel_values [B, C, H, W], fp32.

        Raises InputError: no pictures; otherwise as `to_rgb`.
        """
        if not images:
            raise InputError("there are no pictures: give at least one")
        settings = self.image_mean, self.image_std, self.rescale_factor
        return torch.stack([rescale_and_normalize(self.fit(image), *settings) for image in images])

    def fit(self, image: Image.Image) -> Image.Image:
        """Any picture -> RGB of image_size x image_size. The aspect ratio is not kept."""
        return to_rgb(image).resize((self.image_size, self.image_size), Image.Resampling(self.resample))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of a preprocessor_config.json. Missing settings take the defaults of the class.

        Raises InputError: a setting that would give different pixels, or a value of the wrong type.
        """
        kind = values.get("image_processor_type") or values.get("feature_extractor_type") or cls.kind
        if kind not in (cls.kind, f"{cls.kind}Fast", f"{cls.kind}Pil", cls.old_kind):
            raise InputError(f"image_processor_type is {kind!r}: only {cls.kind!r} is supported here")
        for name, expected in cls.supported.items():
            value = values.get(name)
            if value is not None and value != expected:
                raise InputError(f"{name} is {value!r}: only {expected!r} is supported here")
        default = cls()
        try:
            length = values.get("image_seq_length")
            resample = values.get("resample")
            return cls(
                **cls._read_size(values),
                image_seq_length=None if length is None else int(length),
                image_mean=tuple(float(value) for value in values.get("image_mean") or default.image_mean),
                image_std=tuple(float(value) for value in values.get("image_std") or default.image_std),
                rescale_factor=float(values.get("rescale_factor") or default.rescale_factor),
                resample=default.resample if resample is None else int(resample),
            )
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"a value has the wrong type: {error}") from error

    @classmethod
    def _read_size(cls, values: Mapping[str, Any]) -> dict[str, int]:
        """The fields that say how large pictures become."""
        size = values.get("size") or {"height": 224, "width": 224}
        if (
            not isinstance(size, Mapping)
            or size.get("height") is None
            or size.get("height") != size.get("width")
        ):
            raise InputError(f"size is {size!r}: expected a square such as {{'height': 224, 'width': 224}}")
        return {"image_size": int(size["height"])}

    def _size_to_dict(self) -> dict[str, Any]:
        return {"size": {"height": self.image_size, "width": self.image_size}}

    def to_dict(self) -> dict[str, Any]:
        """The contents of a preprocessor_config.json, which `transformers` reads the same way."""
        # Only PaliGemma has image_seq_length. Other systems name their processor in tokenizer_config.json.
        system = {} if self.image_seq_length is None else {"processor_class": "PaliGemmaProcessor"}
        return {
            "image_processor_type": self.kind,
            **system,
            "do_convert_rgb": True,
            "do_resize": True,
            **self._size_to_dict(),
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            **({} if self.image_seq_length is None else {"image_seq_length": self.image_seq_length}),
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder's preprocessor_config.json, or the same settings from a newer processor_config.json.

        Raises InputError: neither file, not JSON, or unsupported settings (see `from_dict`).
        """
        folder = Path(folder)
        path = folder / "preprocessor_config.json"
        nested = folder / "processor_config.json"  # what transformers 5 writes instead
        if not path.is_file() and nested.is_file():
            path = nested
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} has no preprocessor_config.json: use a complete checkpoint folder"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as JSON ({error}): download it again") from error
        if path == nested and isinstance(values, dict):
            values = values.get("image_processor")
        if not isinstance(values, dict):
            raise InputError(f"{path} contains no image processor settings: download it again")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into a folder, which is created if missing."""
        with write_aside(Path(folder) / "preprocessor_config.json") as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
