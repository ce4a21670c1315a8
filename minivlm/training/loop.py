"""The loop that every training run shares: steps, a log, saves, and stops of every kind.

What a step is, a run says itself (`Trainable`). The loop leaves in the run's folder

    state.safetensors       weights, optimizers and step, every `save_every` steps: what --resume needs
    log.csv                 losses, learning rates and metrics, every `log_every` steps
    loss.png                the log, drawn, at the end
    config.json, ...        the checkpoint, at the end

Everything is written aside and renamed. A run that is killed at any moment resumes from the last save, and
ends with the same weights as one that was never interrupted (on the same machine with as many threads).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minivlm.errors import InputError
from minivlm.training.interrupts import ignore_interrupts, note_interrupts
from minivlm.training.log import Line, log_as_json, plot_log, read_log, write_log
from minivlm.training.state import load_state, save_state

__all__ = ["Diverged", "Trainable", "check_folder", "in_order", "log_as_json", "read_log", "run_to_end"]

STATE, LOG, PLOT = "state.safetensors", "log.csv", "loss.png"


class Diverged(InputError):
    """The numbers of a run are no longer finite. The weights are those before the step."""


class Trainable(ABC):
    """A training run at some step: the weights, the optimizers, and how to go one step further."""

    step: int  # steps done
    masters: nn.Module  # fp32; what the optimizers change and what is saved
    working: nn.Module  # the copy that computes, see precision.py
    optimizers: dict[str, torch.optim.Optimizer]
    losses: tuple[str, ...]  # columns of the log that are losses
    starts_trained: bool = False  # then there is something to measure before the first step

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
        """Metrics of the present weights, none where there is nothing to measure."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """The trained model so far, as a checkpoint folder."""

    @abstractmethod
    def advice(self) -> str:
        """What to try when the numbers are no longer finite."""

    def check_finite(self, what: str, value: float) -> None:
        """Raises Diverged: the value is NaN or infinite."""
        if not math.isfinite(value):
            raise Diverged(f"{what} is not a number at step {self.step + 1}: {self.advice()}")


def in_order(data: Dataset[Any], steps: Iterable[int], workers: int) -> Iterator[Any]:
    """Items of a data set, made ahead in worker processes; their number does not change the order."""
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=steps,
        num_workers=workers,  # 0: in this process
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupts,
    )
    return iter(loader)


def check_folder(out: Path, resume: bool) -> None:
    """Make the folder of a run.

    Raises InputError: it cannot be made, or it holds a run and `resume` is not set, or the other way round.
    """
    exists = (out / STATE).exists()
    if exists and not resume:
        raise InputError(
            f"{out} holds a training run already: add --resume to continue it, or choose another folder"
        )
    if resume and not exists:
        raise InputError(f"{out} holds no training run to resume: leave out --resume to start one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another folder") from error


def run_to_end(
    run: Trainable,
    out: Path,
    *,
    resume: bool,
    save_every: int,
    log_every: int,
    measure_every: int,
    progress: bool | None,
) -> None:
    """Carry a run from its first step, or with `resume` from where the one in `out` was saved, to its last.

    Args:
        measure_every: metrics for the log, and once more at the end; 0 measures nothing.
        progress: True shows a bar, False none, None only on a terminal.

    Raises:
        InputError: the run in `out` has other settings; its files are damaged or cannot be written.
        Diverged: a loss is not finite; what was saved before is untouched.
        KeyboardInterrupt: Ctrl-C. The first finishes the step and saves, the second stops at once.
    """
    lines: list[Line] = []
    unlogged: list[dict[str, float]] = []  # losses of the steps since the last line of the log
    saved = 0
    if resume:
        run.step, unlogged = load_state(out / STATE, run.masters, run.optimizers, run.settings())
        run.working.load_state_dict(run.masters.state_dict())
        saved = run.step
        log_so_far = read_log(out / LOG) if (out / LOG).exists() else []
        lines = [line for line in log_so_far if line["step"] <= run.step]

    def log(measured: bool) -> None:
        here = {**run.place(), **_means(unlogged, run.losses)}
        bar.set_postfix({name: value for name, value in here.items() if value is not None})
        lines.append({"step": run.step, **here, **_rates(run), **(_measured(run) if measured else {})})
        unlogged.clear()
        # Before the state: killed in between, the log has lines too many, which are easily left out.
        write_log(out / LOG, lines)

    def save() -> None:
        nonlocal saved
        _check_weights(run)
        save_state(out / STATE, run.step, run.masters, run.optimizers, run.settings(), unlogged)
        saved = run.step

    bar = tqdm(
        run.batches(),
        initial=run.step,
        total=run.total_steps,
        unit="step",
        disable=None if progress is None else not progress,
    )
    try:
        with note_interrupts() as interrupted:
            if measure_every and run.starts_trained and run.step == 0:
                log(measured=True)
            for batch in bar:
                unlogged.append(run.advance(batch))
                ends = run.step == run.total_steps
                measured = bool(measure_every) and (run.step % measure_every == 0 or ends)
                if run.step % log_every == 0 or measured or ends:
                    log(measured)
                if interrupted():
                    save()
                    raise KeyboardInterrupt(f"after step {run.step} of {run.total_steps}")
                if run.step % save_every == 0 or ends:
                    save()
    except KeyboardInterrupt as stop:
        where = str(stop) or f"in step {run.step + 1} of {run.total_steps}"
        raise KeyboardInterrupt(f"{where}; {_how_to_go_on(out, saved)}") from None
    except Diverged as error:
        rest = f"; {out} keeps the state of step {saved}" if saved else ""
        raise Diverged(f"{error}{rest}") from error
    except InputError as error:
        raise InputError(f"{error}; {_how_to_go_on(out, saved)}") from error
    finally:
        bar.close()
    run.save(out)
    plot_log(lines, out / PLOT, run.losses)


def _how_to_go_on(out: Path, saved: int) -> str:
    if not saved:
        return "nothing was saved yet"
    return f"the same command with --resume goes on from step {saved}, saved in {out}"


def _means(steps: Sequence[Mapping[str, float]], losses: Sequence[str]) -> dict[str, float | None]:
    """The mean of each loss over the steps that have it."""
    values = {name: [step[name] for step in steps if name in step] for name in losses}
    return {name: sum(some) / len(some) if some else None for name, some in values.items()}


def _rates(run: Trainable) -> dict[str, float | None]:
    """The learning rate of the last step by optimizer; the highest, where parts learn more slowly."""
    return {
        f"{name}_lr": max(group["lr"] for group in optimizer.param_groups) if run.step else None
        for name, optimizer in run.optimizers.items()
    }


def _measured(run: Trainable) -> dict[str, float]:
    """Metrics, taken without a trace: mode and random numbers are afterwards what they were."""
    _check_weights(run)
    training = run.masters.training
    run.masters.eval()
    with torch.random.fork_rng(devices=[]):
        metrics = run.measure()
    run.masters.train(training)
    return metrics


def _check_weights(run: Trainable) -> None:
    """Raises Diverged: a weight is NaN or infinite.

    A step too large shows in the next loss only, and the state before it must not be overwritten by then.
    """
    if not all(bool(weight.isfinite().all()) for weight in run.masters.parameters()):
        raise Diverged(f"the weights are not numbers after step {run.step}: {run.advice()}")
