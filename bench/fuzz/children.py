"""A command of `minivlm` in a child process that shares the imports of this one, and so starts at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import minivlm.cli


def start(words: Sequence[str], said: Path, folder: Path | None = None) -> int:
    """Start a command in a group of its own; returns the number of the process.

    Args:
        said: a file for all that it prints.
        folder: where it runs; None: here.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(folder or ".")
        sys.argv = ["minivlm", *words]
        code = minivlm.cli.main(words)
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
