"""The loop that every training run shares: steps, a log, saves, and stops of every kind.

Each run defines its own step (`Trainable`). The loop leaves in the run's folder

    state.safetensors       weights, optimizers and step, every `save_every` steps: what --resume needs
    log.csv                 losses, learning rates and metrics, every `log_every` steps
    tensorboard/            the same once more, with `log="tensorboard"`
    best-STEP.safetensors   weights, where a run is told to choose its best state (best.py)
    loss.png                the log, drawn, at the end
    config.json, ...        the checkpoint, at the end

Every file is written aside and then renamed. A run that is killed at any moment resumes from its last save,
and ends with the same weights as one that was never interrupted (on the same machine, with as many threads).

Of several processes (see `minivlm.distributed`), each computes its share of every step. The first one writes
all files, and all stop together.
"""

from __future__ import annotations

import math
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from minivlm.distributed.agreement import (
    anyone,
    as_the_first,
    check_same,
    is_first,
    together,
)
from minivlm.distributed.places import Place, gave_up, here
from minivlm.errors import InputError, ToldElsewhere
from minivlm.evaluation.waiting import Bar
from minivlm.training.best import (
    COLUMN,
    Choice,
    check_weights,
    keep_weights,
    put_back_weights,
    remove_weights,
)
from minivlm.training.events import Events, check_tensorboard
from minivlm.training.folder import LOG, PLOT, SHARDED, STATE, run_folder
from minivlm.training.interrupts import ignore_interrupts, note_interrupts
from minivlm.training.limits import MOST_AT_ONCE
from minivlm.training.log import Line, log_as_json, plot_log, read_log, write_log
from minivlm.training.state import check_config, load_state, save_state

__all__ = [
    "DEFAULT_LOOP",
    "LOG",
    "Diverged",
    "Loop",
    "Trainable",
    "in_order",
    "log_as_json",
    "read_log",
    "run_folder",
    "run_to_end",
]


PATIENCE = 600  # seconds to wait for a batch


@dataclass(frozen=True)
class Loop:
    """How a run is carried out, as opposed to what is trained. None of it decides what is learned."""

    resume: bool = False  # go on with the run in the folder
    save_every: int = 250  # steps
    log_every: int | None = None  # steps; None: as suits this kind of run
    measure_every: int | None = None  # likewise, and 0 measures nothing
    workers: int = 1  # processes that prepare batches ahead; 0 prepares them in this one
    device: torch.device | str = "cpu"
    progress: bool | None = None  # True: a bar, False: nothing, None: a bar on a terminal, else lines
    log: str = "csv"  # or "tensorboard", beside it
    shard: bool = False  # divide the weights, too, among the processes that share each step
    checkpointing: bool = False  # compute blocks twice instead of keeping what they computed
    tell: Callable[[str], object] | None = field(default=None, compare=False)  # sentences about the run

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be carried out with."""
        for name, least in (("save_every", 1), ("log_every", 1), ("measure_every", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: choose a number of steps from {least}")
        if self.log not in ("csv", "tensorboard"):
            raise InputError(f"log is {self.log!r}: choose csv or tensorboard")
        if self.log == "tensorboard":
            check_tensorboard()
        if not 0 <= self.workers <= MOST_AT_ONCE:
            raise InputError(f"workers is {self.workers}: choose a number from 0 to {MOST_AT_ONCE} here")


DEFAULT_LOOP = Loop()


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


def in_order(data: Dataset[Any], steps: Iterable[int], workers: int) -> Iterator[Any]:
    """Items of a data set, made ahead by worker processes. How many there are does not change the order.

    Raises RuntimeError: as the loader, if a worker was killed, or has delivered nothing for PATIENCE seconds.
    """
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=steps,
        num_workers=workers,  # 0: in this process
        prefetch_factor=4 if workers else None,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=ignore_interrupts,
    )
    others = active_children()
    items = iter(loader)
    started = [process for process in active_children() if process not in others]
    try:
        yield from _in_time(items, started) if started else items
    except (EOFError, ConnectionError):
        # An exchange notices a worker's end before the system reports it to PyTorch, whose handler would then
        # raise in the middle of whatever comes next, such as the removal of a lock.
        ended = wait([process.sentinel for process in started], timeout=5)
        for process in started:
            if process.sentinel in ended:
                process.join(5)
        raise
    finally:
        for process in started:  # one that is stopped could not end, and this process would wait for it
            with suppress(ProcessLookupError):
                if process.pid is not None and hasattr(signal, "SIGCONT"):  # not on Windows
                    os.kill(process.pid, signal.SIGCONT)


def _in_time(items: Iterator[Any], workers: Sequence[BaseProcess]) -> Iterator[Any]:
    """The same items; the workers are killed if one takes far longer than `PATIENCE`.

    The loader's own limit is not counted while tensors are handed over: a worker that is stopped at that
    moment would be waited for without end.
    """

    def kill() -> None:
        for process in workers:
            process.kill()

    while True:
        timer = Timer(1.5 * PATIENCE, kill)
        timer.daemon = True
        timer.start()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            timer.cancel()
        yield item


def run_to_end(run: Trainable, out: Path, loop: Loop = DEFAULT_LOOP) -> None:
    """Carry a run to its last step: from its first, or with `loop.resume` from the one saved in `out`.

    Raises:
        InputError: the run in `out` has other settings; its files are damaged or cannot be written.
        Diverged: a loss is not finite; what was saved before is untouched.
        KeyboardInterrupt: Ctrl-C. The first finishes the step and saves, the second stops at once.
    """
    log_every = run.log_every if loop.log_every is None else loop.log_every
    measure_every = run.measure_every if loop.measure_every is None else loop.measure_every
    measures = run.measures and measure_every > 0

    def is_due(every: int) -> bool:
        return run.step % every == 0 or run.step == run.total_steps

    place = here()
    folder = RunFolder(run, out, is_first(place))
    check_same(place, run.settings())
    with together(place):
        if place is not None:
            run.spread(place)
    with together(place):
        if loop.resume:
            folder.resume()
            if loop.tell is not None and (said := run.how_it_goes_on(folder.lines)):
                loop.tell(said)
        elif folder.writes:
            remove_weights(out, but=[])  # of a run that was killed before its first save
    if loop.log == "tensorboard" and folder.writes:
        folder.events = Events(out, run.step)
    bar = Bar(run.batches(), initial=run.step, total=run.total_steps, unit="step", progress=loop.progress)
    with bar, _stops_explained(folder), note_interrupts() as interrupted:
        if measures and run.starts_trained and run.step == 0:
            folder.log(bar, measure=True)
        for batch in bar:
            if folder.ran_out():
                break
            folder.unlogged.append(run.advance(batch))
            measure = measures and is_due(measure_every)
            if measure or is_due(log_every):
                folder.log(bar, measure)
            if anyone(place, interrupted()):
                folder.save()
                raise KeyboardInterrupt(f"after step {run.step} of {run.total_steps}")
            if is_due(loop.save_every) or folder.ran_out():
                folder.save()
    folder.put_back_best()
    if folder.writes or run.divides:
        run.save(out)
    if folder.writes:
        plot_log(folder.lines, out / PLOT, run.losses)


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


@contextmanager
def _stops_explained(folder: RunFolder) -> Iterator[None]:
    """Whatever stops a run says what was saved, and how to go on from there."""
    try:
        yield
    except KeyboardInterrupt as stop:
        where = str(stop) or f"in step {folder.run.step + 1} of {folder.run.total_steps}"
        raise KeyboardInterrupt(f"{where}; {folder.how_to_go_on()}") from None
    except ToldElsewhere:
        raise
    except Diverged as error:  # where going on would only diverge again
        if not folder.writes:  # the same numbers are in all processes
            raise ToldElsewhere(str(error)) from error
        kept = f"; {folder.out} keeps the state of step {folder.saved}" if folder.saved else ""
        raise type(error)(f"{error}{kept}") from error
    except InputError as error:
        raise InputError(f"{error}; {folder.how_to_go_on()}") from error
    except (RuntimeError, MemoryError, EOFError, ConnectionError) as error:
        reason = gave_up(folder.run.among, error) or _outside(error)
        if reason is None:
            raise
        raise InputError(f"{reason}; {folder.how_to_go_on()}") from error


def _outside(error: Exception) -> str | None:
    """What went wrong outside of this program, or None for an error that keeps its traceback."""
    told = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
    if isinstance(error, EOFError | ConnectionError) or told.startswith("DataLoader "):
        # A worker's end is seen at any moment, by PyTorch's handler of signals or in an exchange with it.
        advice = "if memory ran out, use fewer --workers or smaller batches"
        return f"the processes that prepare batches have stopped delivering ({told}): {advice}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in told:
        return f"memory ran out ({told}): use a smaller model, smaller batches or shorter texts"
    return None


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
