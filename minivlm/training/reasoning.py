"""Learning a composed question: first from true answers, then from rewards for the model's own.

1. supervised: some steps on true answers, until some of the model's own answers are right and some wrong.
2. rewarded: for each of P prompts the model writes G answers, which are measured against each other (GRPO,
   grpo.py). No true answer is shown any more, only what an answer is worth (rewards.py).

The image tower stays as it is. So that old skills are not lost, each step may also show some rows of the
questions that the model was trained on (`rehearsal`). Batches and the random numbers of answers depend on
seed and step alone: a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from minivlm.evaluation.answers import answer_questions, drawn_side
from minivlm.evaluation.composed import conclusions_right, make_composed
from minivlm.models.load import load_answering
from minivlm.models.protocols import Answers
from minivlm.training.collapse import Watch
from minivlm.training.curves import plot_curves
from minivlm.training.folder import LOG, run_folder
from minivlm.training.grpo import advantages, grpo_loss, mixed_groups
from minivlm.training.log import read_log
from minivlm.training.log_probs import answer_log_probs
from minivlm.training.loop import DEFAULT_LOOP, Loop, in_order, run_to_end
from minivlm.training.reasoning_recipe import STREAM, Asked, ReasoningBatches, ReasoningConfig
from minivlm.training.rewards import reward_groups
from minivlm.training.rollouts import Rollout, sample_groups
from minivlm.training.schedule import warm_up, warm_up_then_fall
from minivlm.training.supervised import Shown, supervised_loss
from minivlm.training.trainable import Diverged, Trainable

CURVES = "curves.png"
MEASURED = 200  # held-out questions


class Collapsed(Diverged):
    """The answers have become worthless to learn from. The weights are those after the step."""


class ReasoningRun(Trainable):
    """A training run at some step."""

    losses = ("supervised", "rehearsed")
    curves = ("reward", "accuracy", "entropy", "mixed", "length", "endless", "policy", "kl", "clipped")
    log_every = 5
    measure_every = 50
    starts_trained = True
    masters: nn.ModuleDict

    def __init__(self, config: ReasoningConfig, device: torch.device | str = "cpu", workers: int = 0) -> None:
        self.config, self.workers, self.step = config, workers, 0
        self.model, self.processor = load_answering(config.model, device=device)
        module = cast(nn.Module, self.model)
        parts: dict[str, nn.Module] = {"model": module, "watch": Watch()}
        if config.kl:
            parts["reference"] = copy.deepcopy(module).requires_grad_(False)
        self.masters = self.working = nn.ModuleDict(parts)
        cast(nn.Module, self.model.vision_tower).requires_grad_(False)
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            stage: torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
            for stage, lr in (("supervised", config.supervised_lr), ("rewarded", config.lr))
        }

    @property
    def total_steps(self) -> int:
        return self.config.supervised_steps + self.config.rewarded_steps

    def stage_of(self, step: int) -> str:
        """The stage that a step belongs to."""
        return "supervised" if step < self.config.supervised_steps else "rewarded"

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def place(self) -> dict[str, Any]:
        return {"stage": self.stage_of(max(self.step - 1, 0))}

    def batches(self) -> Iterator[Asked]:
        data = ReasoningBatches(self.config, drawn_side(self.processor.image_processor))
        return in_order(data, range(self.step, self.total_steps), self.workers)

    def advance(self, batch: Asked) -> dict[str, float]:
        """One batch. Raises Collapsed: the steps before show that there is nothing more to learn."""
        watch = cast(Watch, self.masters["watch"])
        wrong = watch.verdict()  # before the step and not after it, when it has a line in the log
        if wrong is not None:
            raise Collapsed(f"stopped after step {self.step}: {wrong}")
        if self.stage_of(self.step) == "supervised":
            rows = [Shown(one.picture, one.example.prefix, one.example.suffix) for one in batch.questions]
            numbers = self._learn_from(rows, batch.rehearsed)
            self.step += 1
            return numbers
        if self.step == self.config.supervised_steps and self.config.kl:
            self.masters["reference"].load_state_dict(self.masters["model"].state_dict())
        numbers = self._learn_from_rewards(batch)
        self.step += 1
        watch.note(numbers)
        return numbers

    def _learn_from(self, rows: list[Shown], rehearsed: list[Shown]) -> dict[str, float]:
        """A supervised step."""
        losses = {"supervised": supervised_loss(self.model, self.processor, rows)}
        if rehearsed:
            losses["rehearsed"] = supervised_loss(self.model, self.processor, rehearsed)
        self._update(torch.stack([*losses.values()]).sum(), "supervised", self.step)
        return {name: loss.item() for name, loss in losses.items()}

    def _learn_from_rewards(self, batch: Asked) -> dict[str, float]:
        """Let the model answer, say what its answers are worth, and move toward the better ones."""
        config, questions = self.config, batch.questions
        rollout = sample_groups(
            self.model,
            self.processor,
            [question.picture for question in questions],
            [question.example.prefix for question in questions],
            config.group,
            max_new_tokens=config.most_tokens,
            seed=int(np.random.default_rng([config.seed, STREAM, self.step]).integers(2**62)),
            temperature=config.temperature,
        )
        rewards, right = reward_groups(questions, rollout, config.weights)
        mixed = mixed_groups(rewards)
        numbers = {
            "reward": float(rewards.mean()),
            "accuracy": float(right.mean()),
            "entropy": rollout.entropy,
            "mixed": float(mixed.float().mean()),
            "length": float(rollout.lengths.float().mean()),
            "endless": float(1 - rollout.ended.float().mean()),
        }
        # A group whose answers are worth the same has no advantage; only KL would still move it.
        kept = torch.ones_like(mixed) if config.kl else mixed
        first = (self.step - config.supervised_steps) * config.updates
        self._set_rates("rewarded", first)  # also where nothing is learned: the log shows them
        for update in range(config.updates if bool(kept.any()) or batch.rehearsed else 0):
            parts = self._policy(batch, rollout, rewards, kept, update)
            loss = parts.pop("loss")
            self._update(loss, "rewarded", first + update)
            numbers |= {name: part.item() for name, part in parts.items()}
        return numbers

    def _policy(
        self, batch: Asked, rollout: Rollout, rewards: Tensor, kept: Tensor, update: int
    ) -> dict[str, Tensor]:
        """The loss of one update and its parts."""
        config, device = self.config, self.model.device
        parts: dict[str, Tensor] = {}
        total = torch.zeros((), device=device)
        if bool(kept.any()):
            chosen = [question for question, keep in zip(batch.questions, kept.tolist(), strict=True) if keep]
            tokens, real = rollout.tokens[kept], rollout.real[kept]

            def scores(model: Answers) -> Tensor:
                pictures = [question.picture for question in chosen]
                prompts = [question.example.prefix for question in chosen]
                return answer_log_probs(
                    model, self.processor, pictures, prompts, tokens, real, config.temperature
                )

            log_probs = scores(self.model)
            if update == 0:
                self.old = log_probs.detach()
            reference = None
            if config.kl:
                with torch.no_grad():
                    reference = scores(cast(Answers, self.masters["reference"]))
            published = config.loss == "grpo"
            policy = grpo_loss(
                log_probs,
                real,
                advantages(rewards[kept], scale=published).to(device),
                self.old,
                reference,
                clip=config.clip_ratio,
                kl=config.kl,
                most_tokens=None if published else config.most_tokens,
                prompts=len(batch.questions),
            )
            total = total + policy.loss
            parts |= {
                "policy": policy.loss.detach(),
                "kl": torch.tensor(policy.kl),
                "clipped": torch.tensor(policy.clipped),
            }
        if batch.rehearsed:
            parts["rehearsed"] = supervised_loss(self.model, self.processor, batch.rehearsed)
            total = total + parts["rehearsed"]
        return {"loss": total} | parts

    def _update(self, loss: Tensor, stage: str, number: int) -> None:
        """One step of a stage's optimizer, its `number`-th."""
        self.check_finite(f"the {stage} loss", loss.item())
        for weight in self.weights:
            weight.grad = None
        loss.backward()
        self.check_finite("the gradient", nn.utils.clip_grad_norm_(self.weights, self.config.clip).item())
        self._set_rates(stage, number)
        self.optimizers[stage].step()

    def _set_rates(self, stage: str, number: int) -> None:
        """The learning rates of a stage's step, its `number`-th."""
        config = self.config
        if stage == "supervised":
            share = warm_up_then_fall(number, config.supervised_steps, config.warmup_steps)
            rate = config.supervised_lr * share
        else:  # nobody knows where it will end
            rate = config.lr * warm_up(number, config.warmup_steps)
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = rate if name == stage else 0.0

    def advice(self) -> str:
        return f"try a lower learning rate in a new folder, such as --lr {self.config.lr / 2:g}"

    def measure(self) -> dict[str, float]:
        """The accuracy of the most probable answers to held-out questions."""
        config = self.config
        questions = make_composed(
            config.task,
            MEASURED,
            pixels=drawn_side(self.processor.image_processor),
            thinks=config.think,
        )
        answers = answer_questions(self.model, self.processor, questions)
        return {"held-out accuracy": conclusions_right(questions, answers).value}

    def save(self, folder: Path) -> None:
        """The trained model so far, as a checkpoint folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def train_reasoning(out: Path, config: ReasoningConfig, *, loop: Loop = DEFAULT_LOOP) -> ReasoningRun:
    """Train, or go on with the run in `out`, and leave a checkpoint folder and drawn curves there.

    Raises:
        InputError: as `minivlm.training.scratch.train`.
        Collapsed: there is nothing more to learn from the answers; the curves show how it came.
    """
    with run_folder(out, loop.resume):
        run = ReasoningRun(config, loop.device, loop.workers)
        try:
            run_to_end(run, out, loop)
        finally:
            if (out / LOG).is_file():
                plot_curves(read_log(out / LOG), out / CURVES)
        return run
