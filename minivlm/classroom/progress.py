"""How far the students are: runs the notebooks that they hand in, and counts the exercises that pass.

Running a notebook is running code that others wrote. Each gets a process of its own (grading.py) with a time
limit, a memory limit, a home and a working folder that are copies, and an environment without the secrets of
this one; on Linux it can change no file outside of its folder (landlock.py). That limits accidents: endless
loops, a full memory, a deleted folder. It is no sandbox. Code that means harm can read any file and use any
connection that the user who runs it can, start a process that outlives its group, fill a disk with many
files, and write the report itself, so the table is no exam.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import minivlm
from minivlm.checks import STILL_BLANK
from minivlm.classroom.notebooks import exercises_of, module_of, read_notebook
from minivlm.errors import InputError

KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")  # of this environment
MARK = "MINIVLM_PROGRESS"  # an environment variable by which leftover processes are known
LONGEST_REPORT = 100_000  # bytes
SECONDS_TO_START = 300.0  # for the imports of the process, on a slow machine


@dataclass(frozen=True)
class HandedIn:
    """One notebook of one student."""

    path: Path
    student: str
    notebook: str  # "" where only the content says which one it is


@dataclass(frozen=True)
class Result:
    """What one notebook has solved. No exercises: it could not be read, and `remark` says why."""

    student: str
    notebook: str
    passed: list[str]
    exercises: list[str]
    remark: str  # what stopped the run, or what is wrong with the first exercise tried and not solved


@dataclass(frozen=True)
class Limits:
    """For each notebook."""

    seconds: float = 120  # from the first cell on
    memory: int = 4 * 2**30  # bytes of address space
    whole: bool = False  # run also what is no definition, exercise or check


def find_handed_in(folder: Path) -> list[HandedIn]:
    """The notebooks of a class, in order of students:

        folder/<student>/00_tour.ipynb     or deeper, as in folder/<student>/notebooks/00_tour.ipynb
        folder/<student>.ipynb             one notebook each

    Raises InputError: no such folder, or no notebooks in it.
    """
    found = []
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(part.startswith(".") for part in parts) or not path.is_file():  # .ipynb_checkpoints
            continue
        inside = parts[1:] if parts[1:2] != ("notebooks",) else parts[2:]
        found.append(HandedIn(path, parts[0], "/".join(inside)))
    if not found:
        missing = "holds no notebooks" if folder.is_dir() else "is not a folder"
        raise InputError(
            f"{folder} {missing}: put them into {folder}/STUDENT/00_tour.ipynb, or one of each student into "
            f"{folder}/STUDENT.ipynb"
        )
    return found


def judge_handed_in(handed_in: HandedIn, limits: Limits) -> Result:
    """Run one notebook within limits. Whatever is wrong with it is a remark, and no error."""
    try:
        notebook = read_notebook(handed_in.path)
    except InputError as error:
        reason = str(error).removeprefix(f"{handed_in.path} ")
        return Result(handed_in.student, handed_in.notebook, [], [], reason)
    module = module_of(notebook)
    if module is None:
        return Result(handed_in.student, handed_in.notebook, [], [], "it uses no checks of this course")
    exercises = exercises_of(module)
    with tempfile.TemporaryDirectory(prefix="minivlm-progress-", ignore_cleanup_errors=True) as scratch:
        report, ended_early = _run(handed_in.path, Path(scratch), limits)
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
    """About one exercise."""

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
    mark = secrets.token_hex(8)
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "minivlm.classroom.grading", str(copied), "--report", str(writing)]
    command += ["--folder", str(scratch)]
    command += ["--seconds", str(limits.seconds), "--memory", str(limits.memory)]
    command += ["--whole"] if limits.whole else []
    process = subprocess.Popen(
        command,
        cwd=work,
        env=_environment(scratch) | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # what is printed goes nowhere, so it may be a gigabyte
        stderr=subprocess.DEVNULL,
        pass_fds=[writing],
        start_new_session=True,
    )
    try:
        os.close(writing)
        text, late = _read(reading, limits.seconds)
    finally:
        os.close(reading)
        _kill(process, mark)
    return _understand(text, late, limits.seconds, process.returncode)


def _understand(text: str, late: bool, seconds: float, code: int) -> tuple[list[_Verdict], str]:
    """A report as the process wrote it, which may be cut anywhere, or written by somebody else."""
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
    return verdicts, f"Python ended {where} (code {code}): a crash, no memory left, or an exit?"


def _read(descriptor: int, seconds: float) -> tuple[str, bool]:
    """What is written into a pipe until its end, too much, or too late, and whether it was too late.

    The time is counted from the first word on: a process takes some to import PyTorch.
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
    packages = [path for path in sys.path if os.path.isabs(path)]  # the same minivlm, wherever it lies
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {
        "HOME": str(scratch / "home"),
        "TMPDIR": str(scratch / "tmp"),
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(scratch / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(packages),
    }


def _copy_surroundings(path: Path, scratch: Path, whole: bool) -> None:
    """What a notebook needs: pictures, and matplotlib's list of fonts, which takes seconds to make."""
    import matplotlib  # half a second, which no other command should pay

    for fonts in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
        shutil.copy(fonts, scratch / "home")
    course = Path(minivlm.__file__).parents[1]
    for figures in (path.parents[1] / "figures", course / "figures"):
        if whole and figures.is_dir():
            shutil.copytree(figures, scratch / "course" / "figures", symlinks=True)
            break


def _kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process and all that it has started: its group, and on Linux what has left the group as well."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if f"{MARK}={mark}".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)
