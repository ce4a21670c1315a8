"""Masks to `<seg>` tokens and back: the codebook, its files, its training, and what is drawn."""

from __future__ import annotations

import io
import math
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.data.samples import _check_boxes
from minivlm.errors import InputError
from minivlm.looking import draw_boxes, draw_masks
from minivlm.processing.boxes import Box, box_to_tokens, text_to_boxes
from minivlm.processing.codebook import SHIPPED_MASKS, MaskCodebook, MaskCodebookConfig, load_codebook
from minivlm.processing.masks import (
    Mask,
    codes_to_text,
    crop_mask,
    mask_iou,
    mask_to_tokens,
    text_to_masks,
)
from minivlm.training import codebook as mask_training
from minivlm.training.codebook import Figure, random_figure, shape_outline, train_masks
from minivlm.world.scenes import SHAPES, Thing

PUBLISHED = MaskCodebookConfig((16, 32, 64, 128), (128, 128, 64, 32, 16), 512)  # the encoder's are a guess
SEGS = "".join(f"<seg{number:03}>" for number in range(16))
WHOLE = "<loc0000><loc0000><loc1023><loc1023>"


# The published model by its definition in JAX and TensorFlow, in NumPy, with channels last.


def same_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """tf.nn.conv2d with padding SAME; weight as stored, [out, in, kh, kw]."""
    kernel = weight.transpose(2, 3, 1, 0)
    size = kernel.shape[0]
    total = max((math.ceil(len(x) / stride) - 1) * stride + size - len(x), 0)
    x = np.pad(x, 2 * [(total // 2, total - total // 2)] + [(0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijco->hwo", windows, kernel, optimize=True) + bias


def jax_conv_transpose(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """flax ConvTranspose, strides 2, padding 2, transpose_kernel=True, on the kernel transposed (2, 3, 1, 0).

    jax.lax.conv_transpose flips such a kernel and swaps its last two axes, which are then (in, out). Zeros
    are put between the inputs (lhs_dilation), and padding 2 is added to the result.
    """
    kernel = weight.transpose(2, 3, 1, 0)[::-1, ::-1].swapaxes(2, 3)
    spread = np.zeros((2 * len(x) - 1, 2 * len(x) - 1, x.shape[2]))
    spread[::2, ::2] = x
    spread = np.pad(spread, [(2, 2), (2, 2), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(spread, (4, 4), (0, 1))
    return np.einsum("hwcij,ijco->hwo", windows, kernel, optimize=True) + bias


def reference_encode(w: dict[str, np.ndarray], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [16, D] and codes [16] of a mask [64, 64]."""

    def conv(x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        return same_conv(x, w[f"{name}.weight"], w[f"{name}.bias"], stride)

    x = 2.0 * (mask[:, :, None] - 0.5)
    for number in (0, 2, 4, 6):
        x = np.maximum(conv(x, f"encoder.{number}", 2), 0)
    for block in ("encoder.8.net", "encoder.9.net"):
        y = np.maximum(conv(x, f"{block}.0"), 0)
        y = np.maximum(conv(y, f"{block}.2"), 0)
        x = x + conv(y, f"{block}.4")
    vectors = conv(x, "encoder.10").reshape(16, -1)
    return vectors, ((vectors[:, None] - w["_vq_vae._embedding"]) ** 2).sum(-1).argmin(-1)


def reference_decode(w: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """A mask [64, 64] of codes [16]."""

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        return same_conv(x, w[f"{name}.weight"], w[f"{name}.bias"], 1)

    x = w["_vq_vae._embedding"][codes].reshape(4, 4, -1)
    x = np.maximum(conv(x, "decoder.0"), 0)
    for block in ("decoder.2.net", "decoder.3.net"):
        y = np.maximum(conv(x, f"{block}.0"), 0)
        y = np.maximum(conv(y, f"{block}.2"), 0)
        x = x + conv(y, f"{block}.4")
    for number in (4, 6, 8, 10):
        x = jax_conv_transpose(x, w[f"decoder.{number}.weight"], w[f"decoder.{number}.bias"])
        x = np.maximum(x, 0)
    return conv(x, "decoder.12")[:, :, 0]


def random_arrays(config: MaskCodebookConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that preserve the scale of activations, with biases so large that their absence would show."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, value in MaskCodebook(config).state_dict().items():
        fan_in = math.prod(value.shape[1:]) if value.dim() == 4 else 16
        arrays[name] = rng.normal(0, math.sqrt(2 / fan_in), value.shape).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "vae-oid.npz"
    np.savez(path, **random_arrays(PUBLISHED))
    return path


def blob(seed: int = 0) -> np.ndarray:
    return random_figure(np.random.default_rng(seed), shapes=0.0).draw(100)


def test_published_file_equals_the_published_formulas(published: Path) -> None:
    codebook = MaskCodebook.from_file(published)
    assert codebook.config == PUBLISHED
    with np.load(published) as file:
        w = {name: file[name].astype(np.float64) for name in file.files}
    assert w["decoder.6.weight"].shape == (128, 64, 4, 4)  # in, out
    masks = np.stack([blob(seed) for seed in range(2)])
    codes = codebook.encode(torch.from_numpy(masks))
    assert codes.dtype == torch.int64
    drawn = codebook.decode(codes).numpy()
    for number, mask in enumerate(masks):
        vectors, expected = reference_encode(w, mask)
        ours = codebook.vectors(torch.from_numpy(masks))[number].numpy()
        assert np.abs(ours - vectors).max() < 1e-5 * np.abs(vectors).max()
        assert codes[number].tolist() == expected.tolist()
        wanted = reference_decode(w, expected)
        assert np.abs(drawn[number] - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert len(codes.unique()) > 4  # one code everywhere would hide a wrong order
    assert drawn.std() > 0.01


def test_transposed_convolution_is_the_gradient_of_a_convolution() -> None:
    """What `transpose_kernel` means, without flipping any kernel: <conv(y), x> = <y, conv_transpose(x)>."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 2, 4, 4))  # a convolution of 2 channels into 3
    x, y = rng.normal(size=(5, 5, 3)), rng.normal(size=(10, 10, 2))
    forward = (same_conv(y, weight, np.zeros(3), 2) * x).sum()
    assert forward == pytest.approx((jax_conv_transpose(x, weight, np.zeros(2)) * y).sum())
    layer = torch.nn.ConvTranspose2d(3, 2, 4, stride=2, padding=1, bias=False).double()
    layer.weight.data = torch.from_numpy(weight)
    ours = layer(torch.from_numpy(x).permute(2, 0, 1)).permute(1, 2, 0)
    assert forward == pytest.approx((ours.detach().numpy() * y).sum())


def test_nearest_code() -> None:
    codebook = MaskCodebook()
    vectors = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    distances = torch.cdist(vectors, codebook.codes.detach().expand(5, -1, -1))
    assert torch.equal(codebook.nearest(vectors), distances.argmin(-1))


def test_gradients_pass_by_the_choice() -> None:
    codebook = MaskCodebook.from_file().requires_grad_(True)
    drawn, vectors, codes = codebook(torch.from_numpy(blob())[None])
    # Codes are decoded, not vectors.
    assert (drawn - codebook.decode(codebook.nearest(vectors))).abs().max() < 1e-4
    assert (drawn - codebook._draw(vectors)).abs().max() > 1e-2
    gradient = torch.autograd.grad(drawn.square().mean(), [vectors, codebook.codes], allow_unused=True)
    assert gradient[0].abs().max() > 0
    assert gradient[1] is None or gradient[1].abs().max() == 0
    (moved,) = torch.autograd.grad((codes - vectors.detach()).square().mean(), codebook.codes)
    assert moved.abs().max() > 0


# Files


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codebook = MaskCodebook(MaskCodebookConfig((2, 3, 4, 5), (6, 5, 4, 3, 2), 7))
    codebook.save(tmp_path / "new" / "a.npz")
    codebook.save(tmp_path / "b.npz")
    assert (tmp_path / "new" / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = MaskCodebook.from_file(tmp_path / "b.npz")
    assert loaded.config == codebook.config
    for name, value in codebook.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    MaskCodebook.from_file()
    assert torch.equal(torch.get_rng_state(), state)


def test_running_sums_and_other_precisions_are_accepted(tmp_path: Path) -> None:
    arrays = random_arrays(MaskCodebookConfig())
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **wide, **{"_vq_vae._ema_w": np.zeros(3)})
    codes = torch.arange(16)[None]
    ours = [MaskCodebook.from_file(tmp_path / name).decode(codes) for name in ("a.npz", "b.npz")]
    assert torch.equal(*ours)


BROKEN = {
    "has no encoder.6.bias:": {"encoder.6.bias": None},
    "has no encoder.0.weight, encoder.0.bias, encoder.2.weight and 19 more:": {
        name: None for name in MaskCodebook().state_dict() if name.startswith("encoder")
    },
    "has no _vq_vae._embedding:": {"_vq_vae._embedding": None},
    "has the unexpected decoder.13.bias:": {"decoder.13.bias": np.zeros(1)},
    r"has no 1-D array of numbers in decoder.4.bias:": {"decoder.4.bias": np.float32(1)},
    r"has no 1-D array of numbers in decoder.0.bias:": {"decoder.0.bias": np.zeros(0, np.float32)},
    r"has \[32, 32, 5, 5\] instead of \[32, 32, 4, 4\] in decoder.4.weight:": {
        "decoder.4.weight": np.zeros((32, 32, 5, 5), np.float32)
    },
    r"has \[64, 16\] instead of \[128, 16\] in _vq_vae._embedding:": {
        "_vq_vae._embedding": np.zeros((64, 16), np.float32)
    },
    r"has \[128, 9\] instead of \[128, 16\]": {"_vq_vae._embedding": np.zeros((128, 9), np.float32)},
    r"has \[8, 16, 4, 4\] instead of \[16, 8, 4, 4\] in encoder.2.weight:": {
        "encoder.2.weight": np.zeros((8, 16, 4, 4), np.float32)
    },
    "values other than finite floats in decoder.12.bias:": {"decoder.12.bias": np.array(["a"])},
    "values other than finite floats in encoder.0.bias:": {"encoder.0.bias": np.full(8, np.nan, np.float32)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_that_does_not_fit(message: str, tmp_path: Path) -> None:
    arrays = {**random_arrays(MaskCodebookConfig()), **BROKEN[message]}
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message) as caught:
        MaskCodebook.from_file(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match="No such file"):
        MaskCodebook.from_file(path)
    with pytest.raises(InputError, match="cannot be read as an npz file"):
        MaskCodebook.from_file(tmp_path)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in MaskCodebook().state_dict():
            file.writestr(name, "a text")
    for content in (b"", b"a text", b"\x80\x04pickled", array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"\(it is another kind of file, or truncated\)"):
            MaskCodebook.from_file(path)
    path.write_bytes(archive.getvalue())
    with pytest.raises(InputError, match="has no 1-D array of numbers in"):
        MaskCodebook.from_file(path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "opened",)  # type: ignore[return-value]

    arrays = {**random_arrays(MaskCodebookConfig()), "decoder.12.bias": np.array([Trap()], dtype=object)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="cannot be read as an npz file"):
        MaskCodebook.from_file(tmp_path / "a.npz")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99, 0.99999])
def test_a_file_that_is_cut_off(share: float, tmp_path: Path) -> None:
    content = SHIPPED_MASKS.read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="truncated"):
        MaskCodebook.from_file(tmp_path / "a.npz")


@pytest.mark.parametrize(("old", "new"), [(b"'<f4'", b"'<f2'"), (b"), }", b"), (")])
def test_a_damaged_header(old: bytes, new: bytes, tmp_path: Path) -> None:
    # In a large array, which NumPy reads in parts without reaching the checksum.
    before, name, after = SHIPPED_MASKS.read_bytes().partition(b"decoder.4.weight.npy")
    assert old in after[:200]
    (tmp_path / "a.npz").write_bytes(before + name + after.replace(old, new, 1))
    with pytest.raises(InputError, match="truncated"):
        MaskCodebook.from_file(tmp_path / "a.npz")


@settings(deadline=None, max_examples=100)
@given(st.floats(0, 1), st.booleans(), st.integers(1, 255))
def test_a_damaged_file_is_refused_if_it_matters(
    tmp_path_factory: pytest.TempPathFactory, where: float, at_the_end: bool, flip: int
) -> None:
    content = bytearray(SHIPPED_MASKS.read_bytes())
    places = range(len(content))[-5000:] if at_the_end else range(len(content))  # names are at the end
    content[places[min(int(where * len(places)), len(places) - 1)]] ^= flip
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    path.write_bytes(content)
    with suppress(InputError):
        codebook = MaskCodebook.from_file(path)
        assert torch.equal(codebook.codes, load_codebook().codes)


# Words


def triangle_filter(values: np.ndarray, size: int) -> np.ndarray:
    """tf.image.resize along the first axis, bilinear with antialias: a triangle as wide as the reduction."""
    scale = len(values) / size
    centers = (np.arange(size) + 0.5) * scale
    pixels = np.arange(len(values)) + 0.5
    weights = np.maximum(0, 1 - np.abs(pixels[None] - centers[:, None]) / max(scale, 1.0))
    return np.tensordot(weights / weights.sum(1, keepdims=True), values, 1)


@pytest.mark.parametrize("box", [(3, 5, 203, 150), (10.4, 20.6, 40.5, 50.5), (0, 0, 2, 300)])
def test_crop_by_formula(box: tuple[float, ...]) -> None:
    mask = np.random.default_rng(0).random((300, 220)) < 0.5
    x0, y0, x1, y1 = np.round(box).astype(int)
    expected = triangle_filter(triangle_filter(mask[y0:y1, x0:x1].astype(float), 64).T, 64).T
    assert np.abs(crop_mask(mask, box) - expected).max() < 1e-5
    gray = (mask * 255).astype(np.uint8)
    assert np.abs(crop_mask(gray, box) - expected).max() < 1e-5
    assert crop_mask(mask, box).dtype == crop_mask(gray, box).dtype == np.float32


def test_crop_outside_the_picture() -> None:
    mask = np.ones((20, 30), dtype=bool)
    assert (crop_mask(mask, (-5, -3, 100, 100)) == 1).all()
    for box in ((40, 0, 50, 20), (-9, 0, -2, 20)):
        with pytest.raises(InputError, match="lies outside the picture of 30 x 20"):
            crop_mask(mask, box)
    for box in ((3, 3, 3.4, 9), (29.9, 0, 30, 20), (4, 19.8, 5, 20)):  # thinner than a pixel: one
        assert (crop_mask(mask, box) == 1).all()
    for box, message in (
        ((0, 0, math.nan, 9), "not finite"),
        ((9, 0, 3, 9), "no area"),
        ((1, 2, 3), "3 numbers"),
    ):
        with pytest.raises(InputError, match=message):
            crop_mask(mask, box)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((4, 4, 3), dtype=bool), r"\[4, 4, 3\]: expected \[height, width\]"),
        (np.full((4, 4), 300), "from 0 to 300: expected bools"),
        (np.full((4, 4), -1.0), "from -1.0 to 0.0"),
        (np.full((4, 4), np.nan), "from nan to nan"),
        (np.ones((0, 4), dtype=bool), "picture is 4 x 0"),
        (np.ones((4, 4), dtype=np.uint8), "from 0 to 1: .* pass `mask > 0`"),
    ],
)
def test_crop_refuses(mask: np.ndarray, message: str) -> None:
    for function in (crop_mask, mask_to_tokens):
        with pytest.raises(InputError, match=message):
            function(mask, (0, 0, 4, 4))


def test_codes_by_hand() -> None:
    assert codes_to_text(range(16)) == SEGS
    assert codes_to_text(torch.tensor([127] + 15 * [7])) == "<seg127>" + 15 * "<seg007>"
    for codes in ([], range(15), range(17), [128, *range(15)], [-1, *range(15)]):
        with pytest.raises(InputError, match="expected 16 from 0 to 127"):
            codes_to_text(codes)


def test_tokens_of_a_mask(published: Path) -> None:
    mask = np.zeros((100, 200), dtype=bool)
    mask[20:60, 30:130] = np.tri(40, 100, dtype=bool)
    box = (30, 20, 130, 60)
    for codebook in (None, MaskCodebook.from_file(published)):
        model = codebook or load_codebook()
        codes = model.encode(torch.from_numpy(crop_mask(mask, box))[None])[0]
        assert mask_to_tokens(mask, box, codebook) == box_to_tokens(box, 200, 100) + codes_to_text(codes)
    with pytest.raises(InputError, match="has no area"):
        mask_to_tokens(mask, (9, 0, 3, 9))


def test_an_empty_mask_is_no_shape() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[15:, 20:] = True
    for empty in (mask, mask * np.uint8(255), np.zeros((20, 30), dtype=np.uint8)):
        for function in (crop_mask, mask_to_tokens):
            with pytest.raises(InputError, match=r"empty inside the box from 3, 2 to 10, 9: .* Leave it out"):
                function(empty, (3, 2, 10, 9))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 700), st.integers(1, 700))
def test_every_mask_that_is_written_can_be_read_back(data: st.DataObject, width: int, height: int) -> None:
    x0, x1 = sorted(data.draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    y0, y1 = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    assume(x0 < x1 and y0 < y1)
    text = mask_to_tokens(np.ones((height, width), dtype=bool), (x0, y0, x1, y1))
    _check_boxes(text)  # a line of JSONL may hold it
    (found,) = text_to_masks(text, width, height)
    assert found.mask.any()
    for edge, again, side in ((x0, found.box.x0, width), (y0, found.box.y0, height)):
        assert abs(edge - again) <= 1.5 * side / 1023
    for edge, again, side in ((x1, found.box.x1, width), (y1, found.box.y1, height)):
        assert abs(edge - again) <= 1 + 1.5 * side / 1023


def test_a_pixel_between_two_bins_is_kept() -> None:
    """A column whose edges are rounded towards each other: truncated to pixels, they would meet."""
    mask = np.ones((700, 700), dtype=bool)
    lost = []
    for x in range(700):
        (box,) = text_to_boxes(box_to_tokens((x, 0, x + 1, 9), 700, 700), 700, 700)
        lost += [x] * (int(box.x0) == int(box.x1))
    assert len(lost) > 50
    for x in lost[::10]:
        (found,) = text_to_masks(mask_to_tokens(mask, (x, 0, x + 1, 9)), 700, 700)
        assert found.mask.any()


def test_masks_of_an_answer_by_the_published_evaluation(published: Path) -> None:
    codebook = MaskCodebook.from_file(published)
    codebook.decoder[12].bias -= codebook.decode(torch.arange(16)[None]).median()  # half inside, half outside
    text = f"<loc0100><loc0200><loc0907><loc0512>{SEGS} cat ; <loc0003><loc0001><loc0700><loc1023>{SEGS}"
    width, height = 333, 77
    masks = text_to_masks(text, width, height, codebook)
    assert [mask.box for mask in masks] == text_to_boxes(text, width, height)
    assert [mask.box.name for mask in masks] == ["cat", ""]
    values = codebook.decode(torch.arange(16)[None])[0].numpy()
    for (y0, x0, y1, x1), found in zip([(100, 200, 907, 512), (3, 1, 700, 1023)], masks, strict=True):
        left, top, right, bottom = (
            int(v) for v in (x0 / 1023 * width, y0 / 1023 * height, x1 / 1023 * width, y1 / 1023 * height)
        )
        inside = triangle_filter(triangle_filter(values, bottom - top).T, right - left).T
        expected = np.zeros((height, width), dtype=bool)
        expected[top:bottom, left:right] = inside > 0
        assert found.mask.shape == (height, width)
        assert found.mask.dtype == bool
        assert (found.mask != expected).sum() <= 2  # values within rounding of 0
        assert 0 < expected[top:bottom, left:right].mean() < 1


MALFORMED = [
    "",
    "none",
    "a cat",
    SEGS,
    f"{WHOLE} cat",
    f"{WHOLE}{SEGS[:-8]} cat",
    f"{WHOLE}{SEGS}<seg000> cat",
    f"{WHOLE}{SEGS.replace('<seg015>', '<seg128>')} cat",
    f"{WHOLE}{SEGS.replace('<seg015>', '<seg15>')} cat",
    f"{WHOLE}{SEGS.replace('<seg007>', 'x<seg007>')} cat",
    f"{WHOLE} cat {SEGS}",
    f"{WHOLE}{SEGS} cat {SEGS}",
    f"<loc0000><loc1023><loc1023>{SEGS} cat",
    f"<loc0000>{WHOLE}{SEGS} cat",
    f"<loc0000><loc0000><loc1024><loc1023>{SEGS} cat",
    f"<loc0500><loc0000><loc0500><loc1023>{SEGS} cat",
    f"<loc0000><loc0900><loc1023><loc0100>{SEGS} cat",
    # Of 20 pixels, 51 bins each: the box has an area, but not after int().
    f"<loc0000><loc0110><loc1023><loc0150>{SEGS} cat",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_answers_give_no_mask(text: str) -> None:
    assert text_to_masks(text, 20, 20) == []
    good = f"{WHOLE}{SEGS} dog"
    names = [mask.box.name for mask in text_to_masks(f"{text} ; {good}", 20, 20)]
    assert names == ["dog"]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from(
            [WHOLE, "<loc0100>", "<loc0900>", SEGS, "<seg003>", "<seg999>", " ; ", " cat", "<", "é"]
        )
    ),
    st.integers(1, 30),
    st.integers(1, 30),
)
def test_any_text_is_allowed(parts: list[str], width: int, height: int) -> None:
    text = "".join(parts)
    boxes = text_to_boxes(text, width, height)
    for box, mask in text_to_masks(text, width, height):
        assert box in boxes
        assert mask.shape == (height, width)
        ys, xs = np.nonzero(mask)
        assert not len(ys) or (int(box.y0) <= ys.min() and ys.max() < box.y1)
        assert not len(xs) or (int(box.x0) <= xs.min() and xs.max() < box.x1)


def test_a_picture_without_area() -> None:
    with pytest.raises(InputError, match="width and a height above 0"):
        text_to_masks("no mask", 0, 10)


def test_shapes_that_do_not_fit() -> None:
    codebook = load_codebook()
    with pytest.raises(InputError, match=r"masks are \[64, 64\]"):
        codebook.encode(torch.zeros(64, 64))
    with pytest.raises(InputError, match=r"codes are \[16\]"):
        codebook.decode(torch.arange(16))
    with pytest.raises(InputError, match=r"codes are \[1, 15\]"):
        codebook.decode(torch.arange(15)[None])
    for number in (-1, 128):
        with pytest.raises(InputError, match="expected 0 to 127"):
            codebook.decode(torch.full((1, 16), number))


def test_reading_an_answer_leaves_weights_for_training() -> None:
    load_codebook.cache_clear()
    text_to_masks(WHOLE + SEGS, 9, 9)
    masks = torch.rand(1, 64, 64, requires_grad=True)
    load_codebook().vectors(masks).sum().backward()  # impossible with weights made in inference mode
    assert masks.grad is not None


def test_overlap() -> None:
    a, b = np.zeros((2, 4, 5), dtype=bool)
    assert mask_iou(a, b) == 0.0
    a[:, :2] = True
    b[:, 1:4] = True
    assert mask_iou(a, b) == pytest.approx(4 / 16)
    assert mask_iou(a, a) == 1.0
    with pytest.raises(InputError, match="the same shape"):
        mask_iou(a, b.T)


# The shipped weights


def shape_masks(shape: str, degrees: np.ndarray) -> torch.Tensor:
    """Masks [M, 64, 64] of a shape, drawn large, cropped as in training."""
    things = [Thing(shape, "red", "large", 32, 32, 28, (0, 0, 0), float(angle)) for angle in degrees]
    crops = [crop_mask(thing.mask(256), [4 * edge for edge in thing.box]) for thing in things]
    return torch.from_numpy(np.stack(crops))


def overlaps(masks: torch.Tensor) -> np.ndarray:
    drawn = load_codebook().decode(load_codebook().encode(masks))
    return np.array([mask_iou(a, b) for a, b in zip(masks.numpy() > 0.5, drawn.numpy() > 0, strict=True)])


def test_shipped_codebook_draws_the_shapes() -> None:
    assert SHIPPED_MASKS.stat().st_size < 1_000_000
    assert load_codebook() is load_codebook()
    upright = np.concatenate([overlaps(shape_masks(shape, np.zeros(1))) for shape in SHAPES])
    turned = np.stack([overlaps(shape_masks(shape, np.arange(-20, 21, 2))) for shape in SHAPES])
    assert upright.mean() > 0.95
    assert turned.mean() > 0.95
    assert turned.min() > 0.85


def test_shipped_codebook_draws_other_things() -> None:
    rng = np.random.default_rng(1_000_000)
    masks = np.stack([random_figure(rng, shapes=0.0).draw(rng.uniform(30, 200)) for _ in range(100)])
    assert overlaps(torch.from_numpy(masks)).mean() > 0.9


def test_shipped_codes_are_all_of_use_and_change_slowly() -> None:
    codebook = load_codebook()
    used = set()
    for shape in SHAPES[1:]:
        codes = codebook.encode(shape_masks(shape, np.arange(-20, 20.5, 1)))
        assert (codes[1:] != codes[:-1]).sum(1).float().mean() < 4  # of 16 codes, for one degree of rotation
        used |= set(codes.flatten().tolist())
    assert len(used) > 64


def test_there_and_back_in_a_picture() -> None:
    thing = Thing("star", "blue", "large", 20, 40, 14, (0, 0, 255), 12)
    mask = thing.mask(256)
    text = mask_to_tokens(mask, [4 * edge for edge in thing.box]) + " blue star"
    (found,) = text_to_masks(text, 256, 256)
    assert found.box.name == "blue star"
    assert mask_iou(found.mask, mask) > 0.9
    assert mask_iou(found.mask, mask.T) < 0.3


# Training


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("degrees", [0, 15])
def test_outlines_are_those_of_the_scenes(shape: str, degrees: int) -> None:
    thing = Thing(shape, "red", "large", 0, 0, 1, (0, 0, 0), degrees)
    ours = shape_outline(shape, math.radians(degrees))
    if shape == "circle":
        assert np.hypot(*ours.T) == pytest.approx(np.ones(len(ours)))
    else:
        assert ours == pytest.approx(np.array(thing.outline))
    drawn = Figure((shape_outline(shape),)).draw(200, math.radians(degrees)) > 0.5
    assert mask_iou(drawn, shape_masks(shape, np.array([degrees]))[0].numpy() > 0.5) > 0.96


def test_figures() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([random_figure(rng).draw(rng.uniform(12, 160)) for _ in range(200)])
    assert masks.min() == 0
    assert masks.max() == 1
    filled = masks > 0.25
    for edge in (filled[:, 0], filled[:, -1], filled[:, :, 0], filled[:, :, -1]):
        assert edge.any(1).mean() > 0.9  # a figure fills its box
    square = shape_outline("square")
    ring = Figure((square,), hole=square / 2).draw(128)
    assert ring.mean() == pytest.approx(0.75, abs=0.02)
    assert ring[32, 32] == 0


def test_a_pair_is_one_figure_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def halves() -> tuple[np.ndarray, np.ndarray]:
        masks = mask_training._pairs(np.random.default_rng(0)) > 0.5
        return masks[: mask_training.PAIRS], masks[mask_training.PAIRS :]

    monkeypatch.setattr(mask_training, "PIXELS", (160, 160))
    first, second = halves()
    assert np.mean([mask_iou(a, b) for a, b in zip(first, second, strict=True)]) > 0.75
    assert np.mean([mask_iou(a, b) for a, b in zip(first, second[::-1], strict=True)]) < 0.7
    assert (first != second).any((1, 2)).mean() > 0.6  # rotated; circles look the same
    monkeypatch.setattr(mask_training, "TURN", 0.0)
    first, second = halves()
    assert (first == second).all()
    monkeypatch.setattr(mask_training, "PIXELS", (12, 160))
    first, second = halves()
    assert (first != second).any((1, 2)).mean() > 0.8


def test_losses_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_training, "PAIRS", 3)
    codebook = MaskCodebook.from_file()
    masks = torch.from_numpy(mask_training._pairs(np.random.default_rng(0)))
    noisy = masks + 0.1 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(0))
    drawing, others = mask_training._losses(codebook, masks, noisy)
    vectors, numbers = codebook.vectors(noisy).numpy(), codebook.encode(noisy)
    codes = codebook.codes.numpy()[numbers]
    drawn = codebook.decode(numbers).numpy()
    assert drawing.item() == pytest.approx(((drawn - (2 * masks.numpy() - 1)) ** 2).mean(), rel=1e-4)
    own = ((vectors - codes) ** 2).mean()
    partners = ((vectors - codes[[3, 4, 5, 0, 1, 2]]) ** 2).mean()
    variance = vectors.reshape(-1, 16).var(0, ddof=1).mean()
    assert others.item() == pytest.approx(1.25 * own + 0.5 * partners / variance, rel=1e-4)


def test_unused_codes_are_put_where_vectors_are() -> None:
    torch.manual_seed(0)
    codebook = MaskCodebook()
    masks = torch.from_numpy(np.stack([blob(seed) for seed in range(8)]))
    vectors = codebook.vectors(masks).detach().flatten(0, 1)
    idle = torch.zeros(128)
    generator = torch.Generator().manual_seed(0)
    before = codebook.codes.detach().clone()
    used = torch.zeros(128, dtype=torch.bool)
    used[codebook.nearest(vectors)] = True
    for _ in range(mask_training.PATIENCE):
        mask_training._revive(codebook, masks, idle, generator, first=False)
    assert torch.equal(codebook.codes, before)
    mask_training._revive(codebook, masks, idle, generator, first=False)
    moved = (codebook.codes != before).any(1)
    assert torch.equal(moved, ~used)
    assert (idle == 0).all()
    assert (torch.cdist(codebook.codes[moved], vectors).min(1).values < 1e-3).all()
    mask_training._revive(codebook, masks, idle, generator, first=True)
    assert (codebook.codes[used] != before[used]).any(1).all()


def test_training_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_training, "PAIRS", 4)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    codebook = train_masks(tmp_path / "a.npz", steps=8, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    train_masks(tmp_path / "b.npz", steps=8, progress=False)
    train_masks(tmp_path / "c.npz", steps=8, seed=1, progress=False)
    contents = [(tmp_path / name).read_bytes() for name in ("a.npz", "b.npz", "c.npz")]
    assert contents[0] == contents[1] != contents[2]
    assert torch.equal(MaskCodebook.from_file(tmp_path / "a.npz").codes, codebook.codes)
    assert not any(parameter.requires_grad for parameter in codebook.parameters())


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_training, "PAIRS", 4)
    monkeypatch.setattr(mask_training, "PEAK_RATE", 8e-3)
    codebook = train_masks(tmp_path / "a.npz", steps=120, progress=False)
    masks = torch.from_numpy(np.stack([blob(seed) for seed in range(20)])) > 0.5
    right = ((codebook.decode(codebook.encode(masks.float())) > 0) == masks).float().mean()
    assert right > masks.float().mean() + 0.05  # better than a mask that is all inside
    assert len(codebook.encode(masks.float()).unique()) > 20


def test_training_without_steps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose 1 or more"):
        train_masks(tmp_path / "a.npz", steps=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        train_masks(tmp_path / "file" / "a.npz", steps=1, progress=False)


def test_training_replaces_nothing_and_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_training, "_pairs", lambda rng: pytest.fail("it began"))
    (tmp_path / "a.npz").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("a.npz", "link"):
        with pytest.raises(InputError, match="already exists, and training would replace it"):
            train_masks(tmp_path / name, steps=1)
    with pytest.raises(InputError, match=r"cannot write .*File exists. Choose another folder"):
        train_masks(tmp_path / "a.npz" / "b.npz", steps=1)
    assert (tmp_path / "a.npz").read_text() == "mine"


# Pictures


def test_masks_are_drawn() -> None:
    picture = Image.new("RGB", (400, 320), (100, 100, 100))
    mask = np.zeros((320, 400), dtype=bool)
    mask[100:200, 50:250] = True
    masks = [Mask(Box(40, 90, 260, 210, "cat"), mask), Mask(Box(300, 10, 390, 60), np.zeros_like(mask))]
    drawn = np.asarray(draw_masks(picture, masks)).astype(int)
    plain = np.asarray(draw_boxes(picture, [mask.box for mask in masks])).astype(int)
    assert drawn.shape == plain.shape == (320, 400, 3)
    outside = ~mask
    assert (drawn[outside] == plain[outside]).all()
    assert (drawn[100, 60:240] == 0).all()  # the outline
    assert (drawn[199, 60:240] == 0).all()
    assert np.abs(drawn[150, 150] - (0.6 * 100 + 0.4 * 255)).max() <= 1.5  # translucent inside
    assert (np.asarray(picture) == 100).all()


def test_masks_of_small_pictures_are_enlarged() -> None:
    mask = np.zeros((32, 64), dtype=bool)
    mask[8:24, 4:60] = True
    picture = Image.new("RGB", (64, 32), (128, 128, 128))
    drawn = np.asarray(draw_masks(picture, [Mask(Box(4, 8, 60, 24), mask)]))
    assert drawn.shape == (320, 640, 3)
    tinted = (drawn != 128).any(-1)
    assert tinted[80:240, 40:600].all()
    assert not tinted[:79].any()
    assert not tinted[:, :39].any()


@pytest.mark.parametrize("ground", ["black", "white", "red", "#808080"])
def test_frames_and_names_are_seen_on_any_ground_and_have_no_color(ground: str) -> None:
    picture = Image.new("RGB", (400, 320), ground)
    mask = np.zeros((320, 400), dtype=bool)
    mask[100:200, 50:250] = True
    masks = [Mask(Box(40, 90, 260, 210, "cyan star"), mask), Mask(Box(300, 10, 390, 60), np.zeros_like(mask))]
    drawn = np.asarray(draw_masks(picture, masks)).astype(int)
    plain = np.asarray(picture).astype(int)
    difference = np.abs(drawn - plain).sum(-1)
    assert difference[35, 297:304].max() > 200  # the left side of the second frame
    assert difference[100:106, 150].max() > 200  # the outline of the mask
    changed = drawn[(difference > 0) & ~mask]
    assert len(changed) > 1000
    assert (changed == changed[:, :1]).all()


def test_masks_of_another_picture_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[64, 32\]: expected \[32, 64\]"):
        draw_masks(Image.new("RGB", (64, 32)), [Mask(Box(0, 0, 9, 9), np.zeros((64, 32), dtype=bool))])
