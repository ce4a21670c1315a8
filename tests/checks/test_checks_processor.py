"""The checks of 04_processor accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minivlm import checks, load
from minivlm.checks import NotYet
from minivlm.checks.processor import SUSPECTS, solutions

PICTURE = Path(__file__).parents[2] / "figures/samples/scene_2.png"


def pad_right(rows: list[list[int]], pad_id: int) -> Any:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    return ids, (ids != pad_id).long()


def mask_by_id(rows: list[list[int]], pad_id: int) -> Any:
    ids, _ = solutions.pad_left(rows, pad_id)
    return ids, (ids != pad_id).long()


def inverted(rows: list[list[int]], pad_id: int) -> Any:
    ids, mask = solutions.pad_left(rows, pad_id)
    return ids, 1 - mask


def bins(box: Any, width: float, height: float, most: int = 1023) -> list[int]:
    x0, y0, x1, y1 = box
    return [round(v * most) for v in (y0 / height, x0 / width, y1 / height, x1 / width)]


def zero_for_padding(rows: list[list[int]], pad_id: int) -> Any:
    return solutions.pad_left(rows, 0)


def to_the_shortest(rows: list[list[int]], pad_id: int) -> Any:
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    return ids, torch.ones_like(ids)


def lists(rows: list[list[int]], pad_id: int) -> Any:
    ids, mask = solutions.pad_left(rows, pad_id)
    return ids.tolist(), mask.tolist()


def padded(change: Callable[[Tensor, Tensor], Any]) -> Callable[..., Any]:
    return lambda rows, pad_id: change(*solutions.pad_left(rows, pad_id))


def floats(array: Any) -> Any:
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)


def but(**changes: Any) -> Callable[[], dict[str, Any]]:
    names = dict(zip(("small", "large", "pixels", "suffix", "typed", "loc"), solutions.sizes(), strict=True))
    return lambda: solutions.sizes() | {names[name]: number for name, number in changes.items()}


def in_bins(combine: Callable[..., Any]) -> Callable[..., Any]:
    return lambda box, width, height: combine(*box, width, height)


def processed(
    ids: Callable[[list[int], list[int], list[int], list[int]], list[int]] | None = None,
    picture: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    pixels: Callable[[Tensor], Tensor] = lambda pixels: pixels,
    filter: Image.Resampling = Image.Resampling.BICUBIC,
) -> Callable[..., Any]:
    """The whole processor, with a place for a mistake in each of its parts."""

    def answer(image: Image.Image, prompt: str, tokenizer: Any, size: int, count: int) -> Any:
        square = picture(image).resize((size, size), filter)
        result = solutions.process(square, prompt, tokenizer, size, count)
        if ids is not None:
            parts = ([tokenizer.image_id] * count, [tokenizer.bos_id], tokenizer.encode(prompt))
            result["input_ids"] = torch.tensor([ids(*parts, tokenizer.encode("\n"))])
            result["attention_mask"] = torch.ones_like(result["input_ids"])
        result["pixel_values"] = pixels(result["pixel_values"])
        return result

    return answer


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    return lambda *args: change(solutions.process(*args))


def four_channels(image: Image.Image, prompt: str, tokenizer: Any, size: int, count: int) -> Any:
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels = torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None]
    return solutions.process(image, prompt, tokenizer, size, count) | {"pixel_values": pixels}


def from_text(image: Image.Image, prompt: str, tokenizer: Any, size: int, count: int) -> Any:
    ids = [tokenizer.image_id] * count + [tokenizer.bos_id] + tokenizer.encode("what is ")
    ids += [tokenizer.image_id, *tokenizer.encode(" here?\n")]
    row = torch.tensor([ids])
    result = solutions.process(image, prompt, tokenizer, size, count)
    return result | {"input_ids": row, "attention_mask": torch.ones_like(row)}


def cropped(image: Image.Image) -> Image.Image:
    side, left, top = min(image.size), (image.width - min(image.size)) // 2, 0
    return image.crop((left, top, left + side, top + side))


def letterboxed(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("normalize", lambda a: torch.from_numpy(a.astype(np.float32)) / 127.5 - 1, "channels are still last"),
    ("normalize", lambda a: (torch.from_numpy(a.astype(np.float32)) / 127.5 - 1).reshape(3, 8, 4), "permute"),
    ("normalize", lambda a: torch.from_numpy(a.astype(np.float32)).permute(2, 0, 1) / 255, "0 to 1"),
    ("normalize", lambda a: torch.from_numpy(a.astype(np.float32)).permute(2, 0, 1) / 255 - 0.5, "-0.5"),
    ("normalize", lambda a: floats(a).transpose(1, 2) / 127.5 - 1, "on its side"),
    ("normalize", lambda a: floats(a).flip(0) / 127.5 - 1, "blue, green, red"),
    ("normalize", lambda a: floats(a), "0 to 255"),
    ("normalize", lambda a: (floats(a) - 0.5) / 0.5, "not divided by 255"),
    ("normalize", lambda a: floats(a) / 255 / 0.5 - 0.5, "subtract 0.5 first"),
    ("normalize", lambda a: floats(a) / 128 - 1, "not by 256"),
    ("normalize", lambda a: (floats(a) - floats(a).mean()) / floats(a).std(), "of this picture"),
    ("normalize", lambda a: (floats(a) / 127.5 - 1).double(), "float64"),
    ("sizes", but(small=2), "the words alone"),
    ("sizes", but(small=66), "<bos> and the newline are missing"),
    ("sizes", but(small=67), "<bos> or the newline"),
    ("sizes", but(small=69), "<eos> follows an answer"),
    ("sizes", but(large=4804), "resized to 64 x 64 before"),
    ("sizes", but(pixels=921600), "numbers of the file"),
    ("sizes", but(pixels=4096), "three numbers"),
    ("sizes", but(suffix=71), "which the model learns to write"),
    ("sizes", but(typed=65), "stays text"),
    ("sizes", but(typed=1), "for every prompt"),
    ("sizes", but(loc=10), "one of the 1024 words"),
    ("sizes", but(loc=4, small=68.5), "2 of 6 differ"),
    ("sizes", lambda: {}, "no prediction"),
    ("sizes", lambda: [68], "return a dict"),
    ("pad_left", pad_right, "on the right"),
    ("pad_left", mask_by_id, "use the lengths"),
    ("pad_left", inverted, "inverted"),
    ("pad_left", zero_for_padding, "use pad_id"),
    ("pad_left", to_the_shortest, "longest"),
    ("pad_left", lists, "make them a tensor"),
    ("pad_left", padded(lambda ids, mask: (mask, ids)), "exchanged"),
    ("pad_left", padded(lambda ids, mask: (ids, mask.flip(1))), "mask is padded on the right"),
    ("pad_left", padded(lambda ids, mask: (ids, torch.ones_like(mask))), "1 everywhere"),
    ("pad_left", padded(lambda ids, mask: (ids, mask.float())), "torch.int64"),
    ("pad_left", padded(lambda ids, mask: ids), "two tensors"),
    ("pad_left", lambda rows, pad: solutions.pad_left([row[::-1] for row in rows], pad), "turned around"),
    (
        "box_to_bins",
        lambda b, w, h: [solutions.box_to_bins(b, w, h)[i] for i in (1, 0, 3, 2)],
        "y comes before x",
    ),
    ("box_to_bins", lambda b, w, h: bins(b, w, h, 1024), "1023, not 1024"),
    ("box_to_bins", lambda b, w, h: bins(b, h, w), "swapped"),
    ("box_to_bins", bins, "keep the bins between 0 and 1023"),
    ("box_to_bins", lambda b, w, h: bins((0, *b[1:]) if b[0] < 0 else b, w, h), "keep the bins"),
    ("box_to_bins", lambda b, w, h: bins([min(max(v, 0), h) for v in b], w, h), "at its own side"),
    ("box_to_bins", lambda b, w, h: [v / 1023 for v in bins(b, w, h)], "expected"),
    ("box_to_bins", in_bins(lambda a, b, c, d, w, h: [b / h, a / w, d / h, c / w]), "these are shares"),
    (
        "box_to_bins",
        in_bins(lambda a, b, c, d, w, h: [v * 1023 for v in (b / h, a / w, d / h, c / w)]),
        "not whole numbers",
    ),
    (
        "box_to_bins",
        in_bins(lambda a, b, c, d, w, h: [int(v * 1023) for v in (b / h, a / w, d / h, c / w)]),
        "cut off",
    ),
    ("box_to_bins", lambda b, w, h: bins(b, max(w, h), max(w, h)), "longer side"),
    ("box_to_bins", lambda b, w, h: bins((*b[:2], b[2] - b[0], b[3] - b[1]), w, h), "height and width of"),
    ("box_to_bins", lambda b, w, h: [solutions.box_to_bins(b, w, h)[i] for i in (0, 2, 1, 3)], "corner by"),
    ("box_to_bins", lambda b, w, h: bins(b, w, h)[:2], "return four numbers"),
    ("box_to_bins", lambda b, w, h: bins(b, w, h, 1000), "not 1000"),
    ("process", processed(lambda i, b, t, n: i + b + t), "newline is missing"),
    ("process", processed(lambda i, b, t, n: i + t + n), "<bos> is missing"),
    ("process", processed(lambda i, b, t, n: b + i + t + n), "after the placeholders"),
    ("process", processed(lambda i, b, t, n: b + t + n), "no placeholders"),
    ("process", processed(lambda i, b, t, n: i[:1] + b + t + n), "one placeholder"),
    ("process", processed(lambda i, b, t, n: b + t + i + n), "come first"),
    ("process", processed(lambda i, b, t, n: [*i, *b, *t, *n, 1]), "does not end with <eos>"),
    ("process", from_text, "17 placeholders"),
    ("process", four_channels, "four channels"),
    ("process", lambda picture, prompt, *_: dict(load()[1]([picture], [prompt])), "num_image_tokens is 16"),
    ("process", processed(picture=cropped), "middle is cropped"),
    ("process", processed(picture=letterboxed), "padded to a square"),
    ("process", processed(filter=Image.Resampling.NEAREST), "nearest"),
    (
        "process",
        processed(picture=lambda p: p.convert("RGB"), filter=Image.Resampling.BILINEAR),
        "bilinear",
    ),
    ("process", processed(pixels=lambda p: p / 2 + 0.5), "0 to 1"),
    ("process", processed(pixels=lambda p: (p / 2 + 0.5) * 255), "0 to 255"),
    ("process", processed(pixels=lambda p: p.permute(0, 2, 3, 1)), "still last"),
    ("process", processed(pixels=lambda p: p.permute(0, 2, 3, 1).reshape(p.shape)), "reshape jumbles"),
    ("process", processed(pixels=lambda p: p.flip(1)), "red and blue"),
    ("process", processed(pixels=lambda p: p[0]), "batch comes first"),
    ("process", processed(), "make it RGB first, then resize"),
    ("process", changed(lambda d: tuple(d.values())), "return a dict"),
    ("process", changed(lambda d: {"input_ids": d["input_ids"]}), "has no attention_mask"),
    ("process", changed(lambda d: d | {"input_ids": [1]}), "make it a tensor"),
    ("process", changed(lambda d: d | {"attention_mask": d["input_ids"] * 0}), "a 1 for each id"),
    ("find_the_bug", lambda patient: "no newline", "an id shorter"),
    ("find_the_bug", lambda patient: "two <bos>", "id longer"),
    ("find_the_bug", lambda patient: "pixels 0 ... 1", "none would be negative"),
    ("find_the_bug", lambda patient: "BGR", "turn blue"),
    ("find_the_bug", lambda patient: "reshape", "square picture would be jumbled"),
    ("find_the_bug", lambda patient: "bilinear", "where are the left and right edges"),
    ("find_the_bug", lambda patient: "crop", "one of 'no newline'"),
    ("find_the_bug", lambda patient: 5, "return the name"),
    ("find_the_bug", lambda patient: patient, "return the name"),
    ("find_the_bug", lambda patient: None, "returns nothing"),
]


@pytest.mark.parametrize("name", ["normalize", "sizes", "pad_left", "box_to_bins", "process", "find_the_bug"])
def test_solutions_are_right(name: str) -> None:
    getattr(checks.processor, name)(getattr(solutions, name))


def test_only_a_square_picture_hides_the_bug() -> None:
    square = Image.open(PICTURE)
    good = solutions.process(square, "caption en", load()[1].tokenizer, 64, 64)
    seen = checks.processor.patient(square, "caption en")
    assert all(torch.equal(seen[key], good[key]) for key in good)
    assert len(SUSPECTS) == len(set(SUSPECTS))


def test_other_forms_are_right() -> None:
    checks.processor.normalize(lambda a: torch.tensor(a).movedim(-1, 0).float().div(127.5).sub(1))
    checks.processor.box_to_bins(lambda b, w, h: tuple(np.array(solutions.box_to_bins(b, w, h))))


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.processor, name)(answer)
