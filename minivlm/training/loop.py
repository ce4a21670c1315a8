"""The loop that every training run shares: steps, a log, saves, and stops of every kind.

Each run defines its own step (`Trainable`). The loop leaves in the run's folder (kept.py)

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

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from minivlm.distributed.agreement import anyone, check_same, is_first, together
from minivlm.distributed.places import gave_up, here
from minivlm.errors import InputError, ToldElsewhere
from minivlm.evaluation.waiting import Bar
from minivlm.training.best import remove_weights
from minivlm.training.events import Events, check_tensorboard
from minivlm.training.folder import PLOT
from minivlm.training.interrupts import ignore_interrupts, note_interrupts
from minivlm.training.kept import RunFolder
from minivlm.training.limits import MOST_AT_ONCE
from minivlm.training.log import plot_log
from minivlm.training.trainable import Diverged, Trainable

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


def in_order(data: Dataset[Any], steps: Iterable[int], workers: int) -> Iterator[Any]:
    """Items of a data set, made ahead by worker processes. How many there are does not change the order.

    Raises RuntimeError: as the loader, if a worker was killed, or has delivered nothing for PATIENCE seconds.
    """
    items = _in_order(data, steps, workers)
    held = weakref.ref(items)

    def close() -> None:
        if (left := held()) is not None:
            left.close()

    # A program may end while somebody still holds the items. Then it would wait for workers that nobody has
    # told to end, and that ignore the signal by which it would be done.
    atexit.register(close)
    return items


def _in_order(data: Dataset[Any], steps: Iterable[int], workers: int) -> Generator[Any, None, None]:
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
