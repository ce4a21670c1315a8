"""GRPO, Group Relative Policy Optimization: the answers to one prompt are measured against each other.

From DeepSeekMath (https://arxiv.org/abs/2402.03300), for G answers o_1 ... o_G to a prompt, with rewards r:

    A_i = (r_i - mean(r)) / std(r)                                      advantage: better than its group
    p_t = pi(o_t | before) / pi_old(o_t | before)                       ratio, 1 until the weights have moved
    J   = 1/G sum_i 1/|o_i| sum_t [ min(p_t A_i, clip(p_t, 1 - e, 1 + e) A_i) - b KL_t ]
    KL_t = pi_ref/pi - log(pi_ref/pi) - 1                               how far from where training started

The loss is -J, a mean over prompts. The minimum is PPO's clipping (https://arxiv.org/abs/1707.06347): a step
that has already moved a token's probability by more than e gets no more credit for it. There is no network
that estimates values: the mean of the group takes its place. A group whose rewards are all alike has no
advantage, and teaches nothing.

Dr. GRPO (https://arxiv.org/abs/2503.20783) leaves out the two divisions that favor some prompts and lengths:

    A_i = r_i - mean(r)
    J   = 1/G sum_i 1/M sum_t [ ... ]                                   M: the most tokens an answer may have

With 1/|o_i|, a wrong answer is punished less for each of its tokens the longer it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4  # keeps the spread of nearly equal rewards from blowing up their advantages


class PolicyLoss(NamedTuple):
    """What a step of GRPO goes down on, and its parts."""

    loss: Tensor
    kl: float  # mean over tokens
    clipped: float  # share of tokens whose ratio lies outside of the clip range


def advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Rewards [P, G] -> advantages [P, G]. scale: divide by the group's standard deviation."""
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (rewards.std(dim=1, keepdim=True) + EPSILON) if scale else centered


def mixed_groups(rewards: Tensor) -> Tensor:
    """Which groups have answers of different rewards: [P, G] -> [P]."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) > 1e-6


def grpo_loss(
    log_probs: Tensor,
    real: Tensor,
    advantage: Tensor,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    *,
    clip: float = 0.2,
    kl: float = 0.0,
    most_tokens: int | None = None,
    prompts: int | None = None,
) -> PolicyLoss:
    """The loss of the answers in groups.

    Args:
        log_probs: [P, G, L], of the answers' tokens under the present weights.
        real: [P, G, L], False for padding.
        advantage: [P, G].
        old: the log-probabilities when the answers were drawn; None: these weights drew them.
        reference: those of the model where training started; needed for `kl`.
        clip: e of the formula; infinity clips nothing.
        kl: b of the formula.
        most_tokens: M of Dr. GRPO, by which every answer's sum is divided; None: by its own length.
        prompts: how many prompts the mean is over, where groups that teach nothing were left out.
    """
    old = log_probs.detach() if old is None else old
    ratio = (log_probs - old).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage[..., None], bounded * advantage[..., None])  # [P, G, L]
    distance = torch.zeros(())
    if kl:
        assert reference is not None
        gap = reference - log_probs
        distance = gap.exp() - gap - 1
        gain = gain - kl * distance
    lengths = real.sum(dim=-1).clamp(min=1) if most_tokens is None else most_tokens  # [P, G]
    of_answers = (gain * real).sum(dim=-1) / lengths
    loss = -of_answers.mean(dim=1).sum() / (len(log_probs) if prompts is None else prompts)
    outside = ((ratio - 1).abs() > clip) & real
    tokens = real.sum().clamp(min=1)
    return PolicyLoss(loss, float((distance * real).sum().detach() / tokens), float(outside.sum() / tokens))
