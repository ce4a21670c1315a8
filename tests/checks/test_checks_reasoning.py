"""The checks of 22_reasoning accept right answers and name the likely mistake in wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.checks import NotYet, reasoning
from minivlm.checks.reasoning import FAULTS
from minivlm.evaluation.detection import box_iou
from minivlm.training import grpo

good = reasoning.solutions


def predicted(**instead: Any) -> Callable[[], Any]:
    names = {name.replace("_", " ").replace("ten two", "ten, two"): n for name, n in instead.items()}
    return lambda: good.groups_that_teach() | names


def diagnosed(instead: dict[str, str]) -> Callable[..., str]:
    """The right diagnosis with some answers replaced."""

    def answer(loss: Any, sound: Any) -> str:
        found = good.diagnose(loss, sound)
        return instead.get(found, found)

    return answer


def scaled(table: Tensor, dim: int = -1) -> Tensor:
    return table / table.sum(dim=dim, keepdim=True)


def loss(
    advantage: Callable[[Tensor], Tensor] = grpo.advantages,
    of: Callable[[Tensor, Tensor], Tensor] = lambda new, old: (new - old).exp(),
    gain: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda r, c, a: torch.minimum(r * a, c * a),
    mean: Callable[[Tensor, Tensor], Tensor] = lambda gain, real: (gain * real).sum(-1) / real.sum(-1),
    end: Callable[[Tensor], Any] = lambda of_answers: -of_answers.mean(),
) -> Callable[..., Any]:
    """The loss of a group, with one of its parts exchanged."""

    def answer(log_probs: Tensor, old: Tensor, real: Tensor, rewards: Tensor, clip: float) -> Any:
        ratio = of(log_probs, old)
        a = advantage(rewards)[..., None]
        return end(mean(gain(ratio, ratio.clamp(1 - clip, 1 + clip), a), real))

    return answer


def boxes(
    count: Callable[[Any, Any], float], names: bool = True, by: Callable[[list[float]], float] = sum
) -> Any:
    """IoU of each wanted box, put together by `by`, divided by a count."""

    def answer(named: Any, wanted: Any) -> float:
        best = [
            max((box_iou(a[:4], b[:4]) for a in named if not names or a.name == b.name), default=0.0)
            for b in wanted
        ]
        return by(best) / count(named, wanted)

    return answer


def in_order(named: Any, wanted: Any) -> float:
    """Compares by place in the list."""
    pairs = zip(named, wanted, strict=False)
    return sum(box_iou(a[:4], b[:4]) for a, b in pairs if a.name == b.name) / max(len(named), len(wanted))


def sum_of_all(named: Any, wanted: Any) -> float:
    return sum(box_iou(a[:4], b[:4]) for a in named for b in wanted if a.name == b.name) / len(wanted)


def whole(named: Any, wanted: Any) -> float:
    """All or nothing."""
    return float(
        {tuple(box) for box in named} == {tuple(box) for box in wanted} and len(named) == len(wanted)
    )


def over_threshold(named: Any, wanted: Any) -> float:
    hits = [any(a.name == b.name and box_iou(a[:4], b[:4]) > 0.5 for a in named) for b in wanted]
    return sum(hits) / max(len(named), len(wanted))


def squared(named: Any, wanted: Any) -> float:
    """Mean over named boxes: one true box is enough."""
    best = [max((box_iou(a[:4], b[:4]) for b in wanted if b.name == a.name), default=0.0) for a in named]
    return sum(best) / max(len(best), 1)


def sum_minus(named: Any, wanted: Any) -> float:
    """Takes a part off for each false box and each one too many, without an end."""
    best = [max((box_iou(a[:4], b[:4]) for a in named if a.name == b.name), default=0.0) for b in wanted]
    false = sum(all(box_iou(a[:4], b[:4]) < 0.5 for b in wanted if a.name == b.name) for a in named)
    return sum(best) / len(wanted) - 0.3 * false - 0.3 * max(0, len(named) - len(wanted))


def spread_of_all(rewards: Tensor) -> Tensor:
    """Advantages by the spread of all values, not that of a sample."""
    spread = rewards.std(dim=1, keepdim=True, unbiased=False)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)


def one_mean(new: Tensor, old: Tensor, real: Tensor, rewards: Tensor, clip: float) -> Tensor:
    """Every token counts alike, so an answer counts by its length."""
    advantage, ratio = grpo.advantages(rewards)[..., None], (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * real).sum() / real.sum()


WRONG: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "groups_that_teach": [
        ("never right: 1.0 is the share of groups that are alike", predicted(never_right=1.0)),
        ("^never right: you say 0.5", predicted(never_right=0.5)),
        ("^half right: you say 0.5, it is about 0.99", predicted(half_right=0.5)),
        ("^half right: 0.01 is the share of groups that are alike", predicted(half_right=0.01)),
        ("^half right: you say 0.25", predicted(half_right=0.25)),
        ("^nine in ten: 0.43 is the share of groups that are alike", predicted(nine_in_ten=0.43)),
        ("^nine in ten: you say 0.1, .* power of 8", predicted(nine_in_ten=0.1)),
        ("^nine in ten: 57 is no share", predicted(nine_in_ten=57)),
        ("^99 in a hundred: you say 0.01", lambda: good.groups_that_teach() | {"99 in a hundred": 0.01}),
        ("two answers: you say 0.09, .* either order", predicted(nine_in_ten_two_answers=0.09)),
        ("two answers: 0.82 is the share", predicted(nine_in_ten_two_answers=0.82)),
        ("no prediction yet for: half right", lambda: {"never right": 0.0}),
        ("return the dict", lambda: list(good.groups_that_teach().values())),
    ],
    "under_another_prior": [
        ("the old prior is still in it", lambda p, old, new: p),
        ("each line has to add up to 1 again", lambda p, old, new: p / old * new),
        ("the new one is not in", lambda p, old, new: p / old),
        ("Now the new one has to come in", lambda p, old, new: scaled(p / old)),
        ("the old one still is, too", lambda p, old, new: scaled(p * new)),
        ("a second time", lambda p, old, new: scaled(p * old)),
        ("exchanged", lambda p, old, new: scaled(p * old / new)),
        ("the old prior has to go", lambda p, old, new: scaled(p * old * new)),
        ("columns add up", lambda p, old, new: scaled(p / old * new, 0)),
        ("the whole table", lambda p, old, new: (p / old * new) / (p / old * new).sum()),
        ("not their logarithms", lambda p, old, new: (p / old * new).log()),
        ("softmax takes logarithms", lambda p, old, new: (p / old * new).softmax(-1)),
        ("subtract in logarithms only", lambda p, old, new: scaled(p - old + new)),
        ("a line for each", lambda p, old, new: p[0]),
        ("return a tensor", lambda p, old, new: p.tolist()),
    ],
    "diagnose": [
        *((f"you answer '{name}' for all five", lambda loss, sound, n=name: n) for name in FAULTS),
        ("In this loss that is not so", diagnosed({"uphill": "sums", "sums": "uphill"})),
        ("another fault you answer 'sums'", diagnosed({"whole batch": "sums"})),
        ("another fault you answer 'whole batch'", diagnosed({"no baseline": "whole batch"})),
        ("another fault you answer 'no baseline'", diagnosed({"whole batch": "no baseline"})),
        ("another fault you answer 'padding'", diagnosed({"sums": "padding"})),
        ("return one of the five names", diagnosed({"sums": "lengths"})),
    ],
    "worth_of_boxes": [
        ("exactly the wanted boxes are worth 2.00", boxes(lambda n, w: 1)),
        ("exactly the wanted boxes are worth 0.50", lambda named, wanted: len(named) / 4),
        ("what is missing has to cost", squared),
        ("a false box beside two true ones", boxes(lambda n, w: len(w))),
        ("order of boxes", in_order),
        ("that can be bought", sum_of_all),
        ("a part should be worth something", whole),
        ("about its name", boxes(lambda n, w: max(len(n), len(w)), names=False)),
        ("no box at all is worth 1.00", lambda named, wanted: 1.0),
        ("how true each is: IoU", over_threshold),
        ("a false box is worth -", sum_minus),
        ("return one number", lambda named, wanted: "all"),
        ("stops with ZeroDivisionError", boxes(lambda n, w: len(n))),
    ],
    "group_loss": [
        ("the sign", loss(end=lambda x: x.mean())),
        ("not clipped", loss(gain=lambda r, c, a: r * a)),
        ("only the clipped gain", loss(gain=lambda r, c, a: c * a)),
        ("the larger of the two", loss(gain=lambda r, c, a: torch.maximum(r * a, c * a))),
        ("The smaller .gain", loss(gain=lambda r, c, a: torch.minimum(r, c) * a)),
        ("padding counts", loss(mean=lambda gain, real: gain.mean(-1))),
        ("not their sum", loss(end=lambda x: -x.mean(1).sum())),
        ("by its number of tokens", loss(mean=lambda gain, real: (gain * real).sum(-1))),
        ("not by the longest", loss(mean=lambda gain, real: (gain * real).mean(-1))),
        ("rewards, not advantages", loss(lambda rewards: rewards)),
        ("by the group's spread", loss(lambda rewards: grpo.advantages(rewards, scale=False))),
        ("Each group has its own", loss(lambda r: (r - r.mean()) / (r.std() + 1e-4))),
        ("unbiased=False", loss(spread_of_all)),
        ("one mean over all tokens", one_mean),
        ("right for one epsilon alone", lambda *of: loss()(*of[:4], 0.2)),
        ("exp is missing", loss(of=lambda new, old: new - old)),
        (
            "spread of 0",
            loss(lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)),
        ),
        ("no gradient", loss(end=lambda x: -x.mean().detach())),
        ("what did you detach", lambda new, *rest: loss()(new.detach(), *rest) + 0 * new.sum()),
        ("one number for the whole batch", loss(end=lambda x: -x)),
        ("return a tensor", loss(end=lambda x: -x.mean().item())),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_the_reference_solution_is_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(reasoning, name)(getattr(good, name))
    assert capsys.readouterr().out.startswith("Right: ")


@pytest.mark.parametrize(
    ("name", "hint", "answer"),
    [(name, hint, answer) for name, cases in WRONG.items() for hint, answer in cases],
)
def test_a_wrong_answer_gets_its_hint(name: str, hint: str, answer: Callable[..., Any]) -> None:
    with pytest.raises(NotYet, match=hint):
        getattr(reasoning, name)(answer)


@pytest.mark.parametrize("name", WRONG)
def test_ten_wrong_answers(name: str) -> None:
    assert len(WRONG[name]) >= 10


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault: str) -> None:
    faulty = partial(reasoning.policy_loss, fault=fault)
    assert good.diagnose(faulty, reasoning.policy_loss) == fault
