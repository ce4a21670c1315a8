"""How this program is called where a message is read: in this shell, from this folder.

A message that names a command should name one that works when it is copied. Whether `minivlm` alone does
depends on the environment being switched on; in a clone that `make` has set up, it usually is not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "minivlm"


def command(*arguments: str | Path) -> str:
    """A line to type: `command("eval", "--model", "my model")` -> `minivlm eval --model 'my model'`."""
    words = [*program(), *map(str, arguments)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def program() -> list[str]:
    """The words that start this program, the first of these that works here.

    minivlm                 PATH leads to the script of this environment
    .venv/bin/minivlm       the script lies below the current folder
    python -m minivlm       there is no script, or it is far away
    """
    scripts = Path(sysconfig.get_path("scripts"))
    found = shutil.which(NAME)
    if found is not None and _same(Path(found).resolve().parent, scripts):  # pipx leads there by a link
        return [NAME]
    if Path.cwd() in scripts.parents and shutil.which(NAME, path=str(scripts)):
        return [str(scripts.relative_to(Path.cwd()) / NAME)]
    python = Path(sys.executable)
    found = shutil.which(python.name)
    # By folder: the Pythons of several environments may be links to one and the same file.
    on_path = found is not None and _same(Path(found).parent, python.parent)
    return [python.name if on_path else str(python), "-m", NAME]


def _same(folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve()
