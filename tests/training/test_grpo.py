"""The loss equals that of trl (https://github.com/huggingface/trl), and does what the formula says."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minivlm.training.grpo import advantages, grpo_loss, mixed_groups

P, G, L = 3, 4, 6
MOST = 9  # tokens of an answer


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities under three sets of weights, answers of several lengths, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(P, G, L, generator=generator) * 3
    lengths = torch.randint(1, L + 1, (P, G), generator=generator)
    return {
        "log_probs": log_probs,
        "old": log_probs + 0.4 * torch.randn(P, G, L, generator=generator),
        "reference": log_probs + 0.4 * torch.randn(P, G, L, generator=generator),
        "real": torch.arange(L) < lengths[..., None],
        "rewards": torch.rand(P, G, generator=generator).round(decimals=1),
    }


def trl_loss(
    given: dict[str, Tensor], loss_type: str, clip: float, kl: float, old: bool
) -> tuple[Tensor, Tensor]:
    """The loss of trl's `GRPOTrainer` and its gradient, with our log-probabilities in place of a model's."""
    from trl import GRPOTrainer

    log_probs = given["log_probs"].flatten(0, 1).clone().requires_grad_(True)
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        accelerator=accelerator,
        loss_type=loss_type,
        epsilon_low=clip,
        epsilon_high=clip,
        beta=kl,
        max_completion_length=MOST,
        current_gradient_accumulation_steps=1,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
    )
    rewards = given["rewards"]
    centered = rewards - rewards.mean(1, keepdim=True)
    # trl's `_generate_and_score_completions`, which samples as well, and so cannot be called on its own.
    scaled = centered / (rewards.std(1, keepdim=True) + 1e-4) if loss_type == "grpo" else centered
    inputs = {
        "prompt_ids": torch.zeros(P * G, 1, dtype=torch.long),
        "prompt_mask": torch.ones(P * G, 1, dtype=torch.long),
        "completion_ids": torch.zeros(P * G, L, dtype=torch.long),
        "completion_mask": given["real"].flatten(0, 1).long(),
        "advantages": scaled.flatten(),
        "ref_per_token_logps": given["reference"].flatten(0, 1),
    }
    if old:
        inputs["old_per_token_logps"] = given["old"].flatten(0, 1)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient.unflatten(0, (P, G))


def our_loss(
    given: dict[str, Tensor], loss_type: str, clip: float, kl: float, old: bool
) -> tuple[Tensor, Tensor]:
    log_probs = given["log_probs"].clone().requires_grad_(True)
    published = loss_type == "grpo"
    loss = grpo_loss(
        log_probs,
        given["real"],
        advantages(given["rewards"], scale=published),
        given["old"] if old else None,
        given["reference"],
        clip=clip,
        kl=kl,
        most_tokens=None if published else MOST,
    ).loss
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("clip", [0.2, 0.05])
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize("old", [True, False])
def test_equal_to_trl(loss_type: str, clip: float, kl: float, old: bool) -> None:
    given = batch()
    for ours, wanted in zip(
        our_loss(given, loss_type, clip, kl, old), trl_loss(given, loss_type, clip, kl, old), strict=True
    ):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"clip": 0.3}, {"kl": 0.2}, {"loss_type": "dr_grpo"}, {"old": False}],
    ids=["clip", "kl", "lengths", "old"],
)
def test_another_loss_is_not_equal(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"loss_type": "grpo", "clip": 0.1, "kl": 0.04, "old": True}
    given = batch()
    _, gradient = our_loss(given, **right | wrong)
    _, wanted = trl_loss(given, **right)
    assert (gradient - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_advantages() -> None:
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = advantages(rewards)
    torch.testing.assert_close(found[0], torch.tensor([-0.5, -0.5, -0.5, 1.5]), atol=1e-3, rtol=0)
    assert found[1].tolist() == [0.0] * 4
    assert advantages(rewards, scale=False)[0].tolist() == [-0.25, -0.25, -0.25, 0.75]
    assert mixed_groups(rewards).tolist() == [True, False]


def test_groups_without_difference_can_be_left_out() -> None:
    """Without KL, the loss is the same, as long as the mean is over all prompts."""
    given = batch()
    given["rewards"][1] = 0.5
    kept = mixed_groups(given["rewards"])
    assert kept.tolist() == [True, False, True]
    whole = grpo_loss(given["log_probs"], given["real"], advantages(given["rewards"]), given["old"]).loss
    part = {name: tensor[kept] for name, tensor in given.items()}
    less = grpo_loss(
        part["log_probs"], part["real"], advantages(part["rewards"]), part["old"], prompts=P
    ).loss
    torch.testing.assert_close(whole, less)


def test_on_the_policy_that_drew_them_the_gradient_is_reinforce() -> None:
    """With ratios of 1, each token's gradient is -A / (length, group and prompts)."""
    given = batch()
    _, gradient = our_loss(given, "grpo", 0.2, 0.0, old=False)
    advantage, lengths = advantages(given["rewards"]), given["real"].sum(-1)
    wanted = -(advantage / lengths)[..., None] * given["real"] / (P * G)
    torch.testing.assert_close(gradient, wanted)
