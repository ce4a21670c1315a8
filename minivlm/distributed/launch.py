"""`torchrun`, started and watched from Python, as a notebook has to: with an end, whatever happens.

In a shell, one types the command by hand, reads what it says, and presses Ctrl-C. Here what it says goes to a
file, and comes back in the error if it fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO

from minivlm.distributed.processes import ProcessError

LAST = 15  # lines that an error shows
FAILED = re.compile(r"E\d{4} .*failed \(exitcode")  # where its report begins
GRACE = 60.0  # seconds for torchrun to end its processes: it waits half of them before it kills


@contextmanager
def launched(
    size: int, script: Path, *arguments: str, restarts: int = 0, timeout: float = 120.0
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script in `size` processes of one thread each. At the end of the block, wait until they end.

    Args:
        size: processes on this machine.
        script, arguments: what each of them runs.
        restarts: how often all are started again after one has failed.
        timeout: seconds for everything. Then `torchrun` is ended, and ends its processes.

    Raises ProcessError: they failed more often than that, or time ran out.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "--max-restarts", str(restarts), str(script), *arguments]
    # Builds of PyTorch for Windows come without libuv.
    settings = {"OMP_NUM_THREADS": "1"} | ({"USE_LIBUV": "0"} if sys.platform == "win32" else {})
    end = time.monotonic() + timeout
    with tempfile.TemporaryFile() as said:
        started = subprocess.Popen(
            command, env=os.environ | settings, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            yield started
            code = started.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise ProcessError(
                f"torchrun has not finished after {timeout:g} s, and was stopped\n{_end_of(said)}", 0, {}
            ) from error
        finally:
            _end(started)
        if code:
            raise ProcessError(f"torchrun ended with exit code {code}\n{_end_of(said)}", 0, {})


def _end(started: subprocess.Popen[bytes]) -> None:
    """Ask first: one that is killed at once would leave its processes behind."""
    if started.poll() is None:
        started.terminate()
        try:
            started.wait(GRACE)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _end_of(said: IO[bytes]) -> str:
    """What the processes said last. The report of `torchrun`, which comes after it, names no reason."""
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()
    of_processes = list(takewhile(lambda line: not FAILED.match(line), lines))
    return "\n".join((of_processes or lines)[-LAST:])
