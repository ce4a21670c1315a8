"""The best state of a run, by a metric that is measured on the way, and when to stop waiting for another.

The log decides: the best is the earliest line with the best value, as it is written there. So a run that was
killed and resumed comes to the same choice. Its weights lie in best-STEP.safetensors beside the state, until
there are better ones and the state on disk no longer needs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minivlm.errors import InputError
from minivlm.training.log import Line
from minivlm.training.state import load_state, save_state

COLUMN = "best step"  # of the log
METRICS = {"loss": "validation loss", "exact": "exact match", "iou": "box IoU"}  # name -> column of the log
NAME = re.compile(r"best-([0-9]+)\.safetensors")


@dataclass(frozen=True)
class Choice:
    """By which column of the log states are compared."""

    metric: str  # of METRICS
    patience: int | None = None  # measurements without a better one, after which the run ends

    @property
    def column(self) -> str:
        return METRICS[self.metric]

    def best_step(self, lines: Sequence[Line]) -> int | None:
        """The step of the best line; None: nothing has been measured."""
        measured = self._measured(lines)
        if not measured:
            return None
        sign = 1 if self.metric == "loss" else -1
        return min(measured, key=lambda one: (sign * one[1], one[0]))[0]

    def ran_out(self, lines: Sequence[Line]) -> bool:
        """Whether patience is at its end."""
        best = self.best_step(lines)
        later = [step for step, _ in self._measured(lines) if best is not None and step > best]
        return self.patience is not None and len(later) >= self.patience

    def _measured(self, lines: Sequence[Line]) -> list[tuple[int, float]]:
        # As `write_log` rounds: a resumed run reads them from there.
        return [
            (line["step"], float(f"{line[self.column]:.6g}"))
            for line in lines
            if line.get(self.column) is not None
        ]


def path_of(out: Path, step: int) -> Path:
    return out / f"best-{step}.safetensors"


def keep_weights(out: Path, step: int, masters: nn.Module) -> None:
    """Write the weights of a step. Raises InputError: as `save_state`."""
    save_state(path_of(out, step), step, masters, {}, {})


def put_back_weights(out: Path, step: int, masters: nn.Module) -> None:
    """Give the masters the weights of a step. Raises InputError: as `load_state`."""
    load_state(path_of(out, step), masters, {}, {})


def check_weights(out: Path, step: int) -> None:
    """Raises InputError: the weights of this step are gone."""
    path = path_of(out, step)
    if not path.is_file():
        raise InputError(
            f"{path} is missing, the best weights so far: put it back, or start a new run in another folder"
        )


def remove_weights(out: Path, but: Iterable[int | None]) -> None:
    """Delete the weights of all steps but these."""
    kept = set(but)
    for path in out.glob("best-*.safetensors"):
        found = NAME.fullmatch(path.name)
        if found is not None and int(found[1]) not in kept:
            path.unlink(missing_ok=True)
