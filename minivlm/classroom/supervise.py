"""End a process together with everything that it has started, wherever that went.

A program can leave its group, its session and its parent. On Linux it cannot leave a supervisor: one that has
declared itself a subreaper becomes the parent of every orphan below it (man 2 PR_SET_CHILD_SUBREAPER), and
can so find and end all of them, level by level. Elsewhere only what stays in the group is ended.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SUBREAPER = 36  # for prctl
SECONDS_BETWEEN_LOOKS = 0.05


def supervise() -> None:
    """Return in a child process. This process stays behind, and never returns.

    When the child ends, or when standard input does (whoever holds its other end has closed it, or has been
    killed), everything below this process is killed. It ends with the child's code; a signal n is 128 + n.
    Call it while there is one thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return
    code = None
    while code is None:
        ended, status = os.waitpid(-1, os.WNOHANG)  # the child, or an orphan
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
        elif select.select([0], [], [], SECONDS_BETWEEN_LOOKS)[0]:
            os.kill(child, signal.SIGKILL)
            code = -signal.SIGKILL
    _end_children()
    os._exit(code if code >= 0 else 128 - code)


def _end_children() -> None:
    """Until there are none: those of a killed child become this process's own."""
    while True:
        for process in _children():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> Iterator[int]:
    """Processes whose parent is this one. Nobody else gets their numbers before they are waited for."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state_and_parent = path.read_bytes().rpartition(b")")[2].split()
            if int(state_and_parent[1]) == os.getpid():
                yield int(path.parent.name)
