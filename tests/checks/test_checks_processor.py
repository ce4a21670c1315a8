"""The checks of 04_processor accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.checks.processor import solutions


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


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("normalize", lambda a: torch.from_numpy(a.astype(np.float32)) / 127.5 - 1, "channels are still last"),
    ("normalize", lambda a: (torch.from_numpy(a.astype(np.float32)) / 127.5 - 1).reshape(3, 8, 4), "permute"),
    ("normalize", lambda a: torch.from_numpy(a.astype(np.float32)).permute(2, 0, 1) / 255, "0 to 1"),
    ("normalize", lambda a: torch.from_numpy(a.astype(np.float32)).permute(2, 0, 1) / 255 - 0.5, "-0.5"),
    ("prompt_ids", lambda i, n, b, t, x: [b] + [i] * n + t + [x], "after the placeholders"),
    ("prompt_ids", lambda i, n, b, t, x: [i] * n + [b] + t, "newline is missing"),
    ("prompt_ids", lambda i, n, b, t, x: [i] * n + t + [x], "<bos> is missing"),
    ("prompt_ids", lambda i, n, b, t, x: [i, b, *t, x], "placeholders"),
    ("prompt_ids", lambda i, n, b, t, x: [i] * n + [b, t, x], "nested"),
    ("pad_left", pad_right, "on the right"),
    ("pad_left", mask_by_id, "use the lengths"),
    ("pad_left", inverted, "inverted"),
    (
        "box_to_bins",
        lambda b, w, h: [solutions.box_to_bins(b, w, h)[i] for i in (1, 0, 3, 2)],
        "y comes before x",
    ),
    ("box_to_bins", lambda b, w, h: bins(b, w, h, 1024), "1023, not 1024"),
    ("box_to_bins", lambda b, w, h: bins(b, h, w), "swapped"),
    ("box_to_bins", bins, "clip"),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.processor, name)(answer)
