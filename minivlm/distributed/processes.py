"""Start processes on this machine, run one function in all of them, and return each one's result.

    >>> from minivlm import distributed
    >>> distributed.run(3, "torch.distributed:get_rank")
    [0, 1, 2]

These are real processes that communicate over gloo on the CPU, for lessons, tests and measurements. Training
on several devices is started by `torchrun`; to the losses it makes no difference. `run` works from a
notebook, but the function must be in a module, because the processes import it from there. What they print
does not reach the notebook, so a function returns what it has to say.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from minivlm.distributed.places import ExchangeError

GRACE = 2.0  # seconds for the others to report what happened to them, once one has failed
ADVICE = {  # for a process that reported nothing, by exit code
    -9: "Something killed it, often the system because memory ran out.",
    1: "A script that calls `run` when it is imported does so again in each new process: put the call "
    'under `if __name__ == "__main__":`.',
}


class ProcessError(RuntimeError):
    """A started process failed: `rank` says which, and `reports` has the error of each that failed."""

    def __init__(self, message: str, rank: int, reports: dict[int, str]) -> None:
        super().__init__(message)
        self.rank = rank
        self.reports = reports


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    reader: Thread | None = None
    report: bytes | None = None  # pickled
    result: Any = None
    ended: bool = False
    error: str | None = None  # the last line, if it failed
    details: str = ""
    follows: bool = False  # failed because another one did


def run(
    size: int,
    function: Callable[..., Any] | str,
    *args: Any,
    timeout: float = 120.0,
    exchange_timeout: float = 30.0,
) -> list[Any]:
    """Call `function(*args)` in `size` new processes that form a process group; results in order of rank.

    Each process uses one thread. The function gets its rank from `torch.distributed.get_rank()`. Arguments
    and results are pickled. No process is left behind, however this ends: if this process is killed, the
    others notice and end.

    Args:
        size: number of processes.
        function: one defined in a module, or its name as "package.module:function".
        timeout: seconds for everything, including the start of the processes (a few seconds each).
        exchange_timeout: seconds that one process waits for another.

    Raises:
        ProcessError: a process failed, its result cannot be read here, or time ran out. The message names the
            rank that failed first.
        ValueError: new processes cannot import the function, arguments cannot be pickled, or `size` is less
            than 1.
    """
    if size < 1:
        raise ValueError(f"{size} processes: expected 1 or more")
    name = _name_of(function)
    try:
        task = pickle.dumps((name, args))
    except Exception as error:  # an object may raise anything when it is pickled
        raise ValueError(
            f"the arguments of {name} cannot be sent to other processes ({error}): pass what can be pickled"
        ) from error
    context = _context()
    children: list[_Child] = []
    with tempfile.TemporaryDirectory(prefix="minivlm-", ignore_cleanup_errors=True) as folder:
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (theirs, Path(folder) / "meeting", rank, size, exchange_timeout, task)
                process = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
                children.append(_Child(process, ours))
                process.start()
                theirs.close()
            _collect(children, timeout)
        finally:
            for child in children:
                if child.process.pid is not None:
                    child.process.kill()
                    child.process.join()
                if child.reader is not None:
                    child.reader.join(GRACE)  # it sees that the process is gone
                child.pipe.close()
    return [child.result for child in children]


def _name_of(function: Callable[..., Any] | str) -> str:
    """The name by which new processes import a function: "module:name"."""
    if not isinstance(function, str):
        function = f"{function.__module__}:{function.__qualname__}"
    module, _, name = function.partition(":")
    if module == "__main__":
        main = sys.modules["__main__"]
        file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
        module = spec.name if spec else Path(file).stem if file else module  # a script, by its name
    if not name or module == "__main__" or "<" in name:
        raise ValueError(
            f"{function} cannot be imported by a new process: "
            'expected a function of a module, or its name as "package.module:function". '
            "Put the function into a .py file and import it from there"
        )
    return f"{module}:{name}"


def _context() -> BaseContext:
    """How processes start. On Linux a server imports torch once, so that starts after the first are quick."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


# ---- in the new process ------------------------------------------------------------------------------------


def _work(
    pipe: Connection, meeting: Path, rank: int, size: int, exchange_timeout: float, task: bytes
) -> None:
    """Join the group, call the function, report."""
    parent = Thread(target=_end_with, args=(pipe,), daemon=True)
    parent.start()
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=meeting.as_uri(),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=exchange_timeout),
        )
        name, args = pickle.loads(task)
        module, _, path = name.partition(":")
        function: Any = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
        report = pickle.dumps(("result", function(*args)))
        failed = False
    except BaseException as error:
        told = traceback.format_exception_only(error)[-1].strip()
        report = pickle.dumps(("error", told, traceback.format_exc(), isinstance(error, ExchangeError)))
        failed = True
    with contextlib.suppress(OSError):
        pipe.send_bytes(report)
        if not failed:  # others may still be reading what this one has sent: stay until the end of the run
            parent.join()
    # Skip the interpreter's shutdown, where the group may wait for processes that are gone. The connections
    # of a failed process close at once, and the others notice.
    sys.stdout.flush()
    os._exit(0)


def _end_with(pipe: Connection) -> None:
    """End this process when the one that waits closes the connection, at the latest when it is killed."""
    with contextlib.suppress(OSError, EOFError):
        pipe.recv_bytes()  # nothing is ever sent this way
    os._exit(0)


# ---- in the process that waits -----------------------------------------------------------------------------


def _collect(children: list[_Child], timeout: float) -> None:
    """Wait until all have reported. Raises ProcessError, GRACE seconds after the first failure."""
    # A process may be stopped in the middle of its report. Only the thread that reads it waits for the rest.
    ended: SimpleQueue[_Child] = SimpleQueue()
    for child in children:
        child.reader = Thread(target=_receive, args=(child, ended), daemon=True)
        child.reader.start()
    end = time.monotonic() + timeout
    for _ in children:
        try:
            child = ended.get(timeout=max(0.0, end - time.monotonic()))
        except Empty:
            break
        _understand(child)
        if child.error:
            end = min(end, time.monotonic() + GRACE)
    failed = [child for child in children if child.error]
    late = [rank for rank, child in enumerate(children) if not child.ended]
    if not failed and not late:
        return
    if not failed:
        names = ", ".join(str(rank) for rank in late)
        message = f"after {timeout:g} s, {len(late)} of {len(children)} processes have not finished: {names}"
        raise ProcessError(f"{message}. They were stopped; allow more time with `timeout`", late[0], {})
    # A process that failed by itself comes before those that waited for it.
    first = min(failed, key=lambda child: child.follows)
    rank = children.index(first)
    raise ProcessError(
        f"process {rank} of {len(children)} failed: {first.error}\n{first.details}".rstrip(),
        rank,
        {number: child.error for number, child in enumerate(children) if child.error},
    )


def _receive(child: _Child, ended: SimpleQueue[_Child]) -> None:
    """Wait for the report of a process, in a thread of its own."""
    with contextlib.suppress(OSError, EOFError):  # it has died, perhaps in the middle
        child.report = child.pipe.recv_bytes()
    ended.put(child)


def _understand(child: _Child) -> None:
    """Read the report of a process; one that reports nothing has died."""
    child.ended = True
    if child.report is None:
        child.process.join(GRACE)
        code = child.process.exitcode
        child.error = f"it ended with exit code {code} and reported nothing"
        child.details = ADVICE.get(code or 0, "")
        return
    try:
        kind, *content = pickle.loads(child.report)
    except Exception as error:  # a class that this process cannot import, or anything that its code raises
        child.error = f"its result cannot be read here: {type(error).__name__}: {error}"
        child.details = "Return tensors, numbers and text, or objects of classes that both processes import."
        return
    if kind == "result":
        child.result = content[0]
    else:
        child.error, child.details, child.follows = content
