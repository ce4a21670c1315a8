"""Counting what students have solved: correct tables, whatever any of the notebooks does.

Every notebook is judged in a process of its own, which takes about four seconds to start. Most students here
therefore do several things at once, in different exercises.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from notebooks_and_sources import ROOT

import minivlm.classroom.progress
from minivlm.checks import STILL_BLANK
from minivlm.classroom import landlock
from minivlm.classroom.notebooks import exercises_of, module_of, read_notebook
from minivlm.classroom.progress import (
    HandedIn,
    Limits,
    Result,
    _copy_surroundings,
    _understand,
    _Verdict,
    find_handed_in,
    judge_handed_in,
)
from minivlm.classroom.workshop import student_copy
from minivlm.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="minivlm progress needs limits on processes")

COUNT = (
    "def patch_count(height, width, patch_size):\n    return (height // patch_size) * (width // patch_size)"
)
UNPATCH = """\
def unpatchify(patches, rows, columns):
    P = math.isqrt(patches.shape[2] // 3)
    x = patches.reshape(-1, rows, columns, 3, P, P).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, 3, rows * P, columns * P)"""
CLASS_TOKEN = """\
def add_class_token(patches, class_token, positions):
    return torch.cat([class_token.expand(len(patches), -1, -1), patches], dim=1) + positions"""
FIRST = "import math\nimport torch\nfrom minivlm import checks"
OTHERS = (
    "def first_pixel(cut, size, P):\n"
    "    first = int(cut(torch.arange(3 * size**2).view(1, 3, size, size), P)[0, 0, 0])\n"
    "    return first // size % size, first % size",
    "def notices():\n"
    "    return {name: name[:3] in ('mlp', 'att') and '+' in name for name in checks.patches.SHUFFLE}",
    "def picture_to_tokens(x, w, b, p):\n    return F.conv2d(x, w, b, stride=w.shape[-1]).flatten(2).mT + p",
)
CATCH_UP = "patch_count = checks.patches.solutions.patch_count"
LIMITS = Limits(seconds=60)


def hand_in(path: Path, *sources: str, first: str = FIRST) -> Path:
    """A notebook about patches with these cells."""
    cells = [new_code_cell(source) for source in (first, *sources, "checks.patches.patch_count(patch_count)")]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


def result_of(path: Path, limits: Limits = LIMITS) -> Result:
    return judge_handed_in(HandedIn(path, "ada", "01"), limits)


# The right numbers


@pytest.mark.parametrize("name", ["02_clip_and_siglip", "10_contrastive_training"])
def test_solved_notebooks_of_the_course_pass(name: str) -> None:
    """Two of them: one whose exercises use what it builds, and one that trains for minutes if run whole."""
    result = result_of(ROOT / "notebooks" / f"{name}.ipynb")
    assert len(result.exercises) >= 3
    assert result.passed == result.exercises
    assert result.remark == ""


def test_blank_exercises_do_not_pass(tmp_path: Path) -> None:
    original = read_notebook(ROOT / "notebooks" / "00_tour.ipynb")
    nbformat.write(student_copy(original), tmp_path / "blank.ipynb")
    result = result_of(tmp_path / "blank.ipynb")
    tour = ["ask", "sequence_length", "broken_step", "to_pixels", "predictions"]
    assert (result.passed, result.exercises) == ([], tour)
    assert result.remark.startswith("ask: the exercise is still blank")


def test_a_mistake_is_named_before_a_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hand_in(tmp_path / "ada.ipynb")
    wrong = {"unpatchify": STILL_BLANK, "add_class_token": "its shape is wrong"}
    verdicts = [_Verdict(name, False, remark) for name, remark in wrong.items()]
    for said, ended, remark in (
        (verdicts, "", "add_class_token: its shape is wrong"),
        (verdicts[:1], "", "patch_count: no cell defines it"),
        (verdicts, "stopped after 5 seconds", "stopped after 5 seconds"),
    ):
        monkeypatch.setattr(minivlm.classroom.progress, "_run", lambda *_, answer=(said, ended): answer)
        assert result_of(path).remark == remark


def test_what_counts_as_an_answer(tmp_path: Path) -> None:
    path = hand_in(
        tmp_path / "ada.ipynb",
        "%matplotlib inline\nEPS = -1e-6\nraise RuntimeError",  # not run, except for the constant
        "def product(a, b):\n    return int(a * b + EPS - EPS)",
        "%time\ndef patch_count(h, w, p):\n    return product(h // p, w // p)",
        CATCH_UP,
        "from minivlm.checks.patches import solutions\nunpatchify = solutions.unpatchify",  # no answer
        "this is no Python",
        "add_class_token = lambda x, t, p: x\nraise SystemExit",  # wrong
        "def resize_positions(table, new_side):\n    return undefined",
        "checks.patches.resize_positions = print",  # a check of its own would pass
    )
    result = result_of(path)
    assert result.passed == ["patch_count"]
    assert result.remark.startswith("add_class_token: "), "a wrong answer is named before one that is missing"


def indented(source: str) -> str:
    return "    " + source.replace("\n", "\n    ")


RESIZE = "def resize_positions(*given):\n    return checks.patches.solutions.resize_positions(*given)"


def test_how_a_cell_is_written_does_not_matter(tmp_path: Path) -> None:
    path = hand_in(
        tmp_path / "ada.ipynb",
        "try:\n    import torch.nn.functional as F\nexcept ImportError:\n    F = None",
        f"%%capture\n%%time\n{COUNT}\n# harder than checks.patches.solutions.patch_count",
        f"!echo hello\n%matplotlib inline\n%autosave 60\nif True:\n{indented(UNPATCH)}",
        *OTHERS,
        "%time add_class_token = lambda x, t, p: torch.cat([t.expand(len(x), -1, -1), x], dim=1) + p",
        "def resize_positions(table, new_side):\n    return table",
        "resize_positions = checks.patches.solutions.resize_positions",
        "# a second try, below the solution\n"
        "def resize_positions(table, side):\n"
        "    old = math.isqrt(len(table))\n"
        "    grid = F.interpolate(table.T.reshape(1, -1, old, old), size=(side, side), mode='bilinear')\n"
        "    return grid[0].flatten(1).T",
        first=f"%%time\n{FIRST}",
    )
    result = result_of(path)
    assert result.passed == result.exercises
    assert result.remark == ""


def test_solutions_of_the_package_are_no_answers(tmp_path: Path) -> None:
    path = hand_in(
        tmp_path / "ada.ipynb",
        f"%%timeit -n1 -r1\n{COUNT}",  # in Jupyter, too, its check finds no such name
        "from minivlm.checks.patches import solutions as ready\nunpatchify = ready.unpatchify",
        f"# minivlm/vision/pixels.py\n{CLASS_TOKEN}",  # the course's own notebooks show the package's code
        f"%%time\n{RESIZE}",
    )
    result = result_of(path)
    assert result.passed == []
    assert result.remark == "patch_count: its cell runs, but keeps nothing: remove its magic, as %%timeit"


def test_the_answer_is_not_what_the_catch_up_cell_binds(tmp_path: Path) -> None:
    wrong = "def patch_count(h, w, p):\n    return h // p"
    result = result_of(hand_in(tmp_path / "ada.ipynb", wrong, CATCH_UP, UNPATCH))
    assert result.passed == ["unpatchify"]
    assert result.remark.startswith("patch_count: ")
    assert "one row" in result.remark


def test_whole_runs_what_is_no_definition(tmp_path: Path) -> None:
    path = hand_in(tmp_path / "ada.ipynb", "two = len('ab')", COUNT.replace("return", "return two // 2 *"))
    quick = result_of(path)
    assert quick.passed == []
    assert "name 'two' is not defined" in quick.remark
    assert result_of(path, Limits(seconds=60, whole=True)).passed == ["patch_count"]


# Whatever a notebook does


def test_endless_loops_and_a_gigabyte_do_not_keep_the_others_from_counting(tmp_path: Path) -> None:
    path = hand_in(
        tmp_path / "ada.ipynb",
        COUNT.replace("return", "while True: pass\n    return"),
        UNPATCH + "\nfor i in range(100): print('x' * 10**7)",
        CLASS_TOKEN + "\nwhile True: pass",
        "def resize_positions(table, new_side):\n    return bytearray(40 * 2**30)",
    )
    result = result_of(path, Limits(seconds=20))  # 5 for each cell
    assert result.passed == ["unpatchify", "add_class_token"]
    assert "patch_count: your code stops with TimeoutError: more than 5 seconds" in result.remark


def test_a_loop_that_cannot_be_interrupted_ends_at_the_limit(tmp_path: Path) -> None:
    stubborn = "while True:\n    try:\n        time.sleep(1)\n    except BaseException:\n        pass"
    path = hand_in(tmp_path / "ada.ipynb", "import time\n" + COUNT, CATCH_UP, UNPATCH + "\n" + stubborn)
    started = time.monotonic()
    result = result_of(path, Limits(seconds=8))
    assert time.monotonic() - started > 8
    assert result.passed == ["patch_count"]
    assert result.remark == "stopped after 8 seconds, in cell 4: an endless loop?"


def test_files_are_deleted_in_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("HOME", str(tmp_path))
    harm = """
import os, shutil, subprocess
from pathlib import Path
assert "MY_SECRET_TOKEN" not in os.environ
loose = subprocess.Popen(["sleep", "4242"], start_new_session=True)
gone = os.fork()
if gone == 0:  # whose parent will have ended, and without what names it
    os.setsid()
    subprocess.Popen(["sleep", "4243"], start_new_session=True, env={})
    os._exit(0)
for folder in (Path.home(), Path(".."), Path(os.environ["TMPDIR"])):
    shutil.rmtree(folder.resolve())
try:
    Path(os.environ["TMPDIR"]).with_name("large").write_bytes(bytes(300 * 2**20))
except OSError:
    print("too large")
else:
    raise ValueError
"""
    path = hand_in(tmp_path / "class/ada/01_patches.ipynb", COUNT + harm, CATCH_UP, CLASS_TOKEN)
    (tmp_path / "class/ada/notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = result_of(path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert result.passed == ["patch_count", "add_class_token"]
    left = {b"sleep\x004242\x00", *([b"sleep\x004243\x00"] if sys.platform == "linux" else [])}
    assert not left.intersection(running()), "a process is left"


@pytest.mark.skipif(not landlock.version(), reason="needs Linux with Landlock")
def test_files_elsewhere_stay(tmp_path: Path) -> None:
    harm = f"""
import shutil
from pathlib import Path
shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
for path in Path({str(tmp_path)!r}).rglob("*"):
    try:
        path.write_text("gone")
    except OSError:
        pass
print(open("/dev/null", "w"), Path("mine").write_text("in its own folder"))
"""
    path = hand_in(tmp_path / "class/ada/01_patches.ipynb", COUNT + harm, CATCH_UP)
    (tmp_path / "class/ada/notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert result_of(path).passed == ["patch_count"]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(landlock.version() < 6, reason="needs Landlock 6, in Linux 6.12 and later")
def test_the_others_cannot_be_ended(tmp_path: Path) -> None:
    """Only whether it would be allowed is tried: signal 0 is delivered to nobody."""
    harm = f"""
import os
for process in ({os.getpid()}, os.getppid()):
    try:
        os.kill(process, 0)
    except PermissionError:
        continue
    raise SystemExit
"""
    path = hand_in(tmp_path / "ada.ipynb", harm + COUNT)
    assert result_of(path).passed == ["patch_count"]


def test_dates_and_modes_elsewhere_stay(tmp_path: Path) -> None:
    """Where the system allows a namespace; test_namespace.py has the details."""
    (tmp_path / "own").mkdir()
    enter = "import sys; from pathlib import Path; from minivlm.classroom import namespace; "
    enter += "sys.exit(not namespace.enter(Path(sys.argv[1])))"
    if subprocess.run([sys.executable, "-c", enter, str(tmp_path / "own")], check=False).returncode != 0:
        pytest.skip("this system allows no namespaces")
    notes = tmp_path / "notes.txt"
    notes.touch()
    harm = f"""
import os
for change in (lambda p: os.chmod(p, 0o600), os.utime):
    try:
        change({str(notes)!r})
    except OSError:
        continue
    raise SystemExit
assert os.listdir("/dev/shm") == []
"""
    path = hand_in(tmp_path / "ada.ipynb", harm + COUNT)
    assert result_of(path).passed == ["patch_count"]


def test_a_chain_of_folders_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    harm = """
import os, tempfile
os.chmod(tempfile.mkdtemp(dir="."), 0)
for _ in range(3000):
    os.mkdir("another-folder")
    os.chdir("another-folder")
"""
    assert result_of(hand_in(tmp_path / "ada.ipynb", COUNT + harm, CATCH_UP)).passed == ["patch_count"]
    assert os.listdir(tmp_path / "scratch") == []


def test_whatever_lies_beside_a_notebook(tmp_path: Path) -> None:
    """`--whole` copies the figures of a student: those that are ordinary files."""
    figures = tmp_path / "class/ada/figures"
    (figures / "folder").mkdir(parents=True)
    (figures / "folder/map.png").write_bytes(b"map")
    (figures / "link.png").symlink_to("/dev/zero")
    os.mkfifo(figures / "pipe.png")
    with (figures / "huge.png").open("wb") as file:
        file.truncate(10**12)
    (tmp_path / "scratch/home").mkdir(parents=True)
    path = tmp_path / "class/ada/notebooks/00_tour.ipynb"
    _copy_surroundings(path, tmp_path / "scratch", whole=True)
    copied = tmp_path / "scratch/course/figures"
    assert sorted(os.listdir(copied)) == ["folder", "link.png"]
    assert (copied / "link.png").is_symlink()
    assert (copied / "folder/map.png").read_bytes() == b"map"

    (tmp_path / "class/ben").mkdir()
    (tmp_path / "all/secret").mkdir(parents=True)
    (tmp_path / "class/ben/figures").symlink_to(tmp_path / "all")
    (tmp_path / "other/home").mkdir(parents=True)
    _copy_surroundings(tmp_path / "class/ben/notebooks/00_tour.ipynb", tmp_path / "other", whole=True)
    assert not (tmp_path / "other/course/figures/secret").exists()


def test_a_notebook_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    _copy_surroundings(Path("ada.ipynb"), tmp_path, whole=False)


@pytest.mark.parametrize("error", [RecursionError("too deep"), OSError(28, "No space left"), KeyError("x")])
def test_any_error_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(minivlm.classroom.progress, "_run", fail)
    result = result_of(hand_in(tmp_path / "ada.ipynb", COUNT))
    assert (result.student, result.passed, result.exercises) == ("ada", [], [])
    assert result.remark == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("option", "number", "message"),
    [
        ("--seconds", "3", "3 seconds for a notebook: give it from 4 to 86400"),
        ("--seconds", "9" * 400, "seconds for a notebook: give it from 4 to 86400"),
        ("--memory", "1", "1 GB of memory for a notebook: give it from 2 to 1024"),
        ("--memory", "1025", "1025 GB of memory for a notebook: give it from 2 to 1024"),
        ("--memory", "9" * 400, "GB of memory for a notebook: give it from 2 to 1024"),
    ],
)
def test_limits_have_bounds(
    tmp_path: Path, option: str, number: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hand_in(tmp_path / "ada.ipynb", COUNT)
    assert main(["progress", str(tmp_path), "--yes", option, number]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_the_smallest_limits_suffice(tmp_path: Path) -> None:
    path = hand_in(tmp_path / "ada.ipynb", COUNT)
    assert result_of(path, Limits(seconds=4, memory=2 * 2**30)).passed == ["patch_count"]


def running() -> list[bytes]:
    """Command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(path.read_bytes())
    return found


@pytest.mark.parametrize("end", ["os._exit(0)", "os.abort()"])
def test_a_process_that_ends_in_the_middle(tmp_path: Path, end: str) -> None:
    path = hand_in(tmp_path / "ada.ipynb", "import os\n" + COUNT, CATCH_UP, UNPATCH + f"\n{end}")
    result = result_of(path)
    assert result.passed == ["patch_count"]
    assert result.remark.startswith("Python ended in cell 4 (code ")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        '{"name": 3, "passed": true, "remark": ""}',
        '{"name": "x"}',
        "[" * 99999,
        '{"cell": {}}',
    ],
)
def test_reports_are_not_trusted(text: str) -> None:
    good = '{"name": "ask", "passed": true, "remark": ""}'
    verdicts, end = _understand(f"{good}\n{text}\n", False, 5, 1)
    assert [verdict.name for verdict in verdicts] == ["ask"]
    assert end.startswith("Python ended")
    assert _understand(f"{text}\n{good}\n{{}}\n", False, 5, 0) == (verdicts, "")


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (b"", "is not JSON"),
        (b"no", "is not JSON"),
        ("[]".encode("utf-16"), "is text in UTF-16"),
        (gzip.compress(b"{}", mtime=0), "is a gzip file, not a notebook: unpack it"),
        (b"PK\x03\x04\x14\x00", "is a zip file, not a notebook: unpack it"),
        (bytes(range(128, 256)), "is not text in UTF-8"),
        (b"\xef\xbb\xbf[1]", "is JSON, but not a notebook"),
        (b"[1]", "is JSON, but not a notebook"),
        (b'{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "is JSON, but not a notebook"),
        (b'{"cells": [], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "it uses no checks"),
        (b"[" * 100_000, "is nested too deep"),
    ],
)
def test_what_is_no_notebook_is_a_remark(tmp_path: Path, content: bytes, remark: str) -> None:
    (tmp_path / "ada.ipynb").write_bytes(content)
    result = result_of(tmp_path / "ada.ipynb")
    assert (result.passed, result.exercises) == ([], [])
    assert remark in result.remark


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "ada.ipynb").open("wb") as file:
        file.truncate(10**9)
    assert "larger than 50 MB" in result_of(tmp_path / "ada.ipynb").remark


# Folders and the command


def test_both_layouts(tmp_path: Path) -> None:
    for name in (
        "ben/notebooks/02_clip_and_siglip.ipynb",
        "ada/00_tour.ipynb",
        "ada/.ipynb_checkpoints/00_tour-checkpoint.ipynb",
        "ada/week 1/01_patches.ipynb",
        "cleo.ipynb",
        "ada/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [(one.student, one.notebook) for one in find_handed_in(tmp_path)]
    assert found == [
        ("ada", "00_tour"),
        ("ada", "week 1/01_patches"),
        ("ben", "02_clip_and_siglip"),
        ("cleo", ""),
    ]


def test_odd_folders_cost_nobody_else(tmp_path: Path) -> None:
    """A chain of folders that is too long for Python, a pipe, and a link to nothing."""
    os.mkfifo(tmp_path / "ada.ipynb")
    (tmp_path / "ben.ipynb").symlink_to("nowhere")
    (tmp_path / "cleo").symlink_to("/")
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("chain", dir_fd=place)
        deeper = os.open("chain", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = deeper
    os.close(place)
    try:
        found = find_handed_in(tmp_path)
    finally:  # pytest's own cleaning up would not manage
        subprocess.run(["rm", "-rf", str(tmp_path / "chain")], check=True)
    assert [one.student for one in found] == ["ada", "ben"]
    remarks = [judge_handed_in(one, LIMITS).remark for one in found]
    assert remarks == [
        "is not an ordinary file: hand in the notebook itself",
        "cannot be read: No such file or directory",
    ]


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_folders_without_notebooks_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty/.ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "empty/.ipynb_checkpoints/x.ipynb").touch()
    (tmp_path / "file").touch()
    assert main(["progress", str(tmp_path / name), "--yes"]) == 2
    assert (
        f"{name} {'contains no notebooks' if name == 'empty' else 'is not a folder'}"
        in capsys.readouterr().err
    )


def test_nothing_is_run_without_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_in(tmp_path / "ada.ipynb", COUNT)
    monkeypatch.setattr(minivlm.classroom.progress, "judge_handed_in", lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert main(["progress", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "code that others wrote, in 1 notebooks, as you" in message
    assert "--yes" in message
    assert "YOU ARE ROOT" in message
    assert "Nothing on this system keeps it from changing your files" in message
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(landlock, "version", lambda: 1)
    assert main(["progress", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "ROOT" not in message
    assert "your files" not in message
    assert "It could end your other programs" in message
    monkeypatch.setattr(landlock, "version", lambda: 6)
    assert main(["progress", str(tmp_path)]) == 2
    assert "other programs" not in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["nbformat", "IPython"])
def test_a_missing_extra_is_named(
    tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_in(tmp_path / "ada.ipynb", COUNT)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["progress", str(tmp_path), "--yes"]) == 2
    err = capsys.readouterr().err
    assert f"{missing} is not installed, but comes with the extra [notebooks]" in err
    assert f": {sys.executable} -m pip install 'minivlm[notebooks]'" in err


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada/01_patches.ipynb").write_text("not JSON")
    hand_in(
        tmp_path / "ben\x1b[31m.ipynb",
        COUNT,
        UNPATCH,
        "def add_class_token(*a):\n    raise ValueError('\\x1b[2J')",
    )
    assert main(["progress", str(tmp_path), "--yes", "--seconds", "60", "--memory", "3"]) == 0
    printed = capsys.readouterr()
    assert "running the code of 2 notebooks" in printed.err
    head, ada, ben = printed.out.splitlines()
    assert head.split() == ["student", "notebook", "passed", "remark"]
    assert ada.split()[:3] == ["ada", "01_patches", "-"]
    assert "is not JSON" in ada
    assert ben.split()[:5] == ["ben?[31m", "patches", "2", "of", "7"]
    assert "add_class_token: your code stops with ValueError: ?[2J" in ben
    assert "\x1b" not in printed.out
    assert ada.index(" - ") + 1 == head.index("passed") == ben.index("2 of 7")


def test_without_a_folder_ones_own_notebooks_are_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No --yes is asked for: the code is one's own."""
    number = str(len(exercises_of("patches")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minivlm, "__file__", str(tmp_path / "clone/minivlm/__init__.py"))
    assert main(["progress"]) == 2
    assert "make lab" in capsys.readouterr().err
    (tmp_path / "clone/mine/notebooks").mkdir(parents=True)
    hand_in(tmp_path / "clone/mine/notebooks/01_patches.ipynb", COUNT)
    assert main(["progress"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[:5] == ["you", "01_patches", "1", "of", number]
    (tmp_path / "mine/notebooks").mkdir(parents=True)
    hand_in(tmp_path / "mine/notebooks/01_patches.ipynb", COUNT, UNPATCH)  # nearer
    assert main(["progress"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["you", "01_patches", "2", "of", number]


def test_every_notebook_is_recognized_by_its_checks() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = read_notebook(path)
        module = module_of(notebook)
        assert module is not None
        checked = {
            cell.source.partition("(")[0].split(".")[-1]
            for cell in notebook.cells
            if "check" in cell.metadata.get("tags", [])
        }
        assert set(exercises_of(module)) == checked, path.name
