"""Checks for the exercises of 04_processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlm.checks import call, expect, expect_tensor, right, same


class solutions:
    """Reference solutions."""

    @staticmethod
    def normalize(array: np.ndarray) -> Tensor:
        """Bytes [H, W, 3] -> fp32 [3, H, W] in [-1, 1]."""
        numbers = torch.from_numpy(array.astype(np.float32)) / 255
        return ((numbers - 0.5) / 0.5).permute(2, 0, 1)

    @staticmethod
    def prompt_ids(
        image_id: int, num_image_tokens: int, bos_id: int, text_ids: Sequence[int], newline_id: int
    ) -> list[int]:
        """Placeholders, <bos>, text, newline."""
        return [image_id] * num_image_tokens + [bos_id] + list(text_ids) + [newline_id]

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
            result.dtype == torch.float32,
            f"the tensor is {result.dtype}, but the tower computes in torch.float32",
        )
    expect_tensor(result, expected)
    right("0 became -1, 255 became 1, and the channels come first.")


def prompt_ids(answer: Callable[..., Any]) -> None:
    """Three placeholders and three words."""
    result = list(call(answer, 900, 3, 2, [10, 11, 12], 7))
    expected = solutions.prompt_ids(900, 3, 2, [10, 11, 12], 7)
    expect(
        all(isinstance(index, int) for index in result),
        "the ids are nested: join the lists with +, or use extend instead of append",
    )
    expect(
        result.count(900) == 3,
        f"there are {result.count(900)} placeholders, but the picture has 3 image tokens",
    )
    expect(2 in result, "<bos> is missing: it goes between picture and prompt")
    expect(result[0] != 2, "<bos> comes after the placeholders, not before them")
    expect(7 in result, "the newline is missing: it tells the model that the answer comes next")
    expect(result[-1] == 7, "the newline must be the last token of the prompt")
    expect(result == expected, f"expected {expected}, got {result}")
    right("picture, <bos>, prompt, newline: the form that the model was trained on.")


def pad_left(answer: Callable[..., Any]) -> None:
    """Three rows, one of which contains the padding id as a word."""
    rows = [[5, 6, 7, 8], [9], [4, 0]]
    expected_ids, expected_mask = solutions.pad_left(rows, 0)
    result = call(answer, [list(row) for row in rows], 0)
    expect(isinstance(result, tuple) and len(result) == 2, "return two tensors: the ids and the mask")
    ids, mask = result
    expect(
        not same(ids, torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0], [4, 0, 0, 0]])),
        "the rows are padded on the right: put the padding in front",
    )
    expect_tensor(ids, expected_ids, "ids")
    expect(not same(mask, 1 - expected_mask), "the mask is inverted: 1 marks real tokens, 0 padding")
    expect(
        not same(mask, (expected_ids != 0).long()),
        "comparing with pad_id is not enough: a row may contain that id as a real token; use the lengths",
    )
    expect_tensor(mask, expected_mask, "the mask")
    expect(
        ids.dtype == torch.int64 and mask.dtype == torch.int64,
        f"the tensors are {ids.dtype} and {mask.dtype}, expected torch.int64",
    )
    right("every row ends where its answer begins.")


def box_to_bins(answer: Callable[..., Any]) -> None:
    """A box inside a wide picture, and one that extends beyond the edge."""
    box, width, height = (100.0, 50.0, 333.0, 200.0), 640, 400
    expected = solutions.box_to_bins(box, width, height)
    result = list(call(answer, box, width, height))
    x0, y0, x1, y1 = expected[1], expected[0], expected[3], expected[2]
    expect(result != [x0, y0, x1, y1], "y comes before x in PaliGemma's order")
    for wrong, hint in (
        (
            [box[1] / height, box[0] / width, box[3] / height, box[2] / width],
            "these are shares: multiply by 1023 and round",
        ),
        (
            [int(v / s * 1023) for v, s in zip((50, 100, 200, 333), (400, 640) * 2, strict=True)],
            "int() truncates: use round",
        ),
        (
            [round(v / s * 1024) for v, s in zip((50, 100, 200, 333), (400, 640) * 2, strict=True)],
            "multiply by 1023, not 1024: the far edge is bin 1023",
        ),
        (
            [round(v / s * 1023) for v, s in zip((50, 100, 200, 333), (640, 400) * 2, strict=True)],
            "y is a share of the height and x of the width: you swapped them",
        ),
    ):
        expect(result != wrong, hint)
    expect(result == expected, f"expected {expected}, got {result}")
    outside = list(call(answer, (-20.0, 10.0, 700.0, 380.0), width, height))
    expect(
        outside == solutions.box_to_bins((-20.0, 10.0, 700.0, 380.0), width, height),
        f"a box that extends beyond the edge gives {outside}: clip the bins to 0 ... 1023",
    )
    right("four words, y before x, whatever the picture's size.")
