"""When a run on rewards has nothing more to learn, or learns something else: three ways to collapse.

GRPO learns from differences within a group. A model that has become sure gives the same answer eight times,
and then right or wrong makes no difference any more: no loss is large, no number is infinite, and the run
would go on to its end for nothing. What happened in the last steps is part of the run's state, so that a run
that is resumed is stopped at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WINDOW = 10  # steps
WATCHED = ("reward", "accuracy", "mixed", "endless")
ALIKE = 0.02  # share of mixed groups, at most
SOLVED = 0.9  # accuracy above which groups may well be alike
ENDLESS = 0.5  # share of answers that never end
FALL = 0.15  # of accuracy, from where it began


class Watch(nn.Module):
    """The first and the last steps of a run, as buffers, which are saved with its weights."""

    first: Tensor  # [WINDOW, columns]
    last: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        empty = torch.zeros(WINDOW, len(WATCHED))
        self.register_buffer("first", empty)
        self.register_buffer("last", empty.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def note(self, step: Mapping[str, float]) -> None:
        """Remember a step."""
        line = torch.tensor([step[name] for name in WATCHED])
        count = int(self.steps)
        if count < WINDOW:
            self.first[count] = line
        self.last[count % WINDOW] = line
        self.steps += 1

    def verdict(self) -> str | None:
        """What is wrong with the last WINDOW steps, and what to do; None: nothing, or they are too few."""
        if int(self.steps) < WINDOW:
            return None
        began, now = (
            dict(zip(WATCHED, lines.mean(dim=0).tolist(), strict=True)) for lines in (self.first, self.last)
        )
        if now["endless"] > ENDLESS:
            return (
                f"{now['endless']:.0%} of the answers no longer end: give length a price, with --length 0.1, "
                "or do not pay for more of anything"
            )
        if now["accuracy"] < began["accuracy"] - FALL:
            return (
                f"the accuracy of its answers fell from {began['accuracy']:.2f} to {now['accuracy']:.2f} "
                f"while their reward went from {began['reward']:.2f} to {now['reward']:.2f}: what is "
                "rewarded is not what is wanted, or --lr is too high"
            )
        if now["mixed"] <= ALIKE and now["accuracy"] < SOLVED:
            return (
                f"the {WINDOW} last steps had hardly a group with answers of different worth, and only "
                f"{now['accuracy']:.0%} were right: the model always says the same, and nothing is left to "
                "compare. Start from more --supervised-steps, where .7 to .9 are right, or with a lower --lr"
            )
        return None
