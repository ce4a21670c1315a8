"""Checks for 15_qwen_vl: the resampler, what its positions do, boxes as tags, broken resamplers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.attention import attend
from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.vision.qwen_vl import QwenVLResampler, QwenVLVisionConfig, stretch

FAULTS = ("none", "keys", "values", "queries", "axes")
NamedBox = tuple[str, float, float, float, float]  # name, x0, y0, x1, y1

# Which question about a resampler has which answer, and why.
QUESTIONS = {
    "nowhere, shuffled": (
        "same",
        "a weighted mean does not know the order of what it is made of, and no patch says where it lies",
    ),
    "on queries only, shuffled": (
        "same",
        "a query that knows its place still cannot tell which patch lies there",
    ),
    "on queries and keys, shuffled": ("different", "another patch now lies where a query looks"),
    "on queries and keys, blank wall": (
        "same",
        "each query looks elsewhere, and finds the same value: the mean of equal values is that value",
    ),
    "on queries, keys and values, blank wall": (
        "different",
        "the values differ by their places, so that each query brings back where it looked",
    ),
}


class solutions:
    """The solutions that the notebook continues with."""

    @staticmethod
    def resample(parts: Any, patches: Tensor) -> Tensor:
        """patches [B, N, D_image] -> [B, n, D], with the parts of Qwen-VL's resampler."""
        ask = parts.attention
        values = parts.ln_kv(parts.kv_proj(patches))
        keys = values + stretch(parts.pos_embed, patches.shape[1])
        queries = (parts.ln_q(parts.query) + parts.pos_embed).expand(len(patches), -1, -1)
        q, k, v = (
            x.unflatten(-1, (-1, 128)).transpose(1, 2)
            for x in (ask.q_proj(queries), ask.k_proj(keys), ask.v_proj(values))
        )
        weights = (q @ k.mT / 128**0.5).softmax(dim=-1)  # [B, H, n, N]
        out = ask.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return parts.proj(parts.ln_post(out))

    @staticmethod
    def expected_changes() -> dict[str, str]:
        """Whether the outputs are the "same" or "different", for each of QUESTIONS."""
        return {question: expected for question, (expected, _) in QUESTIONS.items()}

    @staticmethod
    def read_boxes(text: str, width: float, height: float) -> list[NamedBox]:
        """Every box of an answer with its name, in pixels."""
        found = []
        for name, boxes in re.findall(r"<ref>(.*?)</ref>((?:<box>.*?</box>)+)", text):
            for corners in re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", boxes):
                x0, y0, x1, y1 = (int(digits) / 1000 for digits in corners)
                found.append((name, x0 * width, y0 * height, x1 * width, y1 * height))
        return found

    @staticmethod
    def diagnose(patient: Any, intact: Any, patches: Tensor) -> str:
        """Compared, before a blank wall, with shuffled patches, with equal queries: in this order."""

        def close(a: Tensor, b: Tensor) -> bool:
            return torch.allclose(a, b, atol=1e-3)

        def alike(out: Tensor) -> bool:
            return close(out, out[:, :1].expand_as(out))

        if close(patient(patches), intact(patches)):
            return "none"
        if not alike(patient(patches[:, :1].expand_as(patches))):
            return "values"
        if close(patient(patches.flip(1)), patient(patches)):
            return "keys"
        one_query = copy.deepcopy(patient)
        one_query.query.data[:] = patient.query.data[0]
        return "queries" if alike(one_query(patches)) else "axes"


class PlacedResampler(QwenVLResampler):
    """Qwen-VL's, with its positions in other places.

    Args:
        places: of "queries", "keys" and "values", which get a position; the published one has the first two.
        axes: whether the first half of a position says the row, and not the column.
    """

    def __init__(
        self, config: QwenVLVisionConfig, places: Sequence[str] = ("queries", "keys"), axes: bool = False
    ) -> None:
        super().__init__(config)
        self.places = tuple(places)
        if axes:
            self.pos_embed = torch.cat(self.pos_embed.chunk(2, dim=1)[::-1], dim=1)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, N, D_image] -> [B, n, D]."""
        seen = self.ln_kv(self.kv_proj(patches))
        placed = seen + stretch(self.pos_embed, patches.shape[1])
        queries = self.ln_q(self.query) + ("queries" in self.places) * self.pos_embed
        keys, values = (placed if kind in self.places else seen for kind in ("keys", "values"))
        return self.proj(self.ln_post(self._look(queries.expand(len(patches), -1, -1), keys, values)))


def a_resampler(places: Sequence[str] = ("queries", "keys"), axes: bool = False) -> PlacedResampler:
    """16 queries, two heads, patches of width 96. Its weights are random, and always the same."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(15)
        config = QwenVLVisionConfig(96, num_attention_heads=3, num_queries=16, output_dim=256)
        resampler = PlacedResampler(config, places, axes)
        for name, weight in resampler.named_parameters():
            is_factor = name.startswith("ln_") and name.endswith("weight")
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.dim() == 1 else weight.shape[1] ** -0.5))
            weight.add_(1.0 if is_factor else 0.0)
        for proj in (resampler.attention.q_proj, resampler.attention.k_proj):
            proj.weight.mul_(2.0)  # so that each query looks at few patches
    return resampler.requires_grad_(False)


_PLACES = {
    "none": ("queries", "keys"),
    "keys": ("queries",),
    "values": ("queries", "keys", "values"),
    "queries": ("keys",),
    "axes": ("queries", "keys"),
}


def broken_resamplers() -> dict[str, PlacedResampler]:
    """Five resamplers with the weights of `a_resampler`. What is wrong with each is not told."""
    order = ("values", "axes", "keys", "none", "queries")
    return {letter: _broken(fault) for letter, fault in zip("ABCDE", order, strict=True)}


def _broken(fault: str) -> PlacedResampler:
    return a_resampler(_PLACES[fault], axes=fault == "axes")


def some_patches(pictures: int = 2, patches: int = 64) -> Tensor:
    """Random patches, [B, N, 96], always the same."""
    return torch.randn(pictures, patches, 96, generator=torch.Generator().manual_seed(7))


def resample(answer: Callable[..., Any]) -> None:
    """Two pictures, two heads; the parts cannot be called as a whole."""
    whole, patches = a_resampler(), some_patches()
    names = ("query", "pos_embed", "kv_proj", "ln_q", "ln_kv", "ln_post", "attention", "proj")
    parts = SimpleNamespace(**{name: getattr(whole, name) for name in names})
    with torch.no_grad():
        result = call(answer, parts, patches.clone())
        good = whole(patches)
        expect(
            not (isinstance(result, Tensor) and tuple(result.shape) == (2, 16, 96)),
            "the result is as wide as the patches: kv_proj brings them to the width of the queries",
        )
        for hint, wrong in _resampled_wrongly(whole, patches):
            expect(not same(result, wrong, 1e-4), hint)
    try:
        expect_tensor(result, good, tolerance=1e-4)
    except NotYet as hint:
        advice = "Compare keys, values and queries with the list above, one after the other"
        raise NotYet(f"{hint}. {advice}" if "off by" in str(hint) else str(hint)) from None
    right("queries and keys know their places, values do not, and the result has a norm and a last matrix.")


def _resampled_wrongly(whole: PlacedResampler, patches: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Known mistakes and what comes of each."""
    ask = whole.attention
    values = whole.ln_kv(whole.kv_proj(patches))
    places = stretch(whole.pos_embed, patches.shape[1])
    keys = values + places
    queries = (whole.ln_q(whole.query) + whole.pos_embed).expand(len(patches), -1, -1)

    def look(q: Tensor, k: Tensor, v: Tensor, width: int = 128, scale: float = 128**-0.5) -> Tensor:
        projected = (ask.q_proj(q), ask.k_proj(k), ask.v_proj(v))
        q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in projected)
        return attend(q, k, v, None, scale).transpose(1, 2).flatten(2)

    def end(x: Tensor) -> Tensor:
        return whole.proj(whole.ln_post(x))

    seen = ask.o_proj(look(queries, keys, values))
    yield (
        "the keys have no positions: without them no query can look at a place",
        end(ask.o_proj(look(queries, values, values))),
    )
    yield (
        "the values have positions as well: add them to the keys alone",
        end(ask.o_proj(look(queries, keys, keys))),
    )
    yield (
        "the queries have no positions: add pos_embed to them, behind ln_q",
        end(ask.o_proj(look(whole.ln_q(whole.query).expand(len(patches), -1, -1), keys, values))),
    )
    yield (
        "neither queries nor keys have positions",
        end(ask.o_proj(look(whole.ln_q(whole.query).expand(len(patches), -1, -1), values, values))),
    )
    early = whole.ln_q(whole.query + whole.pos_embed).expand(len(patches), -1, -1)
    yield (
        "the position of a query goes through ln_q: add it behind the norm",
        end(ask.o_proj(look(early, keys, values))),
    )
    yield (
        "the position of a key goes through ln_kv: add it behind the norm",
        end(ask.o_proj(look(queries, whole.ln_kv(whole.kv_proj(patches) + places), values))),
    )
    yield (
        "ln_q is missing: the learned queries are normalized before they get positions",
        end(ask.o_proj(look((whole.query + whole.pos_embed).expand(len(patches), -1, -1), keys, values))),
    )
    plain = whole.kv_proj(patches)
    yield (
        "ln_kv is missing: what kv_proj gives is normalized",
        end(ask.o_proj(look(queries, plain + places, plain))),
    )
    yield (
        "there is one head: cut the width into heads of 128",
        end(ask.o_proj(look(queries, keys, values, 256, 256**-0.5))),
    )
    yield (
        "the scores are divided by the root of the whole width: take that of one head, 128",
        end(ask.o_proj(look(queries, keys, values, scale=256**-0.5))),
    )
    yield (
        "the scores are not divided by the root of a head's width",
        end(ask.o_proj(look(queries, keys, values, scale=1.0))),
    )
    yield (
        "the scores are divided by a head's width: divide by its root",
        end(ask.o_proj(look(queries, keys, values, scale=1 / 128))),
    )
    yield "attention.o_proj is missing: it mixes what the heads have found", end(look(queries, keys, values))
    yield "ln_post is missing", whole.proj(seen)
    yield "the last matrix, proj, is missing", whole.ln_post(seen)
    yield "proj comes after ln_post, not before", whole.ln_post(whole.proj(seen))
    yield "the queries are added to what they found: here nothing is added", end(seen + queries)
    yield "both norm and proj at the end are missing", seen
    projected = (ask.q_proj(queries), ask.k_proj(keys), ask.v_proj(values))
    q, k, v = (x.unflatten(-1, (-1, 128)).transpose(1, 2) for x in projected)
    yield (
        "keys and values are exchanged: `attend` takes queries, keys, values",
        end(ask.o_proj(attend(q, v, k, None, 128**-0.5).transpose(1, 2).flatten(2))),
    )
    spread = (q @ k.mT * 128**-0.5).softmax(dim=-2) @ v
    yield (
        "the softmax runs over the queries: the weights of one query sum to 1 over the patches",
        end(ask.o_proj(spread.transpose(1, 2).flatten(2))),
    )
    torn = attend(q, k, v, None, 128**-0.5).reshape(queries.shape)
    yield (
        "the heads are not put back side by side: transpose them behind the queries, then flatten",
        end(ask.o_proj(torn)),
    )
    side = math.isqrt(patches.shape[1])
    grid = whole.pos_embed.unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    for mode in ("nearest", "bilinear"):
        placed = F.interpolate(grid, size=(side, side), mode=mode)[0].permute(1, 2, 0).flatten(0, 1)
        yield (
            f"the positions of the patches are stretched in mode {mode!r}: `stretch` is bicubic",
            end(ask.o_proj(look(queries, values + placed, values))),
        )


def expected_changes(answer: Callable[[], Any], measured: Callable[[str], Any] | None = None) -> None:
    """Every prediction against what a resampler does.

    Args:
        measured: the notebook's own measurement, from a question to "same" or "different".
    """
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    missing = [question for question in QUESTIONS if question not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    wrong = []
    for question, (expected, reason) in QUESTIONS.items():
        found = expected if measured is None else measured(question)
        expect(
            result[question] in ("same", "different"),
            f"{question}: you say {result[question]!r}: expected 'same' or 'different'",
        )
        if result[question] != found:
            wrong.append(f"{question}: you say {result[question]!r}, and it is {found!r}, since {reason}")
    expect(not wrong, "\n".join(wrong))
    right("a position on the key says where to look, and one on the value says where one has looked.")


_TEXT = (
    "The <ref>red star</ref><box>(100,250),(400,900)</box> is beside two circles: "
    "<ref>blue circle</ref><box>(0,10),(50,60)</box><box>(700,5),(999,95)</box>."
)


def read_boxes(answer: Callable[[str, float, float], Any]) -> None:
    """Two names, one of which has two boxes, in an oblong picture."""
    width, height = 200.0, 100.0
    result = call(answer, _TEXT, width, height)
    good = solutions.read_boxes(_TEXT, width, height)
    expect(isinstance(result, list | tuple), f"return a list of boxes, not a {type(result).__name__}")
    boxes = list(result)
    for box in boxes:
        expect(
            isinstance(box, list | tuple) and len(box) == 5 and isinstance(box[0], str),
            f"{box!r} is not (name, x0, y0, x1, y1)",
        )
        expect(
            all(isinstance(edge, int | float) for edge in box[1:]),
            f"{box!r} holds no numbers behind the name: turn the digits into numbers",
        )
    expect(
        len(boxes) != 2,
        "there are three boxes, and you found two: a name may have several boxes behind it",
    )
    expect(len(boxes) == 3, f"there are three boxes, and you found {len(boxes)}")
    names = [box[0] for box in boxes]
    expect(not any("<" in name for name in names), f"the names are {names}: leave out the tags")
    expect(
        bool(names[2]),
        "the last box has no name: it has the one of the box before, as no other comes between",
    )
    expect(names == [box[0] for box in good], f"the names are {names}, expected {[box[0] for box in good]}")
    _compare_edges(boxes, good, width, height)
    right("a name may have several boxes, x comes before y, and 1000 is the far edge.")


def _compare_edges(boxes: Sequence[Any], good: Sequence[NamedBox], width: float, height: float) -> None:
    edges, expected = ([tuple(float(n) for n in box[1:]) for box in found] for found in (boxes, good))

    def are(factor: float = 1.0, across: float = width, down: float = height, order: str = "0123") -> bool:
        wrong = []
        for box in expected:
            x0, y0, x1, y1 = box[0] / width, box[1] / height, box[2] / width, box[3] / height
            scaled = (x0 * across * factor, y0 * down * factor, x1 * across * factor, y1 * down * factor)
            wrong.append([scaled[int(index)] for index in order])
        return torch.allclose(torch.tensor(edges), torch.tensor(wrong), atol=1e-3, rtol=1e-6)

    expect(not are(1000 / 999), "you divide by 999: a place n is the share n / 1000 of the side")
    expect(
        not are(1000),
        "these are another thousand times too large: a place is a thousandth of the side",
    )
    expect(
        not are(1000 / 1024) and not are(1000 / 1023),
        "you divide by 1024 or 1023, PaliGemma's bins: here a place is a thousandth of the side",
    )
    expect(
        not are(across=1000, down=1000), "these are still thousandths: multiply by the sides of the picture"
    )
    expect(not are(across=1, down=1), "these are shares of the picture: multiply by its sides")
    expect(not are(across=height, down=width), "width and height are exchanged: x is a share of the width")
    expect(
        not are(order="1032"),
        "y stands before x: Qwen-VL writes x first, and (name, x0, y0, x1, y1) wants it first as well",
    )
    expect(
        not (are(across=height, down=width, order="1032") or are(order="1032", across=1000, down=1000)),
        "you read y before x, as PaliGemma writes them: Qwen-VL writes x first",
    )
    expect(not are(order="0213"), "the order is x0, y0, x1, y1, not x0, x1, y0, y1")
    sizes = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in expected]
    expect(
        not torch.allclose(torch.tensor(edges), torch.tensor(sizes), atol=1e-3),
        "the last two numbers are width and height of the box: return its far edges",
    )
    differences = (torch.tensor(edges) - torch.tensor(expected)).abs().amax(dim=1)
    first = int((differences > 1e-3).int().argmax())
    expect(
        not 1e-3 < float(differences.max()) < 1,
        f"box {first} is {edges[first]}, expected {expected[first]}: do not round the edges, a place may lie "
        "between two pixels",
    )
    expect(
        bool((differences <= 1e-3).all()),
        f"box {first} is {edges[first]}, expected {expected[first]}: the first number of a corner counts "
        f"thousandths of the width, {width:g}, the second those of the height, {height:g}",
    )


_SIGNS = {
    "none": "it gives what the intact one gives: compare the two before anything else",
    "values": "before a blank wall, where all patches are the same, its queries bring back different things",
    "keys": "it does not notice when the patches change their places",
    "queries": "once all its learned queries are the same vector, all its outputs are the same",
    "axes": "it passes the other tests, and still differs from the intact one",
}


def diagnose(answer: Callable[..., Any]) -> None:
    """Each fault once, in another order than in the notebook, and the intact one."""
    patches = some_patches()
    intact = a_resampler()
    for fault in ("none", "keys", "values", "queries", "axes"):
        patient = _broken(fault)
        with torch.no_grad(), _unchanged(patient, intact):
            found = call(answer, patient, intact, patches.clone())
        expect(isinstance(found, str), f"return one of {', '.join(FAULTS)}, not a {type(found).__name__}")
        expect(found in FAULTS, f"{found!r} is no fault of the list: expected one of {', '.join(FAULTS)}")
        if found != fault:
            sick = "The intact resampler" if fault == "none" else f"A patient with {fault!r}"
            raise NotYet(f"{sick} is taken for {found!r}. {_SIGNS[fault].capitalize()}")
    right("each fault has a test that only it fails: a blank wall, a shuffle, equal queries.")


@contextmanager
def _unchanged(*resamplers: nn.Module) -> Iterator[None]:
    """Raise NotYet if what runs inside changes their weights."""
    before = [copy.deepcopy(resampler.state_dict()) for resampler in resamplers]
    yield
    for resampler, kept in zip(resamplers, before, strict=True):
        now = resampler.state_dict()
        expect(
            all(torch.equal(now[name], kept[name]) for name in kept),
            "your test changes the weights of what it was given: work on a `copy.deepcopy`",
        )
