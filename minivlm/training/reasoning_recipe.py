"""What `minivlm train-reasoning` trains: every number that decides the result, and the batches of a run.

A batch is a function of (seed, step): questions about scenes, and rows of old questions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from torch.utils.data import Dataset

from minivlm.errors import InputError
from minivlm.evaluation.composed import check_task, draw_question
from minivlm.evaluation.scoring import Question
from minivlm.models.load import SHIPPED
from minivlm.training.limits import check_numbers, check_warmup
from minivlm.training.replay import WorldRows
from minivlm.training.rewards import REWARDS
from minivlm.training.supervised import Shown

LOSSES = {"grpo": "GRPO as published", "dr_grpo": "Dr. GRPO, without the two divisions"}
STREAM = 2**29  # of random numbers: [seed, stream, step, number]


@dataclass(frozen=True)
class ReasoningConfig:
    """Everything that decides the result. The defaults take about a minute."""

    model: str = str(SHIPPED)  # folder or repo id of a model that answers
    task: str = "larger"  # of COMPOSED_TASKS, or an old one
    think: bool = False  # name boxes before the conclusion
    seed: int = 0
    supervised_steps: int = 20
    rows: int = 32  # of a supervised step
    supervised_lr: float = 1e-3
    rewarded_steps: int = 100
    prompts: int = 32  # of a rewarded step
    group: int = 8  # answers to each
    temperature: float = 1.0
    max_new_tokens: int | None = None  # None: 12, or 64 where it thinks
    lr: float = 2e-4
    loss: str = "grpo"
    updates: int = 1  # steps of the optimizer on the answers of one
    clip_ratio: float = 0.2  # PPO's clipping, which matters from the second update on
    kl: float = 0.0  # weight of the distance from the model after its supervised steps
    rehearsal: int = 0  # rows of old questions in every step
    warmup_steps: int = 5  # of each stage
    clip: float = 1.0  # norm of the gradient
    # What an answer is worth: the weight of each reward.
    right: float = 1.0
    form: float = 0.0
    true_boxes: float = 0.0
    follows: float = 0.0
    length: float = 0.0
    boxes: float = 0.0

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be trained with, or an unknown task or loss."""
        check_numbers(asdict(self))
        check_task(self.task, self.think)
        if self.loss not in LOSSES:
            raise InputError(f"there is no loss {self.loss!r}: choose from {', '.join(LOSSES)}")
        if self.supervised_steps + self.rewarded_steps == 0:
            raise InputError("there are no steps: nothing would be trained")
        if self.rewarded_steps and self.group < 2:
            raise InputError(
                f"group is {self.group}: an answer alone is no better than its group, take 2 or more"
            )
        if self.rewarded_steps and not any(self.weights.values()):
            raise InputError("nothing is rewarded: give at least one reward a weight, such as right 1")
        if not 0.001 <= self.temperature <= 1000:
            raise InputError(f"temperature is {self.temperature}: choose a number from 0.001 to 1000")
        check_warmup(self.warmup_steps, max(self.supervised_steps, self.rewarded_steps))

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards, by name."""
        return {name: getattr(self, name) for name in REWARDS}

    @property
    def most_tokens(self) -> int:
        """Of an answer."""
        return self.max_new_tokens or (64 if self.think else 12)


@dataclass(frozen=True)
class Asked:
    """What a step is about."""

    questions: list[Question]
    rehearsed: list[Shown]


class ReasoningBatches(Dataset[Asked]):
    """Batch number `step` of a run."""

    def __init__(self, config: ReasoningConfig, pixels: int) -> None:
        self.config, self.pixels = config, pixels
        self.old = WorldRows(0.5, config.seed, pixels)

    def __len__(self) -> int:
        return self.config.supervised_steps + self.config.rewarded_steps

    def __getitem__(self, step: int) -> Asked:
        config = self.config
        count = config.rows if step < config.supervised_steps else config.prompts
        questions = [
            draw_question(
                np.random.default_rng([config.seed, STREAM, step, number]),
                config.task,
                self.pixels,
                thinks=config.think,
            )
            for number in range(count)
        ]
        old = (self.old.row(step * config.rehearsal + number) for number in range(config.rehearsal))
        return Asked(questions, [Shown(one.pictures[0], one.prefix, one.suffix) for one in old])
