"""Checks for the exercises of 22_reasoning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.checks import NotYet, call, expect, expect_faults, right, same
from minivlm.evaluation.detection import box_iou
from minivlm.processing.boxes import Box
from minivlm.training import grpo

FAULTS = ("uphill", "whole batch", "no baseline", "padding", "sums")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def policy_loss(log_probs: Tensor, real: Tensor, rewards: Tensor, fault: str = "") -> Tensor:
    """Minus the mean over answers of the mean log-probability of their tokens times (reward - group's mean).

    One fault may be built in.

    Args:
        log_probs, real: [P, G, L]; real is False for padding.
        rewards: [P, G].
    """
    better = rewards - rewards.mean(dim=1, keepdim=True)
    if fault == "whole batch":
        better = rewards - rewards.mean()
    if fault == "no baseline":
        better = rewards
    counted = torch.ones_like(real) if fault == "padding" else real
    of_answers = (log_probs * counted).sum(dim=-1)
    if fault != "sums":
        of_answers = of_answers / counted.sum(dim=-1)
    loss = -(of_answers * better).mean()
    return -loss if fault == "uphill" else loss


class solutions:
    """Reference solutions."""

    @staticmethod
    def groups_that_teach() -> dict[str, float]:
        """1 - p^G - (1 - p)^G."""
        return {
            "never right": 0.0,
            "half right": 0.99,
            "nine in ten": 0.57,
            "99 in a hundred": 0.08,
            "nine in ten, two answers": 0.18,
        }

    @staticmethod
    def under_another_prior(posterior: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Divide by what was frequent, multiply by what is, and let each line add up to 1."""
        weighted = posterior / old * new
        return weighted / weighted.sum(dim=-1, keepdim=True)

    @staticmethod
    def diagnose(loss: Loss, sound: Loss) -> str:
        """By gradients: two groups, of which one is more often right, and answers of one to four tokens."""
        real = torch.arange(4) < torch.tensor([[1, 4, 2, 2], [3, 1, 2, 4]])[..., None]
        rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])

        def gradient(of: Loss, rewards: Tensor = rewards) -> Tensor:
            log_probs = torch.full((2, 4, 4), -1.0, requires_grad=True)
            (found,) = torch.autograd.grad(of(log_probs, real, rewards), log_probs)
            return found

        theirs, wanted = gradient(loss), gradient(sound)
        if theirs[~real].any():
            return "padding"
        if torch.allclose(theirs, -wanted):
            return "uphill"
        if gradient(loss, torch.ones(2, 4)).any():
            return "no baseline"
        apart = gradient(loss, torch.tensor([[1.0] * 4, [0.0] * 4]))
        return "whole batch" if apart.any() else "sums"

    @staticmethod
    def worth_of_boxes(named: Sequence[Box], wanted: Sequence[Box]) -> float:
        """IoU of the best box of each wanted name, over the boxes named or wanted, whichever are more."""
        best = [
            max((box_iou(box[:4], one[:4]) for box in named if box.name == one.name), default=0.0)
            for one in wanted
        ]
        return sum(best) / max(len(named), len(wanted), 1)

    @staticmethod
    def group_loss(log_probs: Tensor, old: Tensor, real: Tensor, rewards: Tensor, clip: float) -> Tensor:
        """The formula, line by line."""
        centered = rewards - rewards.mean(dim=1, keepdim=True)
        advantage = (centered / (rewards.std(dim=1, keepdim=True) + 1e-4))[..., None]
        ratio = (log_probs - old).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        of_answers = (gain * real).sum(dim=-1) / real.sum(dim=-1)
        return -of_answers.mean()


# ---- exercise: groups that teach ---------------------------------------------------------------------------


def groups_that_teach(answer: Callable[..., Any]) -> None:
    """Shares of groups whose answers differ in reward."""
    result = call(answer)
    expect(isinstance(result, dict), f"return the dict of your predictions, not a {type(result).__name__}")
    truth = {
        "never right": (0.0, "eight wrong answers are all alike"),
        "half right": (0.99, "all right or all wrong happens in 2 of 256 groups"),
        "nine in ten": (0.57, "all eight are right in .9 to the power of 8 of the groups"),
        "99 in a hundred": (0.08, "all eight are right in .99 to the power of 8 of the groups"),
        "nine in ten, two answers": (0.18, "one right and one wrong, in either order: 2 x .9 x .1"),
    }
    missing = [name for name in truth if name not in result]
    expect(not missing, f"no prediction yet for: {', '.join(missing)}")
    for name, (share, reason) in truth.items():
        said = result[name]
        expect(isinstance(said, (int, float)), f"{name}: a share, as a number from 0 to 1")
        expect(said <= 1, f"{name}: {said} is no share: give a number from 0 to 1")
        expect(
            abs(said - (1 - share)) > 0.02 or abs(said - share) <= 0.02,
            f"{name}: {said} is the share of groups that are alike. Those that differ teach",
        )
        expect(abs(said - share) <= 0.02, f"{name}: you say {said}, it is about {share}: {reason}")
    right("a group teaches if its answers differ, so a start that is always or never right teaches nothing")


# ---- exercise: under another prior -------------------------------------------------------------------------


def under_another_prior(answer: Callable[..., Any]) -> None:
    """On posteriors that Bayes' rule makes from known likelihoods."""
    generator = torch.Generator().manual_seed(5)
    likelihood = torch.rand(6, 4, generator=generator) + 0.1
    old, new = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def scaled(table: Tensor, dim: int = -1) -> Tensor:
        return table / table.sum(dim=dim, keepdim=True)

    posterior, wanted = scaled(likelihood * old), scaled(likelihood * new)
    result = call(answer, posterior.clone(), old.clone(), new.clone())
    expect(isinstance(result, Tensor), f"return a tensor, not a {type(result).__name__}")
    expect(
        tuple(result.shape) == (6, 4), f"a line for each of the 6 pictures, [6, 4], not {list(result.shape)}"
    )
    quotient = posterior / old * new
    mistakes = [
        (posterior, "that is what came in: the old prior is still in it"),
        (quotient, "right up to a factor: each line has to add up to 1 again"),
        (posterior / old, "the old prior is out, the new one is not in, and lines do not add up to 1"),
        (scaled(posterior / old), "the old prior is out. Now the new one has to come in"),
        (scaled(posterior * new), "the new prior is in, and the old one still is, too"),
        (scaled(posterior * old), "the prior comes in a second time. It has to go: divide"),
        (scaled(posterior * old / new), "old and new are exchanged: divide by the old, multiply by the new"),
        (posterior * old * new, "the old prior has to go: divide by it"),
        (scaled(posterior * old * new), "the old prior has to go: divide by it"),
        (scaled(quotient, 0), "columns add up to 1. A picture is a line: sum over the last axis"),
        (quotient / quotient.sum(), "the whole table adds up to 1. Each picture has its own sum"),
        (quotient.log(), "return probabilities, not their logarithms"),
        (quotient.softmax(-1), "softmax takes logarithms. These are probabilities: divide by their sum"),
        (scaled(posterior - old + new), "probabilities multiply: subtract in logarithms only"),
    ]
    for wrong, hint in mistakes:
        expect(not same(result, wrong), hint)
    expect(same(result, wanted), "multiply each probability by new / old of its word, then divide by the sum")
    right("what the picture says is left, and what was frequent is exchanged")


# ---- exercise: find the bug --------------------------------------------------------------------------------


def diagnose(answer: Callable[..., Any]) -> None:
    """Each fault, in an order of its own, beside the sound loss."""
    sound = partial(policy_loss, fault="")
    said = {name: call(answer, partial(policy_loss, fault=name), sound) for name in FAULTS}
    signs = {
        "uphill": "every gradient has the wrong sign",
        "whole batch": "a group whose answers are all right still gets a gradient, if another is all wrong",
        "no baseline": "a batch in which all answers are right still gets a gradient",
        "padding": "tokens behind the end of an answer get a gradient",
        "sums": "each token of a long answer gets as much gradient as that of a short one",
    }
    expect_faults(said, signs, "loss", "losses")
    right("five losses, found by what they do to gradients. All of them would have run without an error")


# ---- exercise: worth of boxes ------------------------------------------------------------------------------


def worth_of_boxes(answer: Callable[..., Any]) -> None:
    """True evidence pays; nothing is gained by more boxes, by one box twice, or by other names."""
    red, blue = Box(5, 5, 25, 25, "red circle"), Box(35, 40, 55, 60, "blue star")
    wanted, near = [red, blue], Box(5, 5, 25, 20, "red circle")
    everywhere = [
        Box(x, y, x + 20, y + 20, name)
        for x in (0, 10, 20, 30, 40)
        for y in (0, 10, 20, 30, 40)
        for name in ("red circle", "blue star")
    ]

    def worth(*named: Box) -> float:
        value = call(answer, list(named), list(wanted))
        try:
            return float(value)
        except (TypeError, ValueError):
            raise NotYet(f"return one number, not a {type(value).__name__}") from None

    exact = worth(red, blue)
    expect(abs(exact - 1) < 1e-6, f"exactly the wanted boxes are worth {exact:.2f}, they should be worth 1")
    nothing = worth()
    expect(abs(nothing) < 1e-6, f"no box at all is worth {nothing:.2f}, it should be worth 0")
    expect(
        abs(worth(blue, red) - 1) < 1e-6, "the order of boxes should not matter: match them by their names"
    )
    one = worth(red)
    expect(one < 0.9, f"one of two wanted boxes is worth {one:.2f}: what is missing has to cost")
    expect(one > 0.05, f"one of two wanted boxes is worth {one:.2f}: a part should be worth something")
    twice = worth(red, red)
    expect(
        twice <= one + 1e-6, f"the same box twice is worth {twice:.2f}, once {one:.2f}: that can be bought"
    )
    more = worth(red, blue, Box(0, 0, 9, 9, "red circle"))
    expect(more < 0.95, f"a false box beside two true ones is worth {more:.2f}: what is too much has to cost")
    other = worth(Box(*red[:4], "blue star"), Box(*blue[:4], "red circle"))
    expect(other < 0.3, f"true places with exchanged names are worth {other:.2f}: a box is about its name")
    half = worth(near, blue)
    expect(0.7 < half < 0.999, f"a box three quarters true, one true: {half:.2f}. Use how true each is: IoU")
    bought = worth(*everywhere)
    expect(bought < 0.2, f"fifty boxes all over the picture are worth {bought:.2f}: a sum pays for quantity")
    negative = worth(Box(0, 0, 2, 2, "red circle"))
    expect(negative > -1e-6, f"a false box is worth {negative:.2f}: stay between 0 and 1")
    right("true boxes pay, and more boxes do not. Every way to cheat that you leave open will be found")


# ---- exercise: the loss of a group -------------------------------------------------------------------------


def group_loss(answer: Callable[..., Any]) -> None:
    """Value and gradient against the package's, on answers of several lengths and moved weights."""
    generator = torch.Generator().manual_seed(3)
    real = torch.arange(5) < torch.tensor([[1, 4, 2, 5], [3, 5, 2, 2], [2, 2, 1, 3]])[..., None]
    start = (-2 * torch.rand(3, 4, 5, generator=generator)) * real
    old = (start + 0.4 * torch.randn(3, 4, 5, generator=generator)) * real
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    log_probs = start.clone().requires_grad_()
    result = call(answer, log_probs, old, real, rewards, 0.2)
    expect(isinstance(result, Tensor), f"return a tensor, not a {type(result).__name__}")
    expect(result.dim() == 0, f"one number for the whole batch, not shape {list(result.shape)}")
    expect(
        not result.isnan(), "your loss is nan: a group without difference has a spread of 0. Add 1e-4 to it"
    )
    expect(result.requires_grad, "no gradient reaches log_probs: do not detach them")

    def loss(
        of: Tensor = start,
        advantage: Tensor | None = None,
        mask: Tensor = real,
        clip: float = 0.2,
        **more: Any,
    ) -> Tensor:
        found = grpo.advantages(rewards) if advantage is None else advantage
        return grpo.grpo_loss(of, mask, found, old, clip=clip, **more).loss

    a, ratio = grpo.advantages(rewards)[..., None], (start - old).exp()
    bounded, spread = ratio.clamp(0.8, 1.2), rewards.std(dim=1, keepdim=True, unbiased=False)

    def mean_of(gain: Tensor) -> Tensor:
        return -((gain * real).sum(-1) / real.sum(-1)).mean()

    mistakes = [
        (-loss(), "the sign: a loss goes down, and gain should go up"),
        (loss(clip=torch.inf), "the ratios are not clipped"),
        (
            mean_of(bounded * a),
            "only the clipped gain is used. Take the smaller one of clipped and unclipped",
        ),
        (mean_of(torch.maximum(ratio * a, bounded * a)), "the larger of the two gains is taken: the smaller"),
        (
            mean_of(torch.minimum(ratio, bounded) * a),
            "the smaller ratio is taken. The smaller *gain*: with a negative advantage it is another one",
        ),
        (loss(mask=torch.ones_like(real)), "padding counts as tokens: use `real`"),
        (mean_of(torch.minimum(ratio * a, bounded * a)) * 3, "a mean over groups, not their sum"),
        (loss(most_tokens=1), "divide each answer's sum by its number of tokens"),
        (loss(most_tokens=5), "each answer is divided by its own number of tokens, not by the longest"),
        (loss(advantage=rewards), "these are rewards, not advantages: subtract the mean of the group"),
        (loss(advantage=grpo.advantages(rewards, scale=False)), "divide advantages by the group's spread"),
        (
            loss(advantage=grpo.advantages(rewards, scale=False) / (spread + 1e-4)),
            "the spread is that of all values (unbiased=False). Take `std` as it is, which divides by n - 1",
        ),
        (
            -(torch.minimum(ratio * a, bounded * a) * real).sum() / real.sum(),
            "one mean over all tokens: long answers count more. Each answer has its own mean first",
        ),
        (
            loss(advantage=(rewards - rewards.mean()) / (rewards.std() + 1e-4)),
            "mean and spread are those of the whole batch. Each group has its own",
        ),
        (mean_of(start * a), "the gain is the ratio times the advantage; this has log-probabilities"),
        (
            mean_of(torch.minimum((start - old) * a, (start - old).clamp(0.8, 1.2) * a)),
            "a difference of logarithms is the logarithm of the ratio: exp is missing",
        ),
    ]
    for wrong, hint in mistakes:
        expect(not same(result.detach(), wrong, 2e-4), hint)
    expect(
        same(result.detach(), loss(), 2e-3),
        f"the loss is {result.item():.4f}, it should be {loss().item():.4f}: "
        "compare advantage, ratio, clipping and the two means with the formula",
    )
    (gradient,) = torch.autograd.grad(result, log_probs)
    other = start.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(other), other)
    expect(same(gradient, wanted, 2e-3), "the value is right and the gradient is not: what did you detach?")
    wider = call(answer, start.clone(), old, real, rewards, 0.05)
    expect(same(wider.detach(), loss(clip=0.05), 2e-3), "right for one epsilon alone: `clip` names it")
    right("GRPO's loss, value and gradient, on answers of several lengths")
