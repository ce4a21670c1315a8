"""The schedules are the formulas that earlier runs were trained with, bit for bit, at every step."""

from __future__ import annotations

import math

import pytest

from minivlm.training.recipe import TrainingConfig
from minivlm.training.schedule import cosine_fall, warm_up, warm_up_then_fall


def formula_of_the_recipe(config: TrainingConfig, step: int) -> float:
    """Written out: for the tower, for all, for the review, for look-alikes."""
    stage = config.stage(step)
    peak, done = 1.0, step
    if stage == "tower":
        total = config.tower_steps
    elif stage in ("alike", "last"):
        peak = config.alike_lr_factor
        done -= config.tower_steps + config.packed_steps + config.review_steps + config.prefix_steps
        total = config.alike_steps + config.last_steps
    elif stage == "packed" or not config.review_steps:
        done -= config.tower_steps
        total = config.packed_steps + config.prefix_steps
    else:
        peak = config.review_lr_factor
        done -= config.tower_steps + config.packed_steps
        total = config.review_steps + config.prefix_steps
    return peak * (min(1.0, (done + 1) / config.warmup_steps) * (1.0 - done / total))


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(),
        TrainingConfig(review_steps=0, warmup_steps=7),
        TrainingConfig(tower_steps=0),
        TrainingConfig(alike_steps=0, last_steps=0),
        TrainingConfig(tower_steps=0, packed_steps=0, review_steps=0, prefix_steps=0, last_steps=0),
    ],
    ids=["shipped", "no review", "no tower", "no look-alikes", "look-alikes alone"],
)
def test_the_recipe(config: TrainingConfig) -> None:
    steps = range(config.total_steps)
    assert [config.rate_factor(step) for step in steps] == [
        formula_of_the_recipe(config, step) for step in steps
    ]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (9, 3), (60, 3), (400, 20), (1000, 100), (50, 80)])
def test_up_and_down(steps: int, warmup: int) -> None:
    """The formula of fine-tuning and of contrastive training, also for a warm-up longer than the run."""
    for step in range(steps):
        formula = min(1.0, (step + 1) / warmup) * (1.0 - step / steps)
        assert warm_up_then_fall(step, steps, warmup) == formula
    assert warm_up_then_fall(0, steps, warmup) == 1 / warmup
    assert warm_up_then_fall(steps, steps, warmup) == 0  # the first step that is not taken


@pytest.mark.parametrize("steps", [1, 120, 2500])
def test_the_codebook(steps: int) -> None:
    for step in range(steps):
        done, peak = step / steps, 2e-3
        formula = peak * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        assert peak * warm_up(step, 100) * cosine_fall(step, steps) == formula
