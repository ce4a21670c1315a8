"""The checks of 12_fine_tuning accept the solutions and say what is wrong with likely mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from notebooks_and_sources import ROOT, read_cells
from torch import Tensor, nn

from minivlm import checks, load
from minivlm.adapters import LoraConfig, new_adapter
from minivlm.checks import NotYet
from minivlm.checks.fine_tuning import FAULTS, VERDICTS, Row, corner_rows, exact, tune
from minivlm.data.fingerprints import ALIKE, perceptual_hash

NOTEBOOK = ROOT / "notebooks" / "12_fine_tuning.ipynb"
good = checks.fine_tuning.solutions


def blank(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("your turn")


def hint_of(check: Callable[..., None], *answer: Any) -> str:
    with pytest.raises(NotYet) as raised:
        check(*answer)
    return str(raised.value)


# ---- a layer with a change ---------------------------------------------------------------------------------


def layer(
    *,
    scale: Callable[[int, float], float] = lambda r, alpha: alpha / r,
    merged_scale: Callable[[int, float], float] | None = None,
    start: tuple[float, float] = (1.0, 0.0),
    frozen: bool = True,
    turned: bool = False,
    alone: bool = False,
    bias: bool = False,
    idle: bool = False,
    in_place: bool = False,
    dense: bool = False,
    named: str = "lora_A",
) -> type[nn.Module]:
    """`LoraLinear` with one mistake."""

    class Layer(nn.Module):
        def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
            super().__init__()
            self.base = base.requires_grad_(not frozen)
            self.scale = scale(r, alpha)
            self.merged_scale = (merged_scale or scale)(r, alpha)
            rows = (base.in_features, r) if turned else (r, base.in_features)
            self.register_parameter(named, nn.Parameter(start[0] * torch.randn(rows)))
            self.lora_B = nn.Parameter(start[1] * torch.randn(base.out_features, r))

        def forward(self, x: Tensor) -> Tensor:
            change = self.scale * (x @ self.lora_A.T @ self.lora_B.T)
            out = change if alone and bool(self.lora_B.any()) else self.base(x) + change
            out = self.base(x) if idle else out
            out = nn.functional.linear(x, self.merged(), self.base.bias) if dense else out
            return out + self.base.bias if bias and bool(self.lora_B.any()) else out

        def merged(self) -> Tensor:
            change = self.merged_scale * self.lora_B @ self.lora_A
            return self.base.weight.add_(change) if in_place else self.base.weight + change

    return Layer


LAYERS: dict[str, tuple[Any, str]] = {
    "blank": (blank, "still blank"),
    "no scale": (layer(scale=lambda r, alpha: 1.0), "scale is missing"),
    "alpha": (layer(scale=lambda r, alpha: alpha), "multiply by alpha"),
    "upside down": (layer(scale=lambda r, alpha: r / alpha), "upside down"),
    "root": (layer(scale=lambda r, alpha: alpha / r**0.5), "root of r"),
    "no scale in merged": (layer(merged_scale=lambda r, alpha: 1.0), "in merged, the scale is missing"),
    "both zero": (layer(start=(0.0, 0.0)), "both zero"),
    "both random": (layer(start=(1.0, 1.0)), "both random"),
    "the other way round": (layer(start=(0.0, 1.0)), "other way round"),
    "trained base": (layer(frozen=False), "can be trained"),
    "turned": (layer(turned=True), r"lora_A is \[12, 4\]"),
    "other name": (layer(named="A"), "no parameter lora_A"),
    "the change alone": (layer(alone=True), "the change alone"),
    "bias twice": (layer(bias=True), "bias is added twice"),
    "nothing": (layer(idle=True), "change nothing in forward"),
    "a whole matrix": (layer(dense=True), "builds a matrix of out by in"),
    "in place": (layer(in_place=True), "changes the weight of the base"),
}


@pytest.mark.parametrize(("answer", "hint"), LAYERS.values(), ids=LAYERS)
def test_mistakes_in_a_layer_are_named(answer: Any, hint: str) -> None:
    torch.manual_seed(0)
    assert re.search(hint, hint_of(checks.fine_tuning.low_rank_layer, answer))


# ---- predictions, patients, curves -------------------------------------------------------------------------


FLIPPED = [
    pytest.param(flipped)
    for count in (1, 2)
    for flipped in combinations(checks.fine_tuning.STATEMENTS, count)
]


@pytest.mark.parametrize("answer", FLIPPED)
def test_a_wrong_prediction_is_explained(answer: tuple[str, ...]) -> None:
    right = good.expected_start()
    wrong = right | {one: not right[one] for one in answer}
    hint = hint_of(checks.fine_tuning.expected_start, lambda: wrong)
    assert len(hint.splitlines()) == len(answer)
    assert all(f"{one}: you say {wrong[one]}" in hint for one in answer)


def test_a_missing_prediction_is_named() -> None:
    assert "no prediction yet" in hint_of(checks.fine_tuning.expected_start, dict)
    asked = {**good.expected_start(), "the gradient of A is zero": "yes"}
    assert "expected True or False" in hint_of(checks.fine_tuning.expected_start, lambda: asked)


TAKEN_FOR = [(missed, answer) for missed in FAULTS for answer in FAULTS if missed != answer]


@pytest.mark.parametrize(("missed", "answer"), TAKEN_FOR)
def test_a_missed_fault_is_named(missed: str, answer: str) -> None:
    def diagnose(*given: Any) -> str:
        found: str = good.diagnose(*given)
        return answer if found == missed else found

    hint = hint_of(checks.fine_tuning.diagnose, diagnose)
    assert "taken for" in hint
    assert (missed in hint) or missed == "none"


def test_a_comparison_without_rounding_is_told_so() -> None:
    def answer(layer: Any, weight: Tensor, alpha: float, x: Tensor) -> str:
        change = layer.changes["default"]
        expected = alpha / 16 * (x @ change.lora_A.T @ change.lora_B.T)
        return "none" if torch.equal(layer(x) - x @ weight.T, expected) else "scale"

    hint = hint_of(checks.fine_tuning.diagnose, answer)
    assert "s B A x" in hint
    assert "rounding" in hint


def test_a_layer_may_use_the_weight_of_its_base() -> None:
    class Layer(layer()):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x @ self.base.weight.T + self.base.bias
            return out + self.scale * (self.lora_B @ (self.lora_A @ x.mT)).mT

    checks.fine_tuning.low_rank_layer(Layer)


def test_patients_are_left_alone() -> None:
    def answer(layer: Any, weight: Tensor, alpha: float, x: Tensor) -> str:
        found = good.diagnose(layer, weight, alpha, x)
        layer.base.weight.zero_()
        return found

    assert "changes the weights" in hint_of(checks.fine_tuning.diagnose, answer)
    assert "no fault of the list" in hint_of(checks.fine_tuning.diagnose, lambda *given: "sick")


def test_the_patients_of_the_notebook_have_all_faults() -> None:
    x = torch.randn(4, 12)
    with torch.no_grad():
        found = [good.diagnose(*patient, x) for patient in checks.fine_tuning.patients().values()]
    assert sorted(found) == sorted(FAULTS)


@pytest.mark.parametrize(
    ("letter", "answer"),
    [(letter, wrong) for letter in "ABCD" for wrong in VERDICTS if wrong != good.name_curves({})[letter]],
)
def test_a_wrong_verdict_gets_a_hint(letter: str, answer: str) -> None:
    right = good.name_curves({})
    assert f"curve {letter} is not" in hint_of(
        checks.fine_tuning.name_curves, lambda curves: right | {letter: answer}
    )
    assert "no verdict of the list" in hint_of(
        checks.fine_tuning.name_curves, lambda curves: right | {letter: "fine"}
    )


# ---- splitting ---------------------------------------------------------------------------------------------


def split(
    *,
    alike: Callable[[int, int], bool] = lambda a, b: (a ^ b).bit_count() <= ALIKE,
    chains: bool = True,
    drop: bool = False,
    share: float | None = None,
    fixed: bool = False,
    unseeded: bool = False,
    twice: bool = False,
) -> Callable[[Sequence[int], float, int], tuple[list[int], list[int]]]:
    """`split_by_look` with one mistake."""

    def answer(looks: Sequence[int], wanted: float, seed: int) -> tuple[list[int], list[int]]:
        group = list(range(len(looks)))
        for i in range(len(looks)):
            for j in range(i):
                if alike(looks[i], looks[j]) and (chains or group[i] == i):
                    group = [group[j] if one == group[i] else one for one in group] if chains else group
                    group[i] = group[j] if chains else j
        chosen = np.random.default_rng(None if unseeded else 0 if fixed else seed).permutation(
            sorted(set(group))
        )
        test: list[int] = []
        for one in chosen:
            if len(test) < (wanted if share is None else share) * len(looks):
                test += [i for i, mine in enumerate(group) if mine == one]
        train = [i for i in range(len(looks)) if i not in test]
        train = [i for i in train if group[i] == i] if drop else train
        return (train + train[:1] if twice else train), test

    return answer


SPLITS: dict[str, tuple[Any, str]] = {
    "blank": (blank, "still blank"),
    "by row": (split(alike=lambda a, b: False), "equal looks"),
    "equal looks": (split(alike=lambda a, b: a == b), "look alike"),
    "fewer bits": (split(alike=lambda a, b: (a ^ b).bit_count() < ALIKE), "look alike"),
    "as numbers": (split(alike=lambda a, b: abs(a - b) <= ALIKE), "look alike"),
    "no chains": (split(chains=False), "look alike"),
    "copies dropped": (split(drop=True), "neither part"),
    "half": (split(share=0.5), "a quarter was asked for"),
    "a few": (split(share=0.05), "a quarter was asked for"),
    "nothing": (lambda looks, share, seed: (list(range(len(looks))), []), "empty"),
    "everything twice": (lambda looks, share, seed: (list(range(len(looks))),) * 2, "both parts"),
    "listed twice": (split(twice=True), "listed twice"),
    "no seed": (split(fixed=True), "another seed gives the same"),
    "global state": (split(unseeded=True), "the same seed gives another"),
    "one list": (lambda looks, share, seed: [1, 2], "two lists"),
}


def test_the_two_parts_of_a_split_may_be_in_a_list() -> None:
    checks.fine_tuning.split_by_look(lambda *given: list(good.split_by_look(*given)))


@pytest.mark.parametrize(("answer", "hint"), SPLITS.values(), ids=SPLITS)
def test_mistakes_in_a_split_are_named(answer: Any, hint: str) -> None:
    assert hint in hint_of(checks.fine_tuning.split_by_look, answer)


# ---- the capstone ------------------------------------------------------------------------------------------

Result = dict[str, Any]


class Tuned:
    """One tuning, from which wrong ones are made without another training."""

    def __init__(self) -> None:
        self.rows = checks.fine_tuning.my_rows()
        self.train, self.test = good.split_by_look([perceptual_hash(r.picture) for r in self.rows], 0.25, 0)
        self.model, self.processor = load()
        self.model.requires_grad_(False)
        self.adapter = new_adapter(
            self.model,
            LoraConfig(r=checks.fine_tuning.RANK, lora_alpha=2 * checks.fine_tuning.RANK),
            generator=torch.Generator().manual_seed(0),
        )
        rows = [self.rows[i] for i in self.train]
        tune(self.model, self.processor, rows, checks.fine_tuning.RATE, steps=checks.fine_tuning.STEPS)
        self.plain, _ = load()

    def answer(self, rows: Sequence[Row], old: Sequence[Row], folder: Path) -> Result:
        """Right in everything."""
        self.adapter.save(folder)
        return {
            "train": self.train,
            "test": self.test,
            "new": exact(self.model, self.processor, [rows[i] for i in self.test]),
            "old before": exact(self.plain, self.processor, old),
            "old after": exact(self.model, self.processor, old),
        }


@cache
def tuned() -> Tuned:
    return Tuned()


def test_a_whole_tuning_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    checks.fine_tuning.fine_tune(tuned().answer)
    assert capsys.readouterr().out.startswith("Right: ")


Tuning = Callable[..., Any]


def but(change: Callable[[Result], Result]) -> Tuning:
    """A right tuning that tells something else."""
    return lambda *given: change(tuned().answer(*given))


def unsaved(rows: Sequence[Row], old: Sequence[Row], folder: Path) -> Result:
    return tuned().answer(rows, old, folder.parent / "elsewhere")


def untrained(rows: Sequence[Row], old: Sequence[Row], folder: Path) -> Result:
    result = tuned().answer(rows, old, folder)
    model, _ = load()
    new_adapter(model, LoraConfig(r=4)).save(folder)
    return result


def by_row(result: Result) -> Result:
    rows = np.random.default_rng(0).permutation(len(tuned().rows)).tolist()
    return result | {"train": rows[20:], "test": rows[:20]}


TUNINGS: dict[str, tuple[Tuning, str]] = {
    "blank": (blank, "still blank"),
    "by row": (but(by_row), "look alike across the parts"),
    "overlap": (but(lambda r: r | {"train": list(range(len(tuned().rows)))}), "in both parts"),
    "small test": (but(lambda r: r | {"test": r["test"][:2]}), "less than a tenth"),
    "small train": (but(lambda r: r | {"train": r["train"][:9]}), "less than half"),
    "unsaved": (unsaved, "no adapter in the folder"),
    "untrained": (untrained, "before"),
    "no number": (but(lambda r: {k: v for k, v in r.items() if k != "old after"}), "no key 'old after'"),
    "other new": (but(lambda r: r | {"new": 0.1}), '"new" is 0.1'),
    "old with the adapter": (but(lambda r: r | {"old before": 0.1}), '"old before" is 0.1'),
    "old after": (but(lambda r: r | {"old after": 0.05}), '"old after" is 0.05'),
    "not a dict": (lambda *given: [1], "return a dict"),
}


@pytest.mark.parametrize(("answer", "hint"), TUNINGS.values(), ids=TUNINGS)
def test_mistakes_in_a_tuning_are_named(answer: Tuning, hint: str) -> None:
    assert hint in hint_of(checks.fine_tuning.fine_tune, answer)


def test_pentagons_are_new_and_the_question_is_exact() -> None:
    rows = corner_rows(16, 0)
    assert [row.suffix for row in rows[:4]] == list(checks.fine_tuning.CORNERS.values())
    assert all(re.fullmatch(r"how many corners has the \w+ object\?", row.prefix) for row in rows)


def test_solutions_of_the_notebook_are_those_of_the_checks() -> None:
    cells = [cell for cell in read_cells(NOTEBOOK) if "exercise" in cell.tags]
    assert len(cells) == 6
