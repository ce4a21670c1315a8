"""Checks for the exercises of 04_processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.models.load import load
from minivlm.processing.images import to_rgb
from minivlm.processing.tokens import Tokenizer

Inputs = dict[str, Tensor]


class solutions:
    """Reference solutions."""

    @staticmethod
    def normalize(array: np.ndarray) -> Tensor:
        """Bytes [H, W, 3] -> fp32 [3, H, W] in [-1, 1]."""
        numbers = torch.from_numpy(array.astype(np.float32)) / 255
        return ((numbers - 0.5) / 0.5).permute(2, 0, 1)

    @staticmethod
    def sizes() -> dict[str, int]:
        """Tokens and numbers in what the small model's processor returns."""
        return {
            "input_ids, picture of 64 x 64": 68,
            "input_ids, picture of 640 x 480": 68,
            "numbers in pixel_values, picture of 640 x 480": 12288,
            "input_ids, answer 'a red star' given": 72,
            "placeholders, prompt 'what is <image> here?'": 64,
            "tokens of '<loc0320>' in a prompt": 1,
        }

    @staticmethod
    def process(
        picture: Image.Image, prompt: str, tokenizer: Tokenizer, image_size: int, num_image_tokens: int
    ) -> Inputs:
        """A picture of any size and mode and a prompt -> the three tensors of a batch of one."""
        square = picture.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(square).astype(np.float32)) / 255
        ids = [tokenizer.image_id] * num_image_tokens + [tokenizer.bos_id] + tokenizer.encode(prompt + "\n")
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "pixel_values": ((pixels - 0.5) / 0.5).permute(2, 0, 1)[None],
        }

    @staticmethod
    def pad_left(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, [rows, longest]."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    @staticmethod
    def box_to_bins(box: Sequence[float], width: float, height: float) -> list[int]:
        """x0, y0, x1, y1 in pixels -> bins y0, x0, y1, x1."""
        x0, y0, x1, y1 = box
        shares = (y0 / height, x0 / width, y1 / height, x1 / width)
        return [min(max(round(share * 1023), 0), 1023) for share in shares]

    @staticmethod
    def find_the_bug(patient: Callable[[Image.Image, str], Inputs]) -> str:
        """The suspect whose tensors equal the patient's, for a picture that is no square."""
        picture, prompt = _wide_picture(), "caption en"
        for name in SUSPECTS:
            suspect = _broken(name, picture, prompt)
            if all(same(suspect[key].float(), patient(picture, prompt)[key].float()) for key in suspect):
                return name
        raise LookupError("none of the suspects")


def normalize(answer: Callable[..., Any]) -> None:
    """A picture that is taller than wide, with bytes from 0 to 255."""
    array = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3) * np.uint8(2)
    array[0, 0, 0], array[-1, -1, -1] = 0, 255
    expected = solutions.normalize(array)
    result = call(answer, array.copy())
    if isinstance(result, Tensor):
        expect(
            list(result.shape) != [8, 4, 3],
            "the channels are still last: move them to the front with permute or transpose",
        )
        reshaped = expected.permute(1, 2, 0).reshape(3, 8, 4)
        expect(
            not same(result, reshaped),
            "reshape gives the axes of memory new names but does not move them: use permute(2, 0, 1)",
        )
        expect(
            not same(result, expected * 0.5 + 0.5),
            "the numbers go from 0 to 1: subtract 0.5 and divide by 0.5 as well",
        )
        expect(not same(result, expected * 0.5), "the numbers go from -0.5 to 0.5: divide by 0.5 as well")
        expect(
            not same(result, expected.transpose(1, 2)) and list(result.shape) != [3, 4, 8],
            "the picture lies on its side: the order is [3, height, width], permute(2, 0, 1)",
        )
        expect(
            not same(result, expected.flip(0)),
            "the channels are in the order blue, green, red: keep red first",
        )
        expect(
            not same(result, (expected * 0.5 + 0.5) * 255),
            "the numbers still go from 0 to 255: divide by 255 first",
        )
        expect(
            not same(result, ((expected * 0.5 + 0.5) * 255 - 0.5) / 0.5, 1e-3),
            "the bytes are not divided by 255 before 0.5 is subtracted",
        )
        expect(
            not same(result, (expected * 0.5 + 0.5) * 2 - 0.5) and not same(result, expected + 0.5),
            "the numbers do not end at -1 and 1: subtract 0.5 first, then divide by 0.5",
        )
        expect(
            not same(result, (expected + 1) * 127.5 / 128 - 1, 1e-4),
            "255 becomes less than 1: divide by 255, not by 256",
        )
        own = expected - expected.mean()
        expect(
            not any(same(result, own / own.std(correction=c), 1e-4) for c in (0, 1)),
            "mean and deviation are those of this picture: take 0.5 and 0.5, the same for every picture",
        )
        expect(
            result.dtype == torch.float32,
            f"the tensor is {result.dtype}, but the tower computes in torch.float32",
        )
    expect_tensor(result, expected)
    right("0 became -1, 255 became 1, and the channels come first.")


def sizes(answer: Callable[[], dict[str, int]]) -> None:
    """Exercise 2: predicted, then counted in what the processor returns."""
    predicted, counted = call(answer), _counted()
    expect(isinstance(predicted, dict), "return a dict: the name of each thing, and a number")
    missing = [name for name in counted if name not in predicted]
    expect(not missing, f"there is no prediction for {', '.join(missing)}")
    wrong = []
    for name, number in counted.items():
        said = predicted[name]
        if said != number:
            why = WHY.get((name, said if isinstance(said, int) else None), WHY[name, None])
            wrong.append(f"{name}: you say {said}, counted {number}. {why}")
    expect(not wrong, f"{len(wrong)} of {len(counted)} differ from the count.\n" + "\n".join(wrong))
    right("the picture is always 64 tokens, whatever its size, and what a user types adds none.")


SMALL, LARGE, PIXELS, SUFFIX, TYPED, LOC = solutions.sizes()
# What a prediction gets wrong; None stands for any other number.
WHY: dict[tuple[str, int | None], str] = {
    (SMALL, 2): "These are the words alone: the placeholders, <bos> and the newline are ids, too",
    (SMALL, 66): "<bos> and the newline are missing",
    (SMALL, 67): "<bos> or the newline is missing",
    (SMALL, 69): "A prompt ends with the newline; <eos> follows an answer",
    (SMALL, None): "64 placeholders, <bos>, two words, the newline",
    (
        LARGE,
        4804,
    ): "The picture is resized to 64 x 64 before it is cut, so it never gives more than 64 patches",
    (LARGE, None): "The picture is resized to 64 x 64 first, so this row is as long as the one above",
    (PIXELS, 921600): "These are the numbers of the file. The tower gets the resized picture",
    (PIXELS, 4096): "Each pixel has three numbers",
    (PIXELS, None): "3 channels of 64 x 64, whatever the size of the file",
    (SUFFIX, 71): "After the answer comes <eos>, which the model learns to write",
    (SUFFIX, 70): "The answer is three words here, and after it comes <eos>",
    (SUFFIX, None): "The prompt's row, then three words, then <eos>",
    (TYPED, 65): "What a user types stays text: `<image>` becomes ordinary tokens, as the cell above shows",
    (TYPED, 1): "The 64 placeholders of the picture are there for every prompt",
    (TYPED, None): "One for each image token; the typed word becomes ordinary tokens",
    (LOC, 4): "Four tokens are a whole box. This is one coordinate",
    (LOC, None): "It is one of the 1024 words that were added to the vocabulary, so it is one token",
}


def _counted() -> dict[str, int]:
    processor = load()[1]
    small, large = Image.new("RGB", (64, 64)), Image.new("RGB", (640, 480))
    row = processor([large], ["caption en"])
    typed = processor([small], ["what is <image> here?"])["input_ids"]
    values = (
        processor([small], ["caption en"])["input_ids"].shape[1],
        row["input_ids"].shape[1],
        row["pixel_values"].numel(),
        processor([small], ["caption en"], suffixes=["a red star"])["input_ids"].shape[1],
        int((typed == processor.tokenizer.image_id).sum()),
        len(processor.tokenizer.encode("<loc0320>")),
    )
    return dict(zip(solutions.sizes(), values, strict=True))


def pad_left(answer: Callable[..., Any]) -> None:
    """Three rows, one of which contains the padding id as a word."""
    pad_id, rows = 3, [[5, 6, 7, 8], [9], [4, 3]]
    ids, mask = solutions.pad_left(rows, pad_id)
    result = call(answer, [list(row) for row in rows], pad_id)
    expect(isinstance(result, tuple | list) and len(result) == 2, "return two tensors: the ids and the mask")
    for wrong, hint in (
        (
            torch.tensor([[5, 6, 7, 8], [9, 3, 3, 3], [4, 3, 3, 3]]),
            "the rows are padded on the right: put the padding in front",
        ),
        (torch.tensor([[5, 6, 7, 8], [0, 0, 0, 9], [0, 0, 4, 3]]), "the padding is 0: use pad_id"),
        (torch.tensor([[8, 7, 6, 5], [3, 3, 3, 9], [3, 3, 3, 4]]), "the rows are turned around"),
        (torch.tensor([[5], [9], [4]]), "the rows are cut to the shortest one: fill up to the longest"),
        (torch.tensor([[8], [9], [3]]), "the rows are cut to the shortest one: fill up to the longest"),
        (mask, "ids and mask are exchanged: the ids come first"),
    ):
        expect(not same(result[0], wrong), hint)
    expect(isinstance(result[0], Tensor), f"the ids are a {type(result[0]).__name__}: make them a tensor")
    expect_tensor(result[0], ids, "ids")
    for wrong, hint in (
        (1 - mask, "the mask is inverted: 1 marks real tokens, 0 padding"),
        (
            (ids != pad_id).long(),
            "comparing with pad_id is not enough: a row may contain that id as a real token; use the lengths",
        ),
        (mask.flip(1), "the mask is padded on the right, and the ids are padded on the left"),
        (torch.ones_like(mask), "the mask is 1 everywhere: the filled places have to be 0"),
    ):
        expect(not same(result[1], wrong), hint)
    expect_tensor(result[1], mask, "the mask")
    expect(
        result[0].dtype == result[1].dtype == torch.int64,
        f"the tensors are {result[0].dtype} and {result[1].dtype}: make both torch.int64",
    )
    right("every row ends where its answer begins.")


def box_to_bins(answer: Callable[..., Any]) -> None:
    """A box inside a wide picture, and two that reach over its edges."""
    box, width, height = (100.0, 50.0, 333.0, 200.0), 640, 400
    expected = solutions.box_to_bins(box, width, height)
    result = _numbers(call(answer, box, width, height))
    across, down = [100 / width, 333 / width], [50 / height, 200 / height]
    shares = [down[0], across[0], down[1], across[1]]
    top, left, bottom, right_edge = expected
    in_steps = [round(v * 1023) for v in (200 / height - down[0], across[1] - across[0])]
    for wrong, hint in (
        ([left, top, right_edge, bottom], "y comes before x in PaliGemma's order"),
        ([top, bottom, left, right_edge], "the order is corner by corner: y0, x0, y1, x1"),
        ([top, left, *in_steps], "the last two are height and width of the box: give its lower right corner"),
        (shares, "these are shares: multiply by 1023 and round"),
        ([v * 1023 for v in shares], "these are not whole numbers yet: round them"),
        ([int(v * 1023) for v in shares], "int() and // cut off: use round"),
        ([round(v * 1024) for v in shares], "multiply by 1023, not 1024: the far edge is bin 1023"),
        ([round(v * 1000) for v in shares], "there are 1024 bins, 0 to 1023, not 1000"),
        (
            [round(v / s * 1023) for v, s in zip((50, 100, 200, 333), (640, 400) * 2, strict=True)],
            "y is a share of the height and x of the width: you swapped them",
        ),
        (
            [round(v / max(width, height) * 1023) for v in (50, 100, 200, 333)],
            "both are divided by the longer side: each side of the picture has its own 1023 steps",
        ),
    ):
        close = len(result) == 4 and all(abs(a - b) < 1e-6 for a, b in zip(result, wrong, strict=True))
        expect(not close, hint)
    expect(len(result) == 4, f"return four numbers, y0, x0, y1, x1: you return {len(result)}")
    expect(result == expected, f"for {box} in {width} x {height} expected {expected}, got {result}")
    for over in ((-20.0, 10.0, 700.0, 380.0), (30.0, -8.0, 600.0, 480.0)):
        bins, fits = _numbers(call(answer, over, width, height)), solutions.box_to_bins(over, width, height)
        expect(
            all(0 <= number <= 1023 for number in bins),
            f"the box {over} reaches over the edge and gives {bins}: keep the bins between 0 and 1023",
        )
        expect(
            bins == fits,
            f"the box {over} reaches over the edge of {width} x {height}. Expected {fits}, what is in "
            f"the picture, but got {bins}: cut an edge at its own side, leave the others as they are",
        )
    right("four words, y before x, whatever the picture's size.")


def process(answer: Callable[..., Inputs]) -> None:
    """Exercise 4: wide pictures, with transparency and with a palette, and a prompt with a typed <image>."""
    tokenizer, size, count = load()[1].tokenizer, 32, 16  # not the sizes of our processor
    picture, prompt = _wide_picture().convert("RGBA"), "what is <image> here?"
    result = call(answer, picture.copy(), prompt, tokenizer, size, count)
    expected = solutions.process(picture, prompt, tokenizer, size, count)
    expect(isinstance(result, dict), "return a dict with input_ids, attention_mask and pixel_values")
    missing = [key for key in expected if key not in result]
    expect(not missing, f"the dict has no {', '.join(missing)}")
    for key, tensor in expected.items():
        value = result[key]
        expect(isinstance(value, Tensor), f"{key} is a {type(value).__name__}: make it a tensor")
        expect(
            value.ndim != tensor.ndim - 1,
            f"{key} has shape {list(value.shape)}: the batch comes first, here a batch of one",
        )
    ids, words = result["input_ids"], tokenizer.encode(prompt)
    image, bos, newline = [tokenizer.image_id], [tokenizer.bos_id], tokenizer.encode("\n")
    for wrong, hint in (
        (
            image * count + bos + words,
            "the newline is missing: it tells the model that the answer comes next",
        ),
        (image * count + words + newline, "<bos> is missing: it stands between picture and prompt"),
        (bos + image * count + words + newline, "<bos> comes after the placeholders, not before them"),
        (bos + words + newline, "there are no placeholders: the picture would have no place in the row"),
        (image + bos + words + newline, "there is one placeholder, but the picture has num_image_tokens"),
        (bos + words + image * count + newline, "the placeholders come first, then <bos> and the prompt"),
        (
            [*image * count, *bos, *words, *newline, tokenizer.eos_id],
            "a prompt does not end with <eos>: the model would have to answer after the end",
        ),
    ):
        expect(not same(ids, torch.tensor([wrong])), hint)
    found = int((ids == tokenizer.image_id).sum())
    expect(
        found <= count,
        f"there are {found} placeholders, but num_image_tokens is {count}: build the row from ids, so that a "
        "typed <image> is text",
    )
    expect_tensor(ids, expected["input_ids"], "input_ids")
    expect(
        same(result["attention_mask"], expected["attention_mask"]),
        "attention_mask should be a 1 for each id: nothing is padded in a row that is alone",
    )
    _explain_pixels(result["pixel_values"], expected["pixel_values"], picture.convert("RGB"), size)
    expect_tensor(result["pixel_values"], expected["pixel_values"], "pixel_values", 1e-3)
    palette = _wide_picture().convert("P")
    result = call(answer, palette.copy(), prompt, tokenizer, size, count)
    expected = solutions.process(palette, prompt, tokenizer, size, count)
    expect(
        same(result["pixel_values"], expected["pixel_values"], 1e-3),
        "only a picture with a palette comes out wrong. Its pixels are numbers of colors, which have no "
        "mean: make it RGB first, then resize it",
    )
    right("any picture and any prompt become what the model was trained on.")


def _explain_pixels(result: Tensor, expected: Tensor, picture: Image.Image, size: int) -> None:
    """Name the likely mistake in pixel_values, if it is a known one."""
    expect(
        list(result.shape) != [1, 4, size, size],
        "the tensor has four channels: a picture with transparency becomes RGB first",
    )
    expect(list(result.shape) != [1, size, size, 3], "the channels are still last: move them to the front")
    expect(
        list(result.shape) != [1, 3, picture.height, picture.width],
        f"the picture has its own size: resize it to {size} x {size}",
    )
    side, (width, height) = min(picture.size), picture.size
    left, top = (width - side) // 2, (height - side) // 2
    cropped = picture.crop((left, top, left + side, top + side))
    black = Image.new("RGB", (max(picture.size),) * 2)
    black.paste(picture, ((max(picture.size) - width) // 2, (max(picture.size) - height) // 2))
    filters = {name: Image.Resampling[name] for name in ("BILINEAR", "NEAREST", "LANCZOS")}
    pixels = {
        "the middle is cropped: PaliGemma squeezes the whole picture into the square": _pixels(cropped, size),
        "the picture is padded to a square: PaliGemma squeezes it instead": _pixels(black, size),
        **{
            f"the picture is resized with {name.lower()}: the model was trained with bicubic": _pixels(
                picture, size, resampling
            )
            for name, resampling in filters.items()
        },
        "the numbers go from 0 to 1: subtract 0.5 and divide by 0.5": expected[0] / 2 + 0.5,
        "the numbers go from 0 to 255: divide by 255, then normalize": (expected[0] / 2 + 0.5) * 255,
        "reshape jumbles the picture: move the channels with permute": expected[0]
        .permute(1, 2, 0)
        .reshape(3, size, size),
        "height and width are exchanged: permute(2, 0, 1)": expected[0].transpose(1, 2),
        "red and blue are exchanged": expected[0].flip(0),
    }
    for hint, wrong in pixels.items():
        expect(not same(result, wrong[None], 1e-3), hint)


SUSPECTS = ("no newline", "two <bos>", "pixels 0 ... 1", "BGR", "bilinear", "center crop", "reshape")
_MISTAKE = "center crop"


def _pixels(
    picture: Image.Image, size: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> Tensor:
    return solutions.normalize(np.asarray(picture.resize((size, size), resampling)))


def _wide_picture() -> Image.Image:
    """No square, and every edge another color; small stripes show how it was resized."""
    y, x = np.mgrid[0:96, 0:144]
    array = np.stack([x * 255 // 143, y * 255 // 95, (x // 3 % 2) * 255], axis=-1)
    return Image.fromarray(array.astype(np.uint8))


def _broken(name: str, picture: Image.Image, prompt: str) -> Inputs:
    """What the processor with this one mistake returns."""
    tokenizer, size = load()[1].tokenizer, 64
    picture = to_rgb(picture)
    if name == "center crop":
        side, (width, height) = min(picture.size), picture.size
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    if name == "bilinear":
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    inputs = solutions.process(picture, prompt, tokenizer, size, 64)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    if name == "no newline":
        ids = ids[:, :-1]
    elif name == "two <bos>":
        ids = torch.cat([ids[:, :65], ids[:, 64:]], dim=1)
    elif name == "pixels 0 ... 1":
        pixels = pixels / 2 + 0.5
    elif name == "BGR":
        pixels = pixels.flip(1)
    elif name == "reshape":
        pixels = pixels.permute(0, 2, 3, 1).reshape(pixels.shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def patient(picture: Image.Image, prompt: str) -> Inputs:
    """The small model's processor for one picture and prompt, with one mistake in it."""
    return _broken(_MISTAKE, picture, prompt)


def find_the_bug(answer: Callable[[Callable[[Image.Image, str], Inputs]], str]) -> None:
    """Exercise 6: the name of the mistake."""
    name = call(answer, patient)
    expect(
        name in SUSPECTS,
        f"return the name of the mistake, one of {', '.join(map(repr, SUSPECTS))}, but it is {name!r}",
    )
    seen, good = patient(_wide_picture(), "caption en"), _broken("", _wide_picture(), "caption en")
    length = seen["input_ids"].shape[1]
    low, high = seen["pixel_values"].min(), seen["pixel_values"].max()
    off = (seen["pixel_values"] - good["pixel_values"]).abs().max()
    symptoms = {
        "no newline": f"without a newline the row would be an id shorter. Count input_ids: {length} in both",
        "two <bos>": f"with two <bos> the row would be an id longer. Count input_ids: {length} in both",
        "pixels 0 ... 1": f"then none would be negative. The patient's go from {low:.0f} to {high:.0f}",
        "BGR": "then a red picture would turn blue. Send Image.new('RGB', (64, 64), 'red') through it",
        "reshape": "then a square picture would be jumbled, too. Send one of the sample scenes through it",
        "bilinear": "then edges would be a little softer. For a wide picture the patient differs by up to "
        f"{off:.1f} from the right tensor, which is no small change: where are the left and right edges?",
    }
    if name != _MISTAKE:
        raise NotYet(symptoms[name])
    right("for a square picture nothing is wrong: a test with one kind of input would have passed.")


def _numbers(result: Any) -> list[Any]:
    """A list, tuple, array or tensor as a list of Python numbers."""
    return list(result.tolist() if hasattr(result, "tolist") else result)
