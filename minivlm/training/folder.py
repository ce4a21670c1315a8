"""The folder of a training run: one run works in it at a time, and replaces nothing that is not its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from minivlm.distributed.agreement import is_first, together
from minivlm.distributed.places import here
from minivlm.errors import InputError
from minivlm.files import remove_leftovers
from minivlm.training.best import NAME as BEST
from minivlm.training.log import is_log

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

STATE, LOG, PLOT, LOCK = "state.safetensors", "log.csv", "loss.png", ".lock"
SHARDED = "state.json"  # what STATE is where processes divide the weights: names a folder with their parts
# A run writes files of these names at its end, or they would stay beside its own as if they belonged to them.
CHECKPOINT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "qwen.tiktoken",
    "adapter_config.json",
    "*.safetensors", "*.safetensors.index.json", LOG, PLOT,
)  # fmt: skip

_held: set[Path] = set()  # folders of this process's runs: to the system, all of them are one


@contextmanager
def run_folder(out: Path, resume: bool) -> Iterator[None]:
    """Make the folder of a run, and keep other runs out of it to the end of the block.

    What a run that was killed while writing has left half done is removed. Of several processes, the first
    does all this for the others.

    Raises InputError: the folder cannot be made or written to; another run works in it; it holds a run and
    `resume` is not set, or the other way round; it holds a checkpoint or a file that this run would replace.
    """
    place = here()
    with ExitStack() as held:
        with together(place):
            if is_first(place):
                held.enter_context(_folder(out, resume))
        yield


@contextmanager
def _folder(out: Path, resume: bool) -> Iterator[None]:
    _check(out, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another folder") from error
    with _alone_in(out):
        _check(out, resume)  # again: another run may have ended here in between
        remove_leftovers(out)
        yield


def holds_state(out: Path) -> bool:
    """Whether there is a run to resume."""
    return any((out / name).is_file() for name in (STATE, SHARDED))


def _check(out: Path, resume: bool) -> None:
    exists = holds_state(out)
    if exists and not resume:
        raise InputError(
            f"{out} already holds a training run: add --resume to continue it, or choose another folder"
        )
    if resume and not exists:
        raise InputError(f"{out} holds no training run to resume: leave out --resume to start one")
    taken = sorted(path for pattern in CHECKPOINT for path in out.glob(pattern))
    # A run that ended before its first save has left a log and weights, which nobody needs.
    left = is_log(out / LOG)
    taken = [path for path in taken if not (left and (path.name == LOG or BEST.fullmatch(path.name)))]
    if taken and not resume:
        raise InputError(
            f"{out} already holds {taken[0].name}, which training replaces: choose another folder"
        )


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold a lock on the folder. However the process ends, the system lets go of it.

    The lock belongs to this process alone. Those that prepare batches do not inherit it, and so cannot keep
    it for the seconds in which they notice that this one was killed.
    """
    folder = out.resolve()
    taken = InputError(f"another run works in {out}: wait until it ends, or choose another folder")
    if folder in _held:
        raise taken
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written to ({error.strerror}): check its permissions, or choose another folder"
        ) from error
    try:
        if not _locked(lock):
            raise taken
        _held.add(folder)
        yield
    finally:
        if folder in _held:
            with suppress(OSError):  # somebody has deleted it; Windows deletes no open file
                (folder / LOCK).unlink()
            _held.discard(folder)
        os.close(lock)


def _locked(lock: int) -> bool:
    """Take the lock, unless another process has it or has just deleted the file."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: nothing to hold on to
        return True
    return sys.platform == "win32" or os.fstat(lock).st_nlink > 0
