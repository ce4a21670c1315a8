"""How far the students are: run the notebooks that they hand in, and count the exercises that pass.

Running a notebook means running other people's code. Each notebook gets a process of its own (grading.py)
with a time limit, a memory limit, copies for a home and a working folder, and an environment without the
secrets of this one. On Linux, as far as the kernel has the means, it cannot change any file outside its
folder (landlock.py, namespace.py) or signal other processes, and what it leaves running is ended
(supervise.py). That limits accidents: endless loops, exhausted memory, a deleted folder. It is not a sandbox.
Malicious code can read any file and use any connection that the user who runs it can, fill a disk with many
files, and write the report itself, so the table is not an exam. docs/teaching.md says what holds on which
system.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import minivlm
from minivlm.checks import STILL_BLANK
from minivlm.classroom.limits import Limits
from minivlm.classroom.notebooks import exercises_of, module_of, read_notebook
from minivlm.errors import InputError

INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")  # environment variables
OWN = "mine"  # the folder of `make lab`
DEEPEST = 20  # folders below that of the class
LARGEST_FILE = 200 * 2**20  # bytes of what is copied for a notebook
RUN_ID = "MINIVLM_PROGRESS"  # the environment variable by which leftover processes are recognized
LONGEST_REPORT = 100_000  # bytes
SECONDS_TO_END = 20.0  # for what a notebook has started
SECONDS_TO_START = 300.0  # for the imports of the process, on a slow machine


@dataclass(frozen=True)
class HandedIn:
    """One notebook of one student."""

    path: Path
    student: str
    notebook: str  # "" if only the content says which one it is


@dataclass(frozen=True)
class Result:
    """What one notebook has solved. Without exercises, it could not be read, and `remark` says why."""

    student: str
    notebook: str
    passed: list[str]
    exercises: list[str]
    remark: str  # what stopped the run, or what is wrong with the first exercise tried but not solved


def find_handed_in(folder: Path) -> list[HandedIn]:
    """The notebooks of a class, sorted by student:

        folder/<student>/00_tour.ipynb     or deeper, as in folder/<student>/notebooks/00_tour.ipynb
        folder/<student>.ipynb             one notebook each

    Raises InputError: no such folder, or no notebooks in it.
    """
    found = []
    for path in sorted(_notebooks_below(folder)):
        parts = path.relative_to(folder).with_suffix("").parts
        inside = parts[1:] if parts[1:2] != ("notebooks",) else parts[2:]
        found.append(HandedIn(path, parts[0], "/".join(inside)))
    if not found:
        missing = "contains no notebooks" if folder.is_dir() else "is not a folder"
        raise InputError(
            f"{folder} {missing}: put them at {folder}/STUDENT/00_tour.ipynb, or one per student at "
            f"{folder}/STUDENT.ipynb"
        )
    return found


def find_own() -> list[HandedIn]:
    """The notebooks of one who learns alone: what `make lab` wrote into mine/, here or next to the package.

    Raises InputError: there are none.
    """
    for folder in (Path(OWN), Path(minivlm.__file__).parents[1] / OWN):
        if found := sorted((folder / "notebooks").glob("*.ipynb")):
            return [HandedIn(path, "you", path.stem) for path in found]
    raise InputError(
        f"there is no folder {OWN}/notebooks here: `make lab` in a clone writes your own copy of the course "
        "there. Or name the folder that students handed in"
    )


def _notebooks_below(folder: Path) -> list[Path]:
    """Not in hidden folders, as .ipynb_checkpoints, behind links, or deeper than `DEEPEST`."""
    found, folders = [], [(folder, 0)]
    while folders:
        place, depth = folders.pop()
        with suppress(OSError), os.scandir(place) as entries:  # somebody's folder cannot be read
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders += [(place / entry.name, depth + 1)] if depth < DEEPEST else []
                elif entry.name.endswith(".ipynb"):
                    found.append(place / entry.name)
    return found


def judge_handed_in(handed_in: HandedIn, limits: Limits) -> Result:
    """Run one notebook within limits. Whatever is wrong with it becomes a remark, not an error."""
    try:
        return _judge(handed_in, limits)
    except InputError as error:
        remark = str(error).removeprefix(f"{handed_in.path} ")
    except Exception as error:  # of one student, which must not cost the others their line
        remark = f"{type(error).__name__}: {error}"
    return Result(handed_in.student, handed_in.notebook, [], [], remark)


def _judge(handed_in: HandedIn, limits: Limits) -> Result:
    """Raises InputError: the file is not a notebook."""
    notebook = read_notebook(handed_in.path)
    module = module_of(notebook)
    if module is None:
        return Result(handed_in.student, handed_in.notebook, [], [], "it uses no checks of this course")
    exercises = exercises_of(module)
    with _scratch_folder() as scratch:
        report, ended_early = _run(handed_in.path, scratch, limits)
    said = {line.name: line for line in report}
    passed = [name for name in exercises if name in said and said[name].passed]
    found = {name: said[name].remark if name in said else "no cell defines it" for name in exercises}
    left = [name for name in exercises if name not in passed]
    # A mistake tells a teacher more than a blank, which many will have.
    left.sort(key=lambda name: (found[name] == STILL_BLANK, name not in said))
    remark = ended_early or (f"{left[0]}: {found[left[0]]}" if left else "")
    return Result(handed_in.student, handed_in.notebook or module, passed, exercises, remark)


@dataclass(frozen=True)
class _Verdict:
    """The verdict on one exercise."""

    name: str
    passed: bool
    remark: str


def _run(path: Path, scratch: Path, limits: Limits) -> tuple[list[_Verdict], str]:
    """What the process reports, and why it ended early, or ""."""
    home, work = scratch / "home", scratch / "course" / "notebooks"
    for folder in (home, work, scratch / "tmp"):
        folder.mkdir(parents=True)
    copied = shutil.copyfile(path, work / "notebook.ipynb")
    _copy_surroundings(path, scratch, limits.whole)
    run_id = secrets.token_hex(8)
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "minivlm.classroom.grading", str(copied), "--report", str(writing)]
    command += ["--folder", str(scratch)]
    command += ["--seconds", str(limits.seconds), "--memory", str(limits.memory)]
    command += ["--whole"] if limits.whole else []
    process = subprocess.Popen(
        command,
        cwd=work,
        env=_environment(scratch) | {RUN_ID: run_id},
        stdin=subprocess.PIPE,  # its end ends the process
        stdout=subprocess.DEVNULL,  # what is printed is discarded, so it may be a gigabyte
        stderr=subprocess.DEVNULL,
        pass_fds=[writing],
        start_new_session=True,
    )
    try:
        os.close(writing)
        text, late = _read(reading, limits.seconds)
    finally:
        os.close(reading)
        _end(process, run_id)
    return _understand(text, late, limits.seconds, process.returncode)


def _understand(text: str, late: bool, seconds: float, code: int) -> tuple[list[_Verdict], str]:
    """Parse a report, which may be cut off anywhere, or be written by the student's code."""
    verdicts: list[_Verdict] = []
    where = "at its start"
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            continue
        match said:
            case {"name": str(name), "passed": bool(passed), "remark": str(remark)}:
                verdicts.append(_Verdict(name, passed, remark))
            case {"cell": int(number)}:
                where = f"in cell {number}"
            case {}:
                if said == {}:
                    return verdicts, ""
    if late:
        return verdicts, f"stopped after {seconds:g} seconds, {where}: an endless loop?"
    return verdicts, f"Python ended {where} (code {code}): a crash, out of memory, or an exit?"


def _read(descriptor: int, seconds: float) -> tuple[str, bool]:
    """Read a pipe until it ends, has said too much, or is too late; also return whether it was too late.

    Time counts from the first byte: a process needs some time to import PyTorch.
    """
    text = b""
    deadline = time.monotonic() + SECONDS_TO_START
    while len(text) < LONGEST_REPORT and not text.endswith(b"\n{}\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return text.decode(errors="replace"), True
        piece = os.read(descriptor, 65536)
        if not piece:
            break
        if not text:
            deadline = time.monotonic() + seconds
        text += piece
    return text.decode(errors="replace"), False


def _environment(scratch: Path) -> dict[str, str]:
    """Environment variables of the process: none that may hold a secret."""
    packages = [path for path in sys.path if os.path.isabs(path)]  # the same minivlm, wherever it is
    return {name: os.environ[name] for name in INHERITED if name in os.environ} | {
        "HOME": str(scratch / "home"),
        "TMPDIR": str(scratch / "tmp"),
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(scratch / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(packages),
    }


def _copy_surroundings(path: Path, scratch: Path, whole: bool) -> None:
    """Copy what a notebook needs: pictures, and matplotlib's list of fonts, which takes seconds to build."""
    import matplotlib  # half a second, so only where it is needed

    for fonts in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
        shutil.copy(fonts, scratch / "home")
    course = Path(minivlm.__file__).parents[1]
    for figures in (path.absolute().parents[1] / "figures", course / "figures"):
        if whole and figures.is_dir() and not figures.is_symlink():  # which could be to everything
            with suppress(OSError, RecursionError):  # what is no file, or cannot be read, is left out
                shutil.copytree(
                    figures, scratch / "course" / "figures", symlinks=True, copy_function=_copy_file
                )
            break


def _copy_file(source: str, target: str) -> None:
    """Raises OSError: it is something else, such as a pipe, or too large."""
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise OSError(f"{source} is not an ordinary file")
    shutil.copy(source, target)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A temporary folder, removed whatever is in it: programs do that at any depth, and Python does not."""
    folder = Path(tempfile.mkdtemp(prefix="minivlm-progress-"))
    try:
        yield folder
    finally:
        if not folder.is_symlink():
            for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
                subprocess.run(
                    [*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
                )


def _end(process: subprocess.Popen[bytes], run_id: str) -> None:
    """End a process and all that it has started. Its supervisor does that, unless the notebook has ended or
    stopped the supervisor, which older kernels allow; then its group, and on Linux what names it, are killed.
    """
    assert process.stdin is not None
    process.stdin.close()
    deadline = time.monotonic() + SECONDS_TO_END
    while hasattr(os, "waitid") and time.monotonic() < deadline:
        # Without taking note of the end, after which the number might be given to another process.
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.01)
    with suppress(ProcessLookupError, PermissionError):  # macOS: there is no one left
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() >= 0:
        return
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if f"{RUN_ID}={run_id}".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)
