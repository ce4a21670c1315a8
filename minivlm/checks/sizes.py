"""Checks for 11_real_checkpoints: a file's header, names, an exchange, two ceilings, int8, soft-capping."""

from __future__ import annotations

import builtins
import itertools
import json
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_tensor, right, same

Shapes = Mapping[str, tuple[int, ...]]
Names = tuple[list[str], list[str], list[str]]
Tensors = Mapping[str, Tensor]
Exchange = Callable[[Tensors, str, str], dict[str, Tensor]]
# Operations per byte; the ceilings cross at 11 on the laptop and at 295 on the H100.
REASONS = {
    "laptop: picture of 224 pixels": "256 patches share each weight: 267 operations per byte, against 11",
    "laptop: prefill of 263 tokens": "263 tokens share each weight: 200 operations per byte, against 11",
    "laptop: one more token": "each weight is read for one multiplication and one addition: 1 "
    "operation per byte",
    "laptop: one more token, int8": "half the bytes make 2 operations per byte, still far below 11",
    "laptop: one more token of 8 rows": "8 rows share each weight: 8 operations per byte, a little below 11",
    "laptop: one more token of 64 rows": "64 rows share each weight: about 60 operations per byte, above 11",
    "H100: one more token of 64 rows": "about 60 operations per byte, and the H100 needs 295 to be busy",
    "H100: prefill of 263 tokens": "200 operations per byte, and the H100 needs 295: its "
    "arithmetic is so fast",
}


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
    def find_exchange(tensors: Tensors, exchange: Exchange, loss_of: Callable[[Tensors], float]) -> set[str]:
        """The two kinds of matrices, such as "q_proj", that have exchanged their names."""
        kinds = sorted({name.split(".")[-2] for name in tensors if name.endswith("_proj.weight")})
        wanted = {name: tensor.shape for name, tensor in tensors.items()}
        losses: dict[tuple[str, str], float] = {}
        for pair in itertools.combinations(kinds, 2):
            trial = exchange(tensors, *pair)
            if {name: tensor.shape for name, tensor in trial.items()} == wanted:
                losses[pair] = loss_of(trial)
        best = min(losses, key=lambda pair: losses[pair])
        return set(best)

    @staticmethod
    def predict_ceilings() -> dict[str, str]:
        """For each step: does it wait for "bytes" or for "operations"?"""
        return {
            "laptop: picture of 224 pixels": "operations",
            "laptop: prefill of 263 tokens": "operations",
            "laptop: one more token": "bytes",
            "laptop: one more token, int8": "bytes",
            "laptop: one more token of 8 rows": "bytes",
            "laptop: one more token of 64 rows": "operations",
            "H100: one more token of 64 rows": "bytes",
            "H100: prefill of 263 tokens": "bytes",
        }

    @staticmethod
    def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [out, in] -> int8 values [out, in] and one scale for each row [out]."""
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale

    @staticmethod
    def capped_scores(scores: Tensor, mask: Tensor, cap: float) -> Tensor:
        """Scores within +-cap where the mask is True, minus infinity elsewhere."""
        return (cap * torch.tanh(scores / cap)).masked_fill(~mask, -torch.inf)


def read_header(answer: Callable[[Path], tuple[dict[str, Any], int]]) -> None:
    """Exercise 1."""
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(2**20, dtype=torch.int8)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        header, start = solutions.read_header(path)
        tracemalloc.start()
        try:
            result = call(answer, path)
            most = tracemalloc.get_traced_memory()[1]
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
        finally:
            tracemalloc.stop()
        plain = Path(folder) / "plain.safetensors"
        save_file(tensors, plain)
        try:
            without = call(answer, plain)
        except NotYet as error:
            raise NotYet(
                f"{error}. This happens with a file that has no __metadata__, which is optional: remove it "
                "only if it is there, as pop(name, None) does"
            ) from error
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
    expect(
        most < 2**20,
        f"your code held {most:,} bytes, as much as the whole file: read 8 bytes, then as many as they say",
    )
    expect(
        isinstance(without, tuple) and without[0] == header,
        "a file without __metadata__ gives another header: only that entry should be removed",
    )
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
    expect(
        all(isinstance(names, list) for names in result),
        "each of the three should be a list: sorted(...) makes one, of a set as well",
    )
    lists = list(result)
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


def exchanged(tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors, where two kinds of matrices have exchanged their names."""
    swap = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return {
        next((name.replace(a, b) for a, b in swap.items() if a in name), name): tensor
        for name, tensor in tensors.items()
    }


def find_exchange(answer: Callable[[Tensors, Exchange, Callable[[Tensors], float]], Any]) -> None:
    """Exercise 3, with a model whose loss counts the tensors that are out of place."""
    attention = {"q": (4, 6), "k": (2, 6), "v": (2, 6), "o": (6, 4)}
    shapes = {f"self_attn.{kind}_proj": shape for kind, shape in attention.items()}
    shapes |= {"mlp.gate_proj": (8, 6), "mlp.up_proj": (8, 6), "mlp.down_proj": (6, 8)}
    names = {f"layers.{n}.{kind}.weight": shape for n in range(2) for kind, shape in shapes.items()}
    sound = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(names.items())}
    sound |= {f"layers.{n}.input_layernorm.weight": torch.ones(6) for n in range(2)}
    calls: list[bool] = []

    def exchange(tensors: Tensors, one: str, other: str) -> dict[str, Tensor]:
        swap = {one: other, other: one}
        return {
            next((name.replace(a, b) for a, b in swap.items() if a in name), name): tensor
            for name, tensor in tensors.items()
        }

    def loss_of(tensors: Tensors) -> float:
        calls.append(True)
        for name, tensor in sound.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise RuntimeError(f"size mismatch for {name}")
        return 0.3 + sum(not torch.equal(tensors[name], tensor) for name, tensor in sound.items())

    for pair in ({"v_proj", "k_proj"}, {"up_proj", "gate_proj"}):
        broken = exchange(sound, *sorted(pair))
        try:
            found = call(answer, dict(broken), exchange, loss_of)
        except NotYet as error:
            expect(
                not isinstance(error.__cause__, RuntimeError | KeyError)
                or not re.search(r"size mismatch|_proj", str(error.__cause__)),
                "you tried an exchange that changes names or shapes, which no model loads: skip those pairs, "
                "the fault is not among them",
            )
            raise
        expect(not isinstance(found, str), "return both names of the pair, as a set")
        expect(
            isinstance(found, builtins.set | frozenset | tuple | list) and len(found) == 2,
            f"your answer is {found!r}: return the two kinds, such as {{'q_proj', 'o_proj'}}",
        )
        found = {str(name) for name in found}
        expect(
            not any("." in name for name in found),
            "these are names of tensors: return the kinds, the part of the name before .weight",
        )
        expect(
            bool(calls),
            "you never asked for a loss: shapes and names cannot tell, two pairs of kinds have "
            "the same shapes",
        )
        expect(
            found == pair,
            f"you say {sorted(found)}, and with these exchanged back the loss is "
            f"{_loss(exchange, loss_of, broken, found)}; with {sorted(pair)} it is 0.3. Exchange "
            "every pair of "
            "the same shape, ask for the loss each time, and take the lowest",
        )
        calls.clear()
    right("names and shapes are silent, and a known answer is not: the lowest loss points at the fault.")


def _loss(exchange: Exchange, loss_of: Callable[[Tensors], float], tensors: Tensors, pair: set[str]) -> str:
    try:
        return f"{loss_of(exchange(tensors, *sorted(pair))):.1f}"
    except RuntimeError:
        return "not even defined, since no model loads them"


def predict_ceilings(answer: Callable[[], Mapping[str, str]]) -> None:
    """Exercise 4."""
    result = call(answer)
    reference = solutions.predict_ceilings()
    expect(isinstance(result, Mapping), f"expected a dictionary, got a {type(result).__name__}")
    missing = [name for name in reference if name not in result]
    expect(not missing, f"there is no prediction for {missing}: keep the names as they are given")
    given = {name: str(result[name]).strip().lower() for name in reference}
    unknown = {name: word for name, word in given.items() if word not in ("bytes", "operations")}
    expect(not unknown, f'a prediction is "bytes" or "operations", and yours are {unknown}')
    wrong = [name for name in reference if given[name] != reference[name]]
    reasons = "\n".join(f"- {name} waits for {reference[name]}: {REASONS[name]}." for name in wrong)
    expect(not wrong, f"{len(reference) - len(wrong)} of {len(reference)} as predicted.\n{reasons}")
    right("what counts is how many tokens share a weight that was read, and how many the machine needs.")


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
    expect_tensor(given[live], values[live], "the int8 tensor")
    back = given[3].float() * scales[3]
    expect(
        bool(torch.isfinite(scales[3])) and bool((back == 0).all()),
        "a row of zeros does not come back as zeros: its scale is 0, and 0 / 0 is not a number. Divide by "
        "at least a tiny number: clamp(min=1e-12)",
    )
    expect(
        bool(scales[3] > 0),
        "a row of zeros keeps the scale 0: whoever divides by it later gets NaN. Clamp the largest magnitude "
        "itself, so that the scale you return is above 0",
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
    expect(
        not same(seen, scores[mask]),
        "nothing is capped: a score of 90 is still 90. Use cap * tanh(score / cap)",
    )
    first = int((seen - reference[mask]).abs().argmax())
    expect(
        same(seen, reference[mask]),
        f"a score of {scores[mask][first]:.1f} with a cap of 5 becomes {seen[first]:.3f}, expected "
        f"{reference[mask][first]:.3f}: cap * tanh(score / cap)",
    )
    right("small scores pass as they are, large ones stop at the cap, hidden ones stay hidden.")
