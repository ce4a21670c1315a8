"""The notebooks for students: what is blank, what stays, and where they fail.

The copies of 00, 01, 02 and 04 are actually run, each in its own kernel, for some seconds. The others take
longer (07 and 10 take minutes), which CI can afford only once, for nbval; EVERY_NOTEBOOK=1 in the environment
runs them too. That their copies run follows from the rest: outside exercises and checks their cells are those
of the original (`test_solutions_put_back_...`), which nbval runs, and every name that an exercise or check
cell binds is bound again by the catch-up cell below it (`test_catch_up_...`). Their exercises and checks are
run too, without the cells in between (`test_a_notebook_opened_in_the_middle`).
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebooks_and_sources import NOTEBOOKS, ROOT, Cell, definitions, read_cells

from minivlm.classroom.workshop import BEGIN, BLANK, END, MAY_FAIL, student_copy, write_workshop
from minivlm.cli import main
from minivlm.errors import InputError

SHORT = {"00_tour", "01_patches", "02_clip_and_siglip", "04_processor"}
RUN = [path for path in NOTEBOOKS if path.stem in SHORT or os.environ.get("EVERY_NOTEBOOK") == "1"]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_notebook_to_run = pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)

SOLVED = ["def double(x):", "    y = x", f"    {BEGIN}", "    y = 2 * x", "    return y", f"    {END}"]


def one_exercise(*lines: str, kind: str = "code", tags: tuple[str, ...] = ("exercise",)) -> Any:
    """A notebook whose second cell has these lines."""
    new = new_code_cell if kind == "code" else new_markdown_cell
    cell = new("\n".join(lines), id="the-cell", metadata={"tags": list(tags)})
    return new_notebook(cells=[new_markdown_cell("# Title"), cell])


def tagged(path: Path, tag: str) -> list[Cell]:
    return [cell for cell in read_cells(path) if tag in cell.tags]


def bound_names(source: str) -> set[str]:
    """What the statements of a cell bind at its top level: functions, classes, variables, imports."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return set(definitions(tree)) | imported


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is handed out."""
    out = tmp_path_factory.mktemp("workshop")
    write_workshop(ROOT / "notebooks", out)
    return out


# What becomes blank


def test_the_solution_becomes_one_line_that_raises() -> None:
    student = student_copy(one_exercise(*SOLVED))
    source = student.cells[1].source
    assert source == f"def double(x):\n    y = x\n    {BLANK}"
    scope: dict[str, Any] = {}
    exec(source, scope)
    with pytest.raises(NotImplementedError, match="your turn"):
        scope["double"](2)


def test_lines_around_and_between_solutions_stay() -> None:
    lines = ["a = 1", BEGIN, "b = 2", END, "", "if a:", f"    {BEGIN}", f"    {END}", "c = 3\x0c", ""]
    student = student_copy(one_exercise(*lines))
    assert student.cells[1].source == f"a = 1\n{BLANK}\n\nif a:\n    {BLANK}\nc = 3\x0c\n"


def test_only_outputs_of_exercises_and_checks_are_cleared() -> None:
    notebook = one_exercise(*SOLVED)
    plain = new_code_cell("print(1)", execution_count=1)
    check = new_code_cell("checks.x.double(double)", execution_count=3, metadata={"tags": ["check"]})
    catch_up = new_code_cell("double = ...", execution_count=4, metadata={"tags": ["catch-up"]})
    notebook.cells += [plain, check, catch_up]
    for cell in notebook.cells[1:]:
        cell.outputs = [nbformat.v4.new_output("stream", text="Right: twice.")]
    before = copy.deepcopy(notebook)
    student = student_copy(notebook)
    assert notebook == before, "the notebook that was given has changed"
    assert [bool(cell.outputs) for cell in student.cells[1:]] == [False, True, False, True]
    assert [cell.execution_count for cell in student.cells[1:]] == [None, 1, None, 4]
    assert [MAY_FAIL in cell.metadata.get("tags", []) for cell in student.cells[1:]] == [
        True,
        False,
        True,
        False,
    ]
    assert student_copy(before) == student, "not repeatable"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([BEGIN, "x"], "line 1: ### BEGIN SOLUTION without ### END SOLUTION"),
        (["x", END], "line 2: ### END SOLUTION without ### BEGIN SOLUTION"),
        (["x", BEGIN, "y", BEGIN, END], "line 4: ### BEGIN SOLUTION again, after line 2"),
        (["x", BEGIN, END, END], "line 4: ### END SOLUTION without"),
        ([END, "x", BEGIN], "line 1: ### END SOLUTION without"),
        ([BEGIN, "x", "### End solution", "y", END], "line 3: '### End solution' is nearly a marker"),
        (["# BEGIN SOLUTION", "x"], "line 1: '# BEGIN SOLUTION' is nearly"),
        (["### BEGIN SOLUTION:", "x", END], "line 1: .* is nearly"),
        (["###BEGIN SOLUTIONS", "x", END], "line 1: .* is nearly"),
        (["x = 1"], "is an exercise without a solution"),
    ],
)
def test_wrong_markers_are_named_with_cell_and_line(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=rf"cell 2 \(the-cell\).*{message}"):
        student_copy(one_exercise(*lines))


@pytest.mark.parametrize(
    "line",
    [
        "### BEGIN SOLUTION 1",
        "### BEGIN_SOLUTION",
        "### BEGIN-SOLUTION",
        "### BEGINSOLUTION",
        "### BEGIN SOLUTION (short)",
        "### BEGIN THE SOLUTION",
        "### BEGIN SOLUTOIN",
        "### BEGIN HIDDEN TESTS",
        "### BEGIN MARK SCHEME",
        "### START SOLUTION",
        "### SOLUTION BEGIN",
        "### SOLUTION",
        "# BEGIN ANSWER",
        "## end of solution",
        "#@ begin_solution",
        "x = 1  ### BEGIN SOLUTION",
        "return x  # END SOLUTION",
        "####BEGIN SOLUTION####",
    ],
)
def test_what_is_nearly_a_marker_gives_nothing_away(line: str) -> None:
    for tags in (("exercise",), ()):
        with pytest.raises(InputError, match=r"cell 2 \(the-cell\), line 2: .* is nearly a marker"):
            student_copy(one_exercise("def double(x):", f"    {line}", "    return 2 * x", tags=tags))


@pytest.mark.parametrize(
    "line",
    [
        "# the solution of this",
        "# begins at 0",
        "#### Part",
        "x = 1  # the end",
        "answer = 1  # right",
        "# the end of the answer",
    ],
)
def test_ordinary_comments_stay(line: str) -> None:
    notebook = one_exercise("def double(x):", f"    {line}", "    return 2 * x", tags=())
    assert student_copy(notebook).cells[1].source == notebook.cells[1].source


def test_headings_may_talk_about_solutions() -> None:
    notebook = one_exercise("### Solutions", "### End of the solutions", kind="markdown", tags=())
    assert student_copy(notebook).cells[1].source == notebook.cells[1].source
    with pytest.raises(InputError, match="is nearly a marker"):
        student_copy(one_exercise("### BEGIN SOLUTION 1", "x", kind="markdown", tags=()))


def test_what_nbgrader_calls_a_solution_needs_markers() -> None:
    notebook = one_exercise("x = 1", tags=())
    notebook.cells[1].metadata["nbgrader"] = {"solution": True}
    with pytest.raises(InputError, match="is an exercise without a solution"):
        student_copy(notebook)


def test_a_solution_in_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"cell 2 \(the-cell\).*not a code cell"):
        student_copy(one_exercise(BEGIN, "x", END, kind="markdown", tags=()))


def test_a_cell_with_markers_needs_no_tag() -> None:
    assert BLANK in student_copy(one_exercise(*SOLVED, tags=())).cells[1].source


# The course's own notebooks


def put_back(student: str, original: str) -> str:
    """The student's cell with each blank replaced by the solution that was there."""
    pieces = student.split(BLANK)
    solutions = [part.partition(END)[0] for part in original.split(BEGIN)[1:]]
    assert len(pieces) == len(solutions) + 1
    filled = pieces[0]
    for solution, piece in zip(solutions, pieces[1:], strict=True):
        filled += BEGIN + solution + END + piece
    return filled


@each_notebook
def test_solutions_put_back_give_the_original(path: Path, workshop: Path) -> None:
    original = json.loads(path.read_text(encoding="utf-8"))
    student = json.loads((workshop / "notebooks" / path.name).read_text(encoding="utf-8"))
    changed = 0
    for ours, theirs in zip(original["cells"], student["cells"], strict=True):
        tags = ours["metadata"].get("tags", [])
        if "exercise" in tags or "check" in tags:
            changed += 1
            assert (theirs["outputs"], theirs["execution_count"]) == ([], None)
            assert theirs["metadata"]["tags"].pop() == MAY_FAIL
            theirs["outputs"], theirs["execution_count"] = ours["outputs"], ours["execution_count"]
        if "exercise" in tags:
            assert ours["source"] != theirs["source"]
            filled = put_back("".join(theirs["source"]), "".join(ours["source"]))
            theirs["source"] = filled.splitlines(keepends=True)
    assert changed == 2 * len(tagged(path, "exercise"))
    assert student == original


@each_notebook
def test_nothing_gives_the_answer_away(path: Path, workshop: Path) -> None:
    text = (workshop / "notebooks" / path.name).read_text(encoding="utf-8")
    assert "Right: " not in text
    assert "END SOLUTION" not in text
    for cell in tagged(path, "exercise"):
        solution = cell.source.partition(BEGIN)[2].partition(END)[0].split("\n")
        (copied,) = [c for c in read_cells(workshop / "notebooks" / path.name) if c.id == cell.id]
        for line in filter(str.strip, solution):
            assert line.strip() not in map(str.strip, copied.source.split("\n")), line


@each_notebook
def test_catch_up_cells_bind_what_exercises_and_checks_bind(path: Path) -> None:
    cells = read_cells(path)
    for exercise in tagged(path, "exercise"):
        check, catch_up = cells[exercise.number + 1 : exercise.number + 3]
        names = bound_names(exercise.source)
        assert names
        assert names == bound_names(catch_up.source)
        assert not bound_names(check.source)
        for name in names:
            assert f"{name} = checks." in catch_up.source
            assert f".solutions.{name}" in catch_up.source


@each_notebook
def test_a_notebook_opened_in_the_middle(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever comes late runs the imports and the catch-up cells, and can then do any exercise.

    What the notebook builds and the package has (cells marked `# minivlm/...`) is the package's here.
    """
    cells = [cell for cell in read_cells(path) if cell.kind == "code"]
    scope: dict[str, Any] = {}
    done = 0
    # What first cells set for the whole process is undone at the end.
    with torch.enable_grad(), torch.random.fork_rng(), matplotlib.rc_context():
        exec(cells[0].source, scope)
        for cell in cells[1:]:
            if cell.marked_file is not None:
                package = importlib.import_module(cell.marked_file.removesuffix(".py").replace("/", "."))
                scope |= {name: getattr(package, name) for name in definitions(ast.parse(cell.source))}
            elif "exercise" in cell.tags:
                answers = dict(scope)
                exec(cell.source, answers)
            elif "check" in cell.tags:
                capsys.readouterr()
                exec(cell.source, answers)
                assert capsys.readouterr().out.startswith("Right: ")
            elif "catch-up" in cell.tags:
                exec(cell.source, scope)
                done += 1
    assert done == len(tagged(path, "exercise"))


def printed(outputs: list[dict[str, Any]]) -> str:
    """Texts of outputs. Pictures are not compared: every cell that draws prints what it shows."""
    texts = [output.get("text", "") for output in outputs]
    texts += [output.get("data", {}).get("text/plain", "") for output in outputs]
    texts += [output["evalue"] for output in outputs if output["output_type"] == "error"]
    return "".join("".join(text) for text in texts if not "".join(text).startswith("<Figure"))


@each_notebook_to_run
def test_the_student_copy_fails_at_checks_and_nowhere_else(
    path: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run from top to bottom as "Run All" does, which goes on after an error only with `raises-exception`.

    All other cells print what they print in the original, so nothing depends on the answers above.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as when the stored outputs were made
    student = nbformat.read(workshop / "notebooks" / path.name, as_version=4)
    where = {"metadata": {"path": str(workshop / "notebooks")}}
    NotebookClient(student, kernel_name="python3", timeout=900, resources=where).execute()
    for ours, theirs in zip(read_cells(path), student.cells, strict=True):
        if "check" in ours.tags:
            (error,) = theirs.outputs
            assert error.ename == "NotYet"
            assert "still blank" in error.evalue
        elif ours.kind == "code" and "nbval-ignore-output" not in ours.tags:
            assert printed(theirs.outputs) == printed(ours.outputs), f"cell {ours.number}: {ours.source}"


# The folder


def test_the_folder_stands_alone(workshop: Path) -> None:
    assert sorted(p.name for p in (workshop / "notebooks").iterdir()) == [p.name for p in NOTEBOOKS]
    readme = (workshop / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in readme
        for cell in read_cells(path):
            if cell.kind == "markdown":
                for target in set(cell.source.split("](../")[1:]):
                    assert (workshop / target.partition(")")[0]).is_file()
    assert (workshop / "figures/samples/scene_1.png").read_bytes() == (
        ROOT / "figures/samples/scene_1.png"
    ).read_bytes()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A course of one notebook that shows one picture and opens several."""
    (tmp_path / "course/notebooks").mkdir(parents=True)
    (tmp_path / "course/figures/samples").mkdir(parents=True)
    for name in ("map.png", "samples/scene_1.png", "samples/scene_2.png", "unused.png"):
        (tmp_path / "course/figures" / name).write_bytes(name.encode())
    notebook = one_exercise(*SOLVED)
    notebook.cells[0].source = "# 00 First\n\n![A map](../figures/map.png)\n\n**Minutes:** 20"
    notebook.cells.append(new_code_cell('open(f"../figures/samples/scene_{number + 1}.png")'))
    nbformat.write(notebook, tmp_path / "course/notebooks/00_first.ipynb")
    return tmp_path / "course/notebooks"


def test_files_that_code_opens_are_copied_too(small: Path, tmp_path: Path) -> None:
    write_workshop(small, tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    figures = {"figures/map.png", "figures/samples/scene_1.png", "figures/samples/scene_2.png"}
    assert found == {"README.md", "notebooks/00_first.ipynb"} | figures
    readme = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| [00 First](notebooks/00_first.ipynb) | 20 | 1 |" in readme


def test_answers_are_not_overwritten(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (copied,) = write_workshop(small, out)
    copied.write_text("my answers", encoding="utf-8")
    with pytest.raises(InputError, match=r"already exists.*--overwrite"):
        write_workshop(small, out)
    assert copied.read_text(encoding="utf-8") == "my answers"
    write_workshop(small, out, overwrite=True)
    assert BLANK in nbformat.read(copied, as_version=4).cells[1].source


def test_with_keep_every_file_that_is_there_stays(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (copied,) = write_workshop(small, out)
    picture = next((out / "figures").rglob("*.png"))
    for path in (copied, picture, out / "README.md"):
        path.write_text("mine", encoding="utf-8")
    shutil.copy(small / "00_first.ipynb", small / "01_second.ipynb")
    assert write_workshop(small, out, keep=True) == [out / "notebooks/01_second.ipynb"]
    assert all(path.read_text(encoding="utf-8") == "mine" for path in (copied, picture, out / "README.md"))


def test_a_solution_is_folded_below_the_text_of_its_exercise(small: Path) -> None:
    notebook = nbformat.read(small / "00_first.ipynb", as_version=4)
    original = [cell.source for cell in notebook.cells]
    student = student_copy(notebook, solutions=True)
    where = next(i for i, source in enumerate(original) if BEGIN in source)
    text, exercise = student.cells[where - 1].source, student.cells[where].source
    assert BLANK in exercise
    assert text.startswith(original[where - 1])
    shown = re.search(r"<summary>Solution</summary>\n\n```python\n(.*?)\n```\n\n</details>$", text, re.DOTALL)
    assert shown
    assert shown[1] == "\n".join(
        line for line in original[where].split("\n") if line.strip() not in (BEGIN, END)
    )
    assert [cell.source for cell in notebook.cells] == original
    assert "Solution" not in student_copy(notebook).cells[where - 1].source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.json", "not in .*course: move it there"),
        ("figures/../../secret.json", "not in .*course: move it there"),
        ("figures/link.json", "not in .*course: move it there"),
        ("/figures/../../secret.json", "not in .*course: move it there"),
        ("figures/pipe.png", "pipe.png is not a file"),
        ("figures/folder.png", "folder.png is not a file"),
        ("/etc/passwd.json", "does not exist"),
    ],
)
def test_only_files_of_the_course_are_handed_out(
    small: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "secret.json").write_text("a token")
    figures = small.parent / "figures"
    (figures / "link.json").symlink_to(tmp_path / "secret.json")
    (figures / "folder.png").mkdir()
    if os.name == "posix":
        os.mkfifo(figures / "pipe.png")
    notebook = nbformat.read(small / "00_first.ipynb", as_version=4)
    notebook.cells.append(new_code_cell(f'open("../{name}")'))
    nbformat.write(notebook, small / "01_second.ipynb")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        write_workshop(small, tmp_path / "deep/out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_originals_are_never_overwritten(small: Path, overwrite: bool) -> None:
    with pytest.raises(InputError, match="to be copied"):
        write_workshop(small, small.parent, overwrite)
    assert END in nbformat.read(small / "00_first.ipynb", as_version=4).cells[1].source


def broken_json(folder: Path) -> None:
    (folder / "01_second.ipynb").write_text("{", encoding="utf-8")


def another_json(folder: Path) -> None:
    (folder / "01_second.ipynb").write_text("[]", encoding="utf-8")


def open_solution(folder: Path) -> None:
    nbformat.write(one_exercise(BEGIN), folder / "01_second.ipynb")


def no_picture(folder: Path) -> None:
    shutil.rmtree(folder.parent / "figures" / "samples")


def no_notebooks(folder: Path) -> None:
    (folder / "00_first.ipynb").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_json, "01_second.ipynb is not JSON"),
        (another_json, "01_second.ipynb is JSON, but not a notebook"),
        (open_solution, r"01_second.ipynb: cell 2 \(the-cell\), line 1"),
        (no_picture, r"00_first.ipynb: it shows \.\./figures/samples/scene_{number \+ 1}.png"),
        (no_notebooks, "contains no notebooks"),
    ],
)
def test_nothing_is_written_when_anything_is_wrong(
    small: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    spoil(small)
    with pytest.raises(InputError, match=message):
        write_workshop(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.parent)
    assert main(["workshop", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("1 notebooks, and the pictures")
    assert (tmp_path / "out/notebooks/00_first.ipynb").is_file()
    assert main(["workshop", str(tmp_path / "out")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["workshop", str(tmp_path / "out"), "--keep", "--solutions"]) == 0
    assert "0 notebooks written, 1 kept" in capsys.readouterr().out
    assert main(["workshop", str(tmp_path / "other"), "--notebooks", str(tmp_path)]) == 2
    assert "contains no notebooks" in capsys.readouterr().err
