"""What each kind of training run defines: how to go one step further, and what has to be kept of it.

`run_to_end` of loop.py carries such a run to its end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivlm.distributed.places import Place
from minivlm.errors import InputError
from minivlm.training.best import Choice
from minivlm.training.log import Line


class Diverged(InputError):
    """The numbers of a run are no longer finite. The weights are those before the step."""


class Trainable(ABC):
    """A training run at some step: the weights, the optimizers, and how to go one step further."""

    step: int  # steps done
    masters: nn.Module  # fp32; what the optimizers change and what is saved
    working: nn.Module  # the copy that computes, see precision.py
    optimizers: dict[str, torch.optim.Optimizer]
    losses: tuple[str, ...]  # columns of the log that are losses
    curves: tuple[str, ...] = ()  # other numbers of every step, of which the log has the means
    log_every: int = 50  # steps, where the loop does not say
    measure_every: int = 500  # likewise
    measures: bool = True  # whether there is something to measure on
    starts_trained: bool = False  # then it is worth measuring before the first step
    choice: Choice | None = None  # how its best state is chosen; None: it ends with its last one
    grows: Mapping[str, Any] = {}  # settings that may be larger when it is resumed, with their defaults
    among: Place | None = None  # this process's place among those that share each step
    divides: bool = False  # whether these divide the weights as well, see `minivlm.distributed.sharded`

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Where the run ends."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Everything that has to be the same when the run is resumed."""

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """Where the last step was, for the log: the stage or the epoch."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """What `advance` takes, from the present step to the last."""

    @abstractmethod
    def advance(self, batch: Any) -> dict[str, float]:
        """One step of optimization. Returns the losses. Raises Diverged: one of them is not finite."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Metrics of the present weights; asked for only where `measures` is true."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """The trained model so far, as a checkpoint folder."""

    @abstractmethod
    def advice(self) -> str:
        """What to try when the numbers are no longer finite."""

    def spread(self, among: Place) -> None:
        """From now on, compute only this process's share of each step.

        Raises InputError: this kind of run is trained by one process, or there is too little to share.
        """
        raise InputError(f"this run is trained by one process, and {among.size} were started: start one")

    def how_it_goes_on(self, lines: Sequence[Line]) -> str | None:
        """A sentence about a run that is resumed with this log, if there is something to say."""
        return None

    def check_finite(self, what: str, value: float) -> None:
        """Raises Diverged: the value is NaN or infinite."""
        if not math.isfinite(value):
            raise Diverged(f"{what} is not a number at step {self.step + 1}: {self.advice()}")
