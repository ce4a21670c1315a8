"""The checks of 15_qwen_vl accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor

from minivlm import checks
from minivlm.checks import NotYet
from minivlm.vision.qwen_vl import stretch

NOTEBOOK = ROOT / "notebooks" / "15_qwen_vl.ipynb"
EXERCISES = ("resample", "expected_changes", "read_boxes", "diagnose")

good = checks.qwen_vl.solutions


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def resampled(
    *,
    on_queries: str = "after",
    on_keys: str = "after",
    on_values: bool = False,
    norms: tuple[bool, bool, bool] = (True, True, True),
    width: int = 128,
    scale: float = 128**-0.5,
    mixed: bool = True,
    last: bool = True,
    swapped: bool = False,
    residual: bool = False,
    over_queries: bool = False,
    stretched: bool = True,
    turned: bool = True,
    exchanged: bool = False,
) -> Callable[[Any, Tensor], Tensor]:
    """`resample` with one of its parts replaced."""

    def answer(parts: Any, patches: Tensor) -> Tensor:
        ask, (norm_q, norm_kv, norm_post) = parts.attention, norms
        places = stretch(parts.pos_embed, patches.shape[1]) if stretched else parts.pos_embed
        seen = parts.kv_proj(patches)
        values = parts.ln_kv(seen) if norm_kv else seen
        keys = values + places if on_keys == "after" else values
        keys = parts.ln_kv(seen + places) if on_keys == "before" else keys
        values = keys if on_values else values
        queries = parts.query + parts.pos_embed if on_queries == "before" else parts.query
        queries = parts.ln_q(queries) if norm_q else queries
        queries = queries + parts.pos_embed if on_queries == "after" else queries
        queries = queries.expand(len(patches), -1, -1)
        q, k, v = (
            x.unflatten(-1, (-1, width)).transpose(1, 2)
            for x in (ask.q_proj(queries), ask.k_proj(keys), ask.v_proj(values))
        )
        k, v = (v, k) if exchanged else (k, v)
        out = (q @ k.mT * scale).softmax(dim=-2 if over_queries else -1) @ v
        out = out.transpose(1, 2).flatten(2) if turned else out.reshape(*queries.shape)
        out = ask.o_proj(out) if mixed else out
        out = out + queries if residual else out
        if swapped:
            return parts.ln_post(parts.proj(out))
        out = parts.ln_post(out) if norm_post else out
        return parts.proj(out) if last else out

    return answer


def predicted(**instead: str) -> Callable[[], dict[str, str]]:
    """The right predictions, with those replaced whose first letters are given: q_s is "on queries only"."""
    short = dict(zip(("n_s", "q_s", "qk_s", "qk_w", "qkv_w"), checks.qwen_vl.QUESTIONS, strict=True))
    return lambda: good.expected_changes() | {short[name]: value for name, value in instead.items()}


def read(
    per: float = 1000.0,
    order: str = "0123",
    pixels: bool = True,
    swapped: bool = False,
    several: bool = True,
    keep_tags: bool = False,
    all_named: bool = True,
    sizes: bool = False,
    as_text: bool = False,
) -> Callable[[str, float, float], list[Any]]:
    """`read_boxes` with one mistake."""

    def answer(text: str, width: float, height: float) -> list[Any]:
        found: list[Any] = []
        across, down = (height, width) if swapped else (width, height)
        across, down = (across, down) if pixels else (1.0, 1.0)
        for tag, name, boxes in re.findall(r"(<ref>(.*?)</ref>)((?:<box>.*?</box>)+)", text):
            corners = re.findall(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", boxes)
            for number, digits in enumerate(corners if several else corners[:1]):
                numbers = [int(digits[int(index)]) / per for index in order]
                x0, y0, x1, y1 = (n * side for n, side in zip(numbers, (across, down) * 2, strict=True))
                called = tag if keep_tags else name
                called = called if all_named or number == 0 else ""
                edges: tuple[Any, ...] = (x0, y0, x1 - x0, y1 - y0) if sizes else (x0, y0, x1, y1)
                found.append((called, *(map(str, edges) if as_text else edges)))
        return found

    return answer


def returned(order: str) -> Callable[[str, float, float], list[Any]]:
    """The edges in another order at the end."""

    def answer(text: str, width: float, height: float) -> list[Any]:
        boxes = good.read_boxes(text, width, height)
        return [(box[0], *(box[1 + int(index)] for index in order)) for box in boxes]

    return answer


def from_other_side(text: str, width: float, height: float) -> list[Any]:
    return [(n, a, height - b, c, height - d) for n, a, b, c, d in good.read_boxes(text, width, height)]


def rounded(text: str, width: float, height: float) -> list[Any]:
    return [(name, *map(round, edges)) for name, *edges in good.read_boxes(text, width, height)]


def mistaken(fault: str, found: str) -> Callable[..., str]:
    """The right diagnosis with one fault taken for another."""

    def answer(*given: Any) -> str:
        told = good.diagnose(*given)
        return found if told == fault else told

    return answer


def with_damage(patient: Any, intact: Any, patches: Tensor) -> str:
    told = good.diagnose(patient, intact, patches)
    patient.query.data[:] = patient.query.data[0]
    return told


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("resample", lambda parts, patches: None, "returns nothing"),
    ("resample", lambda parts, patches: patches[:, :16], "as wide as the patches"),
    ("resample", resampled(on_keys="no"), "keys have no positions"),
    ("resample", resampled(on_values=True), "values have positions as well"),
    ("resample", resampled(on_queries="no"), "queries have no positions"),
    ("resample", resampled(on_queries="no", on_keys="no"), "neither queries nor keys"),
    ("resample", resampled(on_queries="before"), "goes through ln_q"),
    ("resample", resampled(on_keys="before"), "goes through ln_kv"),
    ("resample", resampled(norms=(False, True, True)), "ln_q is missing"),
    ("resample", resampled(norms=(True, False, True)), "ln_kv is missing"),
    ("resample", resampled(norms=(True, True, False)), "ln_post is missing"),
    ("resample", resampled(width=256, scale=256**-0.5), "there is one head"),
    ("resample", resampled(scale=256**-0.5), "root of the whole width"),
    ("resample", resampled(scale=1.0), "not divided by the root"),
    ("resample", resampled(scale=1 / 128), "divide by its root"),
    ("resample", resampled(exchanged=True), "keys and values are exchanged"),
    ("resample", resampled(mixed=False), "o_proj is missing"),
    ("resample", resampled(last=False), "proj, is missing"),
    ("resample", resampled(swapped=True), "proj comes after ln_post"),
    ("resample", resampled(residual=True), "nothing is added"),
    ("resample", resampled(stretched=False), "your code stops with"),
    ("resample", resampled(over_queries=True), "the softmax runs over the queries"),
    ("resample", resampled(turned=False), "heads are not put back"),
    ("expected_changes", lambda: ["same"], "return the dict"),
    ("expected_changes", lambda: {"nowhere, shuffled": "same"}, "no prediction yet for: on queries only"),
    ("expected_changes", predicted(n_s="different"), "does not know the order"),
    ("expected_changes", predicted(q_s="different"), "cannot tell which patch lies there"),
    ("expected_changes", predicted(qk_s="same"), "another patch now lies"),
    ("expected_changes", predicted(qk_w="different"), "mean of equal values"),
    ("expected_changes", predicted(qkv_w="same"), "brings back where it looked"),
    ("expected_changes", predicted(n_s="different", q_s="different"), "nowhere, shuffled"),
    ("expected_changes", predicted(qk_w="different", qkv_w="same"), "blank wall"),
    ("expected_changes", predicted(n_s="yes"), "expected 'same' or 'different'"),
    ("read_boxes", lambda *args: {}, "return a list"),
    ("read_boxes", lambda *args: [box[1:] for box in good.read_boxes(*args)], "is not .name, x0"),
    ("read_boxes", read(several=False), "a name may have several boxes"),
    ("read_boxes", lambda *args: [], "you found 0"),
    ("read_boxes", read(keep_tags=True), "leave out the tags"),
    ("read_boxes", read(all_named=False), "the last box has no name"),
    ("read_boxes", read(as_text=True), "turn the digits into numbers"),
    ("read_boxes", read(per=999.0), "divide by 999"),
    ("read_boxes", read(per=1024.0), "PaliGemma's bins"),
    ("read_boxes", read(per=1.0, pixels=False), "not finite|thousandths"),
    ("read_boxes", read(pixels=False), "these are shares"),
    ("read_boxes", read(per=1.0), "another thousand times"),
    ("read_boxes", read(swapped=True), "width and height are exchanged"),
    ("read_boxes", read(order="1032"), "as PaliGemma writes them"),
    ("read_boxes", returned("1032"), "y stands before x"),
    ("read_boxes", returned("0213"), "the order is x0, y0, x1, y1"),
    ("read_boxes", read(sizes=True), "width and height of the box"),
    ("read_boxes", from_other_side, "thousandths of the width"),
    ("read_boxes", rounded, r"box 2 is \(140\.0, 0\.0, 200\.0, 10\.0\).*do not round"),
    ("diagnose", lambda *args: 3, "return one of"),
    ("diagnose", lambda *args: "value", "is no fault of the list"),
    ("diagnose", lambda *args: "axes", "taken for 'axes'"),
    ("diagnose", mistaken("none", "axes"), "compare the two"),
    ("diagnose", mistaken("keys", "queries"), "when the patches change their places"),
    ("diagnose", mistaken("queries", "keys"), "same vector"),
    ("diagnose", mistaken("queries", "axes"), "same vector"),
    ("diagnose", mistaken("axes", "queries"), "still differs from the intact"),
    ("diagnose", mistaken("values", "axes"), "blank wall"),
    ("diagnose", mistaken("keys", "none"), "change their places"),
    ("diagnose", with_damage, "work on a `copy.deepcopy`"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_says_that_an_exercise_is_blank(name: str) -> None:
    with pytest.raises(NotYet, match=r"still blank: replace the line that raises with your own$"):
        getattr(checks.qwen_vl, name)(blank)


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG)
def test_names_the_likely_mistake(name: str, answer: Callable[..., Any], hint: str) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(checks.qwen_vl, name)(answer)


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_are_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(checks.qwen_vl, name)(getattr(good, name))
    assert capsys.readouterr().out.startswith("Right: ")


def test_other_ways_to_be_right() -> None:
    checks.qwen_vl.resample(resampled())
    checks.qwen_vl.read_boxes(lambda *args: tuple(list(box) for box in good.read_boxes(*args)))
    checks.qwen_vl.expected_changes(good.expected_changes, good.expected_changes().__getitem__)


@torch.no_grad()
def test_the_patients_have_one_fault_each() -> None:
    patches, intact = checks.qwen_vl.some_patches(), checks.qwen_vl.a_resampler()
    told = {
        letter: good.diagnose(patient, intact, patches)
        for letter, patient in checks.qwen_vl.broken_resamplers().items()
    }
    assert sorted(told.values()) == sorted(checks.qwen_vl.FAULTS)


def test_every_exercise_is_in_the_notebook() -> None:
    exercises = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(exercises) == len(EXERCISES)
