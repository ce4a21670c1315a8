"""What a run keeps in its folder on the way: a state to resume from, a log, and its best weights.

`run_to_end` of loop.py says when each is written. Of several processes, only the first writes, unless they
divide the weights: then each writes what it holds (see `minivlm.distributed.sharded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minivlm.distributed.agreement import anyone, as_the_first, together
from minivlm.errors import InputError
from minivlm.evaluation.waiting import Bar
from minivlm.training.best import COLUMN, check_weights, keep_weights, put_back_weights, remove_weights
from minivlm.training.events import Events
from minivlm.training.folder import LOG, SHARDED, STATE
from minivlm.training.log import Line, read_log, write_log
from minivlm.training.state import check_config, load_state, save_state
from minivlm.training.trainable import Diverged, Trainable


class RunFolder:
    """What a run leaves in its folder on the way: a state to resume from, and a log."""

    def __init__(self, run: Trainable, out: Path, writes: bool = True) -> None:
        self.run, self.out = run, out
        self.writes = writes  # of several processes, only the first does
        self.saved = 0  # the step of the last state
        self.events: Events | None = None  # the log once more, for TensorBoard
        self.lines: list[Line] = []  # of the log
        self.unlogged: list[dict[str, float]] = []  # losses of the steps since the last line

    def resume(self) -> None:
        """Put the run back to where it was saved. Raises InputError: as `load_state` and `read_log`."""
        run = self.run
        self._check_kind()
        if run.divides and run.among is not None:
            from minivlm.distributed.sharded import load_shards

            (optimizer,) = run.optimizers.values()
            run.step, saved, self.unlogged = load_shards(
                self.out / SHARDED, run.masters, optimizer, run.among
            )
            check_config(self.out, saved, run.settings(), run.grows)
        else:
            run.step, self.unlogged = load_state(
                self.out / STATE, run.masters, run.optimizers, run.settings(), run.grows
            )
            run.working.load_state_dict(run.masters.state_dict())
        self.saved = run.step
        log_so_far = read_log(self.out / LOG) if (self.out / LOG).is_file() else []
        self.lines = [line for line in log_so_far if line["step"] <= run.step]
        best = self.best_step()
        if best is not None:
            check_weights(self.out, best)
            if self.writes:
                remove_weights(self.out, but=[best])

    def _check_kind(self) -> None:
        """Raises InputError: the run was saved divided and is to go on whole, or the other way round."""
        divided = (self.out / SHARDED).is_file()
        if divided != self.run.divides:
            raise InputError(
                f"{self.out} holds a run {'with' if divided else 'without'} --shard: resume it the same way"
            )

    def log(self, bar: Bar, measure: bool) -> None:
        """Write a line, and show the losses beside the bar. Raises InputError: as `write_log`."""
        run = self.run
        here = {**run.place(), **_means(self.unlogged, (*run.losses, *run.curves))}
        bar.set_postfix({name: value for name, value in here.items() if value is not None})
        metrics = as_the_first(run.among, _metrics(run)) if measure else {}
        self.lines.append({"step": run.step, **here, **_rates(run), **metrics})
        self.unlogged.clear()
        with together(run.among):
            self._write_line(measure)

    def _write_line(self, measure: bool) -> None:
        """The last line, into all that keeps lines, and its weights if they are the best so far."""
        run = self.run
        best = self.best_step()
        if measure and best is not None:
            self.lines[-1][COLUMN] = best
            if best == run.step and self.writes:
                keep_weights(self.out, best, run.masters)
                # A run that is killed now goes on from the last state, which had another best one.
                remove_weights(self.out, but=[best, self.best_step(self.saved)])
        # Before the state: a run killed in between has too many lines, which are easily left out.
        if self.writes:
            write_log(self.out / LOG, self.lines)
        if self.events is not None:
            self.events.write(self.lines[-1])

    def save(self) -> None:
        """Write the state. Raises InputError: as `save_state`. Raises Diverged: as `_check_weights`."""
        run = self.run
        _check_weights(run)
        settings, unlogged = run.settings(), self.unlogged
        with together(run.among):
            if run.divides and run.among is not None:
                from minivlm.distributed.sharded import save_shards

                (optimizer,) = run.optimizers.values()
                about = self.out / SHARDED
                save_shards(about, run.step, run.masters, optimizer, settings, unlogged, run.among)
            elif self.writes:
                save_state(self.out / STATE, run.step, run.masters, run.optimizers, settings, unlogged)
        self.saved = run.step
        if run.choice is not None and self.writes:
            remove_weights(self.out, but=[self.best_step()])

    def best_step(self, until: int | None = None) -> int | None:
        """The step of the best state, of those up to a step; None: none is chosen, or none was measured."""
        lines = [line for line in self.lines if until is None or line["step"] <= until]
        return None if self.run.choice is None else self.run.choice.best_step(lines)

    def ran_out(self) -> bool:
        """Whether the run has waited long enough for a better state."""
        return self.run.choice is not None and self.run.choice.ran_out(self.lines)

    def put_back_best(self) -> None:
        """Give the run its best weights. Raises InputError: as `load_state`."""
        best = self.best_step()
        if best is not None:
            put_back_weights(self.out, best, self.run.masters)

    def how_to_go_on(self) -> str:
        """For a message about a stop."""
        if not self.saved:
            return "nothing was saved yet"
        return f"the same command with --resume goes on from step {self.saved}, saved in {self.out}"


def _means(steps: Sequence[Mapping[str, float]], losses: Sequence[str]) -> dict[str, float | None]:
    """The mean of each loss over the steps that have it."""
    columns = {name: [step[name] for step in steps if name in step] for name in losses}
    return {name: sum(values) / len(values) if values else None for name, values in columns.items()}


def _rates(run: Trainable) -> dict[str, float | None]:
    """The learning rate of the last step by optimizer; the highest, where parts learn more slowly."""
    return {
        f"{name}_lr": max(group["lr"] for group in optimizer.param_groups) if run.step else None
        for name, optimizer in run.optimizers.items()
    }


def _metrics(run: Trainable) -> dict[str, float]:
    """What `measure` finds. It leaves no trace: mode and random numbers are put back afterwards."""
    _check_weights(run)
    training = run.masters.training
    run.masters.eval()
    with torch.random.fork_rng(devices=[]):
        metrics = run.measure()
    run.masters.train(training)
    return metrics


def _check_weights(run: Trainable) -> None:
    """Raises Diverged: a weight is NaN or infinite.

    A step that is too large shows only in the next loss. By then the state before it must not be overwritten.
    """
    weights: Iterable[Tensor] = run.masters.parameters()
    if run.divides:
        from minivlm.distributed.sharded import own_part

        weights = map(own_part, weights)
    if anyone(run.among, not all(bool(weight.isfinite().all()) for weight in weights)):
        raise Diverged(f"the weights are not numbers after step {run.step}: {run.advice()}")
