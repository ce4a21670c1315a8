"""Pictures: pixel values against the reference, every mode and orientation, and every refusal."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from minivlm.data.lines import check_picture
from minivlm.errors import InputError
from minivlm.processing.images import MAX_SIDE, ImageProcessor, load_picture, preprocess, to_rgb

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "I;16", "I;16B", "I;16L", "F"]
PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(image: Image.Image, size: int, **settings: object) -> torch.Tensor:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": size, "width": size}, **settings)
    return processor(image, return_tensors="pt")["pixel_values"][0]


# --- parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [14, 64, 224])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (20000, 10), (10, 3000), (64, 64), (224, 224), (301, 97)])
def test_pixels_equal_the_reference_bit_for_bit(size: tuple[int, int], image_size: int) -> None:
    image = noise(*size)
    assert torch.equal(preprocess(image, image_size), reference(image, image_size))


@pytest.mark.parametrize("image_size", [64, 224, 448])
def test_pixels_of_a_photo_equal_the_reference(image_size: int) -> None:
    image = load_picture(PHOTO)
    pixels = preprocess(image, image_size)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, image_size, image_size)
    assert pixels.is_contiguous()
    assert -1 <= pixels.min() < -0.9
    assert 0.9 < pixels.max() <= 1
    assert torch.equal(pixels, reference(image, image_size))
    # The comparison notices a wrong filter and a swapped pair of channels.
    bilinear = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    assert not torch.equal(preprocess(bilinear, image_size), pixels)
    assert not torch.equal(pixels.flip(0), pixels)


def test_other_means_and_factors_equal_the_reference() -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = noise(50, 31)
    ours = preprocess(image, 28, mean, std, 1 / 127.5)
    assert torch.equal(ours, reference(image, 28, image_mean=mean, image_std=std, rescale_factor=1 / 127.5))
    assert not torch.equal(ours, preprocess(image, 28, mean, std))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_equal_the_reference(mode: str) -> None:
    """16 bits, 32 bits and floats differ on purpose: the reference clips them."""
    image = noise(9, 7).convert(mode) if mode != "PA" else noise(9, 7).convert("P").convert("PA")
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.arange(0, 252, 4, dtype=np.uint8).reshape(7, 9)))
    assert torch.equal(preprocess(image, 14), reference(image, 14))


# --- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (100, 50, 20, 0), (255, 255, 255)),
        ("RGBA", (100, 50, 20, 255), (100, 50, 20)),
        ("RGBA", (100, 50, 0, 51), (224, 214, 204)),  # a fifth of the color, four fifths of white
        ("LA", (0, 51), (204, 204, 204)),
        ("RGBa", (20, 10, 0, 51), (224, 214, 204)),  # the same with premultiplied alpha
        ("La", (0, 51), (204, 204, 204)),
    ],
)
def test_transparent_pixels_are_blended_onto_white(
    mode: str, color: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert to_rgb(Image.new(mode, (1, 1), color)).getpixel((0, 0)) == expected


def test_one_transparent_color_in_a_png_equals_the_reference(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    image.putpixel((0, 0), (200, 100, 0))
    image.save(tmp_path / "key.png", transparency=(1, 2, 3))
    loaded = load_picture(tmp_path / "key.png")
    assert to_rgb(loaded).getpixel((1, 0)) == (255, 255, 255)
    assert to_rgb(loaded).getpixel((0, 0)) == (200, 100, 0)
    assert torch.equal(preprocess(loaded, 8), reference(loaded, 8))


@pytest.mark.parametrize("transparency", [0, bytes([0] + [255] * 255)])
def test_palette_with_transparency_gives_no_warning(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60] * 128)
    image.putpixel((1, 0), 1)
    image.info["transparency"] = transparency
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = to_rgb(image)
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_are_scaled_not_clipped(mode: str) -> None:
    values = np.array([[0, 257, 32768, 65278, 65535]], dtype=np.uint16)
    data = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (5, 1), data)
    assert np.asarray(to_rgb(image))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 254, 255)]


def test_16_bit_png(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "scan.png")
    gray = np.asarray(to_rgb(load_picture(tmp_path / "scan.png")))[..., 0]
    assert gray.reshape(-1).tolist() == list(range(256))


def tiff_of_12_bits(values: list[int], orientation: int) -> bytes:
    """One row of 12 bits each, packed, as scanners and microscopes write it."""
    row = int("".join(f"{value:012b}" for value in values), 2).to_bytes(len(values) * 12 // 8, "big")
    tags = {256: len(values), 257: 1, 258: 12, 259: 1, 262: 1, 273: 134, 274: orientation, 277: 1, 278: 1}
    tags[279] = len(row)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + row


@pytest.mark.parametrize("orientation", [1, 3])
def test_a_tiff_that_says_it_has_12_bits(orientation: int, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_of_12_bits([0, 1024, 2048, 4095], orientation))
    image = load_picture(tmp_path / "a.tif")
    assert sorted(np.asarray(image)[0].tolist()) == [0, 1024, 2048, 4095]
    gray = np.asarray(to_rgb(image))[0, :, 0].tolist()
    assert (gray if orientation == 1 else gray[::-1]) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("largest", "brightest", "expected"),
    [
        (4095, 4095, [0, 64, 255]),  # 12 bits in 16, and the file says so
        (1023, 1023, [0, 255, 255]),
        (4095, 4096, [0, 4, 16]),  # not true
        (3000, 3000, [0, 4, 12]),  # the brightest pixel, and no number of bits
        (None, 4095, [0, 4, 16]),  # nothing tells it from a dark picture
    ],
)
def test_12_bits_in_16(largest: int | None, brightest: int, expected: list[int], tmp_path: Path) -> None:
    values = np.array([[0, min(1024, brightest), brightest]], dtype=np.uint16)
    tags = {} if largest is None else {281: largest}
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=tags)
    assert np.asarray(to_rgb(load_picture(tmp_path / "a.tif")))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("F", [0, 0.5, 1], [0, 128, 255]),  # white is 1
        ("F", [0, 51, 200], [0, 51, 200]),  # white is 255
        ("F", [0, 257, 60000], [0, 1, 233]),  # white is 65535
        ("F", [0, 50000, 100000], [0, 128, 255]),  # white is the brightest pixel
        ("F", [-1, np.nan, 1], [0, 0, 255]),
        ("F", [-np.inf, np.inf, 1], [0, 255, 255]),
        ("F", [np.nan, np.nan, np.nan], [0, 0, 0]),
        ("I", [0, 1, 200], [0, 1, 200]),
        ("I", [0, 1, 1], [0, 1, 1]),  # never white at 1
        ("I", [-5, 257, 65535], [0, 1, 255]),
        ("I", [0, 1000000, 2000000], [0, 128, 255]),
    ],
)
def test_white_of_floats_and_integers(mode: str, values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32 if mode == "F" else np.int32))
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_lab_red_is_red() -> None:
    red = np.asarray(to_rgb(Image.new("LAB", (1, 1), (136, 208, 195))))[0, 0]
    assert np.abs(red.astype(int) - (254, 0, 0)).max() < 16


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MODES), st.integers(1, 40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_any_mode_and_size(mode: str, width: int, height: int, random: object) -> None:
    count = len(Image.new(mode, (width, height)).tobytes())
    data = random.randbytes(count)  # type: ignore[attr-defined]
    image = Image.frombytes(mode, (width, height), data)
    before = image.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = to_rgb(image)
        pixels = preprocess(image, 8)
    assert (rgb.mode, rgb.size) == ("RGB", (width, height))
    assert pixels.shape == (3, 8, 8)
    assert torch.isfinite(pixels).all()
    assert image.tobytes() == before


# --- orientation --------------------------------------------------------------------------------------------

UPRIGHT = np.array(
    [[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[90, 90, 0], [0, 90, 90], [90, 0, 90]]], np.uint8
)
# What a camera stores for this picture, from the EXIF standard: which edge row 0 and column 0 are.
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo{suffix}"
    lossless = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif, **lossless)
    assert np.array_equal(np.asarray(to_rgb(load_picture(path))), UPRIGHT)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"II*\0\x08\0\0\0\xff\xff", b"", b"\xff" * 40])
def test_damaged_exif_costs_nothing(exif: bytes) -> None:
    image = Image.fromarray(UPRIGHT)
    image.info["exif"] = exif
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(to_rgb(image)), UPRIGHT)


def test_half_damaged_exif_is_used_in_silence(tmp_path: Path) -> None:
    # Two entries are announced: an orientation of 6, then nothing. Pillow warns and goes on.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(load_picture(tmp_path / "a.jpg")).size == (2, 4)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))


def test_exif_code_that_fails_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(UPRIGHT))), UPRIGHT)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".webp", ".jpg"])
def test_first_frame_of_an_animation(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"frames{suffix}"
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, **({} if suffix == ".jpg" else {"save_all": True, "append_images": frames[1:]}))
    red, _, blue = np.asarray(to_rgb(load_picture(str(path))))[4, 4].tolist()
    assert red > 240
    assert blue < 10


def refusal(path: Path | str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            load_picture(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refused_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.png")
    assert "no such file" in refusal("a\0b")
    assert "no such file" in refusal("x" * 5000)
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "is empty" in refusal(tmp_path / "empty.png")
    (tmp_path / "words.png").write_text("not a picture")
    assert "not a picture in a known format" in refusal(tmp_path / "words.png")
    assert "device or a pipe" in refusal("/dev/null")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_picture(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"photo{suffix}"
    noise(60, 60).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated or damaged" in refusal(path) or "not a picture" in refusal(path)


def test_truncated_png_says_so(tmp_path: Path) -> None:
    noise(60, 60).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    assert "truncated or damaged" in refusal(tmp_path / "a.png")
    # Opened lazily by the caller, the same picture is refused when its pixels are read.
    with pytest.raises(InputError, match="cannot be read as RGB"):
        to_rgb(Image.open(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("width", "limit"), [(15, 100), (30, 100)]
)  # Pillow warns above 100, fails above 200
def test_decompression_bomb(width: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(width, 10).save(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png").size == (width, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit} pixels" in refusal(tmp_path / "a.png")


def png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel, without Pillow, which would hold all of it."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize("size", [(67_000_000, 1), (1, MAX_SIDE + 1)])
def test_a_side_that_would_take_gigabytes_to_resize(size: tuple[int, int], tmp_path: Path) -> None:
    """A file of a few kilobytes. It is refused before it is decoded."""
    path = tmp_path / "a.png"
    path.write_bytes(png(*size))
    message = f"the picture has {size[0]} x {size[1]} pixels: expected at most {MAX_SIDE} on a side"
    assert message in refusal(path)
    with Image.open(path) as lazily, pytest.raises(InputError, match=message):
        to_rgb(lazily)
    with pytest.raises(InputError, match=message):
        check_picture(path, set())
    path.write_bytes(png(MAX_SIDE, 1))
    assert to_rgb(load_picture(path)).size == (MAX_SIDE, 1)


@pytest.mark.parametrize("kind", ["profile", "text"])
def test_more_metadata_than_pillow_reads(kind: str, tmp_path: Path) -> None:
    """The pixels are whole: "damaged" would be wrong, and another copy no help."""
    path = tmp_path / "a.png"
    if kind == "profile":
        noise(8, 8).save(path, icc_profile=np.random.default_rng(0).bytes(3_000_000))
    else:
        info = PngInfo()
        info.add_text("notes", "a" * 3_000_000, zip=True)
        noise(8, 8).save(path, pnginfo=info)
    assert "a color profile or a text of more than 1048576 bytes" in refusal(path)
    assert "damaged" not in refusal(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(3, 3).save(tmp_path / "a.png")

    def denied(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # chmod would not stop a test that runs as root
    assert "cannot be read (Permission denied): check its permissions" in refusal(tmp_path / "a.png")


def test_a_picture_without_pixels() -> None:
    with pytest.raises(InputError, match="0 x 5 pixels"):
        preprocess(Image.new("RGB", (0, 5)), 8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), st.data())
def test_damaged_files_are_loaded_or_refused(kind: str, data: st.DataObject) -> None:
    """Random bytes are changed: the result is a picture or an InputError, never anything else."""
    import io
    import tempfile

    buffer = io.BytesIO()
    noise(20, 20).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, min(200, len(content) - 1)), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        file.write(content)
        file.flush()
        try:
            image = load_picture(file.name)
        except InputError:
            return
        assert to_rgb(image).mode == "RGB"


# --- preprocessor_config.json -------------------------------------------------------------------------------

# As published with google/paligemma-3b-pt-224.
PUBLISHED = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "PaliGemmaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


def test_published_settings() -> None:
    assert ImageProcessor.from_dict(PUBLISHED) == ImageProcessor(image_size=224, image_seq_length=256)
    assert ImageProcessor.from_dict({}) == ImageProcessor()


def test_settings_round_trip(tmp_path: Path) -> None:
    processor = ImageProcessor(32, 16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1 / 128)
    processor.save_pretrained(tmp_path / "new")
    assert ImageProcessor.from_pretrained(tmp_path / "new") == processor
    pixels = processor([noise(5, 6), noise(70, 8, seed=1)])
    assert pixels.shape == (2, 3, 32, 32)
    assert torch.equal(
        pixels[1], preprocess(noise(70, 8, seed=1), 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1 / 128)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 0}, r"resample is 0: only 2 \(bilinear\) and 3 \(bicubic\)"),
        ({"resample": "bicubic"}, "wrong type"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"size": {"shortest_edge": 224}}, "expected a square"),
        ({"size": {"height": 224, "width": 448}}, "expected a square"),
        ({"size": 224}, "expected a square"),
        ({"size": {"height": "large", "width": "large"}}, "wrong type"),
        ({"size": {"height": -1, "width": -1}}, "at least 1 pixel"),
        ({"image_seq_length": 0}, "at least 1 image token"),
        ({"image_mean": [0.5]}, "image_mean has 1 numbers"),
        ({"image_mean": 0.5}, "wrong type"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std contains 0"),
    ],
)
def test_refused_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageProcessor.from_dict(PUBLISHED | change)


def test_refused_settings_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        ImageProcessor.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for content, message in [
        ("{", "as JSON"),
        ("[]", "no image processor settings"),
        ('{"resample": 0}', "resample"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            ImageProcessor.from_pretrained(tmp_path)
        assert "preprocessor_config.json" in str(caught.value)


def test_no_pictures() -> None:
    with pytest.raises(InputError, match="no pictures"):
        ImageProcessor()([])
