"""Starts some processes on this machine, runs one function in all of them, and returns what each found.

    >>> from minivlm import distributed
    >>> distributed.run(3, "torch.distributed:get_rank")
    [0, 1, 2]

Real processes, which talk over gloo on the CPU. For lessons, tests and measurements; training on several
devices is started by `torchrun`, and the losses do not care which of the two it was. Works from a notebook:
the function has to stand in a module, because the processes import it from there. What they print does not
reach the notebook, so a function returns what it has to say.
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
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minivlm.distributed.places import ExchangeError

GRACE = 2.0  # seconds in which the others may tell what happened to them, once one has failed
ADVICE = {  # for one that said nothing, by its exit code
    -9: "Something killed it: often the system, for want of memory.",
    1: "A script that calls `run` when it is imported does so again in each new process: put the call "
    'under `if __name__ == "__main__":`.',
}


class ProcessError(RuntimeError):
    """A process that was started failed: `rank` says which, `reports` what each of those that failed said."""

    def __init__(self, message: str, rank: int, reports: dict[int, str]) -> None:
        super().__init__(message)
        self.rank = rank
        self.reports = reports


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
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
    """Call `function(*args)` in `size` new processes that form a process group. Results in order of rank.

    Each uses one thread. The function learns its number from `torch.distributed.get_rank()`. Arguments and
    results travel pickled. No process is left behind, however this ends.

    Args:
        size: number of processes.
        function: of a module, or its name as "package.module:function".
        timeout: seconds for everything, the start of the processes included (a few seconds each).
        exchange_timeout: seconds that one process waits for another.

    Raises:
        ProcessError: one failed, or the time was over. The message names the rank that failed first.
        ValueError: the function is one that new processes cannot import, or there are to be no processes.
    """
    if size < 1:
        raise ValueError(f"{size} processes: expected 1 or more")
    task = pickle.dumps((_name_of(function), args))
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
                child.pipe.close()
    return [child.result for child in children]


def _name_of(function: Callable[..., Any] | str) -> str:
    """As "module:name". New processes import it by this name."""
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
    """How processes start. On Linux a server imports torch once, and each start after the first is quick."""
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
    with contextlib.suppress(OSError, EOFError):
        pipe.send_bytes(report)
        if not failed:  # others may still be reading what this one has sent: stay until the end of the run
            pipe.recv_bytes()
    # Not by the interpreter's end, where the group may wait for those that are gone. The connections of
    # one that failed close at once, and the others learn of it.
    sys.stdout.flush()
    os._exit(0)


# ---- in the one that waits ---------------------------------------------------------------------------------


def _collect(children: list[_Child], timeout: float) -> None:
    """Wait until all have reported. Raises ProcessError, GRACE seconds after the first failure."""
    end = time.monotonic() + timeout
    while waiting := [child for child in children if not child.ended]:
        failed = [child for child in children if child.error]
        if failed:
            end = min(end, time.monotonic() + GRACE)
        ready = wait([child.pipe for child in waiting], max(0.0, end - time.monotonic()))
        for child in waiting:
            if child.pipe in ready:
                _receive(child)
        if not ready:
            break
    failed = [child for child in children if child.error]
    late = [rank for rank, child in enumerate(children) if not child.ended]
    if not failed and not late:
        return
    if not failed:
        names = ", ".join(str(rank) for rank in late)
        message = f"after {timeout:g} s, {len(late)} of {len(children)} processes are not done: {names}"
        raise ProcessError(f"{message}. They were stopped; allow more time with `timeout`", late[0], {})
    # The one that failed by itself comes before those that waited for it.
    first = min(failed, key=lambda child: child.follows)
    rank = children.index(first)
    raise ProcessError(
        f"process {rank} of {len(children)} failed: {first.error}\n{first.details}".rstrip(),
        rank,
        {number: child.error for number, child in enumerate(children) if child.error},
    )


def _receive(child: _Child) -> None:
    """What a process reports; one that says nothing has died."""
    child.ended = True
    try:
        kind, *content = pickle.loads(child.pipe.recv_bytes())
    except EOFError:
        child.process.join(GRACE)
        code = child.process.exitcode
        child.error = f"it ended with exit code {code} and reported nothing"
        child.details = ADVICE.get(code or 0, "")
        return
    if kind == "result":
        child.result = content[0]
    else:
        child.error, child.details, child.follows = content
