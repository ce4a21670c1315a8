"""Checks for 11_real_checkpoints: a file's header, names, what fits, a floor, int8, soft-capping."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.models.paligemma import PaliGemmaConfig
from minivlm.models.sizes import cache_bytes, weight_bytes

Shapes = Mapping[str, tuple[int, ...]]
Names = tuple[list[str], list[str], list[str]]


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def read_header(path: Path) -> tuple[dict[str, Any], int]:
        """The header of a safetensors file without its metadata, and the byte where the numbers begin."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return header, 8 + length

    @staticmethod
    def compare_shapes(found: Shapes, wanted: Shapes) -> Names:
        """Names that are missing, unexpected, and present with another shape, each list sorted."""
        missing = sorted(wanted.keys() - found.keys())
        unexpected = sorted(found.keys() - wanted.keys())
        both = found.keys() & wanted.keys()
        misshapen = sorted(name for name in both if tuple(found[name]) != tuple(wanted[name]))
        return missing, unexpected, misshapen

    @staticmethod
    def rows_that_fit(config: PaliGemmaConfig, memory: int, tokens: int, dtype: torch.dtype) -> int:
        """How many rows of `tokens` tokens fit into `memory` bytes next to the weights."""
        left = memory - weight_bytes(config, dtype)
        return max(0, left // cache_bytes(config, tokens, 1, dtype))

    @staticmethod
    def shortest_time(operations: float, num_bytes: float, peak: float, bandwidth: float) -> float:
        """The least seconds a step can take, with `peak` operations/s and `bandwidth` bytes/s."""
        return max(operations / peak, num_bytes / bandwidth)

    @staticmethod
    def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [out, in] -> int8 values [out, in] and one scale for each row [out]."""
        scale = weight.abs().amax(dim=1) / 127
        values = (weight / scale.clamp(min=1e-12)[:, None]).round().to(torch.int8)
        return values, scale

    @staticmethod
    def capped_scores(scores: Tensor, mask: Tensor, cap: float) -> Tensor:
        """Scores within +-cap where the mask is True, minus infinity elsewhere."""
        return (cap * torch.tanh(scores / cap)).masked_fill(~mask, -torch.inf)


def read_header(answer: Callable[[Path], tuple[dict[str, Any], int]]) -> None:
    """Exercise 1."""
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.int8)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        header, start = solutions.read_header(path)
        try:
            result = call(answer, path)
        except NotYet as error:
            if isinstance(error.__cause__, OverflowError | MemoryError):
                raise NotYet(
                    "the length comes out enormous: the first 8 bytes are little-endian, lowest byte first"
                ) from error
            if isinstance(error.__cause__, ValueError) and "json" in type(error.__cause__).__module__:
                raise NotYet(
                    f"{error}. The JSON text begins at byte 8 and is as long as the first 8 bytes say, "
                    "neither more nor less"
                ) from error
            if isinstance(error.__cause__, UnicodeDecodeError):
                raise NotYet(
                    "you passed bytes to json.loads that are not text: the JSON begins at byte 8 and ends "
                    "where the numbers begin"
                ) from error
            raise
    expect(
        isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], dict),
        "return two things, separated by a comma: the header, a dict, and the position where the numbers "
        "begin",
    )
    given, place = result
    expect(
        "__metadata__" not in given,
        "your header still contains __metadata__, which is not a tensor: remove it",
    )
    expect(
        given == header,
        f"the header should name the tensors {sorted(header)}, but yours names {sorted(given)}",
    )
    expect(
        place != start - 8,
        "the numbers begin after the 8 bytes of the length *and* the header: add 8",
    )
    expect(place == start, f"the numbers begin at byte {start} of this file, but you say {place}")
    right("with 8 bytes and some JSON you know what is in a file without reading a single weight.")


def compare_shapes(answer: Callable[[Shapes, Shapes], Names]) -> None:
    """Exercise 2."""
    found = {"norm": (4,), "up": (8, 4), "zeta": (1,), "extra": (2,), "down": (8, 4)}
    wanted = {"norm": (4,), "up": (8, 4), "head": (9, 4), "down": (4, 8), "bias": (4,)}
    missing, unexpected, misshapen = solutions.compare_shapes(found, wanted)
    result = call(answer, dict(found), dict(wanted))
    expect(
        isinstance(result, tuple) and len(result) == 3,
        "return three lists, separated by commas: missing, unexpected, misshapen",
    )
    lists = [list(names) for names in result]
    expect(
        lists[:2] != [unexpected, missing],
        "missing and unexpected are swapped: missing is what the model needs and the file lacks",
    )
    expect(
        "down" in lists[2],
        "`down` is [8, 4] in the file and [4, 8] in the model: the names agree, so compare the shapes too",
    )
    expect(
        "down" not in lists[0] + lists[1],
        "`down` is in the file and in the model, but with another shape: it belongs only in misshapen",
    )
    expect(
        lists[2] == misshapen,
        f"misshapen is {lists[2]}, expected {misshapen}: only names that both have can differ in shape",
    )
    expect(
        [sorted(names) for names in lists] == [missing, unexpected, misshapen],
        f"missing {lists[0]} and unexpected {lists[1]}, expected {missing} and {unexpected}",
    )
    expect(
        lists == [missing, unexpected, misshapen],
        "sort each list: a message whose order changes from run to run is hard to compare",
    )
    clean = call(answer, dict(wanted), dict(wanted))
    expect(tuple(map(list, clean)) == ([], [], []), "two equal lists of names should give three empty lists")
    right("three questions for every checkpoint: what is missing, what is left over, what has another shape?")


def rows_that_fit(answer: Callable[[PaliGemmaConfig, int, int, torch.dtype], int]) -> None:
    """Exercise 3."""
    config, dtype = PaliGemmaConfig(), torch.bfloat16
    weights, row = weight_bytes(config, dtype), cache_bytes(config, 300, 1, dtype)
    memory = weights + 10 * row + row * 2 // 3
    result = call(answer, config, memory, 300, dtype)
    expect(
        isinstance(result, int) and not isinstance(result, bool),
        f"expected a whole number, got {type(result).__name__}: // divides and rounds down",
    )
    expect(
        result != memory // row,
        "you filled all of the memory with rows: the weights need memory as well",
    )
    expect(
        result not in (memory // (weights + row), memory // weights),
        "you counted the weights once for each row: all rows share them",
    )
    expect(result != 11, "you rounded up: the last row has only two thirds of the memory it needs")
    expect(result == 10, f"10 rows fit in this case; you found {result}")
    double = memory + weights + 11 * row
    found = call(answer, config, double, 300, torch.float32)
    expect(found == 10, "with 4 bytes per number the answer is wrong: pass the dtype to both functions")
    nothing = call(answer, config, weights // 2, 300, dtype)
    expect(nothing == 0, f"if not even the weights fit, the answer is 0 rows; you found {nothing}")
    right("the weights are paid once, the cache by every row.")


def shortest_time(answer: Callable[[float, float, float, float], float]) -> None:
    """Exercise 4."""
    for operations, num_bytes in ((800.0, 20.0), (80.0, 60.0)):
        result = call(answer, operations, num_bytes, 100.0, 10.0)
        compute, read = operations / 100, num_bytes / 10
        for wrong, hint in (
            (compute + read, "you added the two times: reading and computing happen at the same time"),
            (min(compute, read), "you took the smaller time: the step ends when the slower part is done"),
            (
                max(100 / operations, 10 / num_bytes),
                "your fractions are upside down: time is work divided by speed",
            ),
        ):
            expect(abs(result - wrong) > 1e-9, hint)
        expect(
            abs(result - max(compute, read)) < 1e-9,
            f"{operations:.0f} operations at 100/s and {num_bytes:.0f} bytes at 10/s take at least "
            f"{max(compute, read):.1f} s; you found {result:.4g}",
        )
    right("a step cannot be faster than the slower of its two halves.")


def quantize_rows(answer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Exercise 5."""
    weight = torch.tensor(
        [[0.5, -1.27, 0.3, 0.006], [2.54, 0.03, -2.0, 1.0], [-0.127, 0.05, 0.0777, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    values, scale = solutions.quantize_rows(weight)
    result = call(answer, weight.clone())
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "return two tensors, separated by a comma: the int8 values and the scales",
    )
    given, scales = result
    expect(isinstance(given, Tensor) and isinstance(scales, Tensor), "both results should be tensors")
    expect(
        given.dtype == torch.int8,
        f"the values have dtype {given.dtype}: end with .to(torch.int8), which is what saves the memory",
    )
    expect(
        scales.numel() != 1,
        "you used one scale for the whole matrix: take the largest magnitude of each row, amax(dim=1)",
    )
    expect(
        not same(scales.flatten(), weight.abs().amax(dim=0) / 127),
        "your scales belong to the columns: a row holds the weights of one output, so reduce over dim=1",
    )
    expect(tuple(scales.shape) == (4,), f"the scales have shape {list(scales.shape)}, expected [4]")
    for most in (128, 255):
        expect(
            not same(scales, weight.abs().amax(dim=1) / most),
            f"you divided by {most}: int8 goes from -128 to 127, so the largest weight should become 127",
        )
    expect(
        not same(scales, weight.amax(dim=1) / 127),
        "the number of largest magnitude in a row may be negative: take abs() first",
    )
    live = slice(0, 3)
    expect_tensor(scales[live], scale[live], "the scales of the rows that are not zero")
    expect(
        not torch.equal(given[live], (weight / scale[:, None])[live].to(torch.int8)),
        "your values are truncated toward zero: round() to the nearest before .to(torch.int8)",
    )
    expect_tensor(given[live], values[live], "the values")
    back = given[3].float() * scales[3]
    expect(
        bool(torch.isfinite(scales[3])) and bool((back == 0).all()),
        "a row of zeros does not come back as zeros: its scale is 0, and 0 / 0 is not a number. Divide by "
        "at least a tiny number: clamp(min=1e-12)",
    )
    right("one byte for each weight, one scale for each row, and the largest weight of every row is 127.")


def capped_scores(answer: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Exercise 6."""
    scores = torch.tensor([[0.1, 3.0, -7.0, 40.0], [2.0, -0.5, 90.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    reference = solutions.capped_scores(scores, mask, 5.0)
    result = call(answer, scores.clone(), mask.clone(), 5.0)
    expect(isinstance(result, Tensor), f"expected a tensor, got a {type(result).__name__}")
    expect(result.shape == scores.shape, f"the result has shape {list(result.shape)}, expected [2, 4]")
    late = 5 * torch.tanh(scores.masked_fill(~mask, -torch.inf) / 5)
    expect(
        not same(result, late),
        "you masked first: tanh turns minus infinity into -cap, a score like any other, and the softmax "
        "gives it a share. Cap first, then mask",
    )
    hidden = result[~mask]
    expect(
        bool((hidden < -1e4).all()),
        f"where the mask is False the score is {hidden.max().item():.3g}: it must be minus infinity, or the "
        "lowest number of the dtype, so that the softmax gives 0",
    )
    seen = result[mask]
    expect(
        not same(seen, torch.tanh(scores / 5)[mask]),
        "your scores stay within +-1: multiply by the cap after the tanh",
    )
    expect(
        not same(seen, (5 * torch.tanh(scores))[mask]),
        "small scores have become five times as large: divide by the cap before the tanh",
    )
    expect(
        not same(seen, scores.clamp(-5, 5)[mask]),
        "clamp cuts off hard and has no slope beyond the cap: use cap * tanh(score / cap)",
    )
    expect_tensor(seen, reference[mask], "the scores that are seen")
    right("small scores pass as they are, large ones stop at the cap, hidden ones stay hidden.")
