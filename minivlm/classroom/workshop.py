"""Notebooks for students: the course's own, with a blank in place of each exercise's solution.

A solution is enclosed in two comment lines, which are nbgrader's, so that a teacher can use nbgrader on the
same files:

    def patch_count(height, width, patch_size):
        ### BEGIN SOLUTION
        return (height // patch_size) * (width // patch_size)
        ### END SOLUTION

In the copy, one line that raises replaces them, and the outputs of exercise and check cells are removed: a
check that says "Right: two lines, and x is only ever added to" gives too much away. Everything else stays,
including the catch-up cells, which let the rest of a notebook run whatever was written above them. Exercise
and check cells get the tag `raises-exception`, with which Jupyter goes on after an error: "Run All" reaches
the end of a notebook that nobody has solved yet. A copy for one who learns alone has each solution folded
below its hints.
"""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import minivlm
from minivlm.classroom.notebooks import read_notebook
from minivlm.errors import InputError, extra
from minivlm.files import write_aside

if TYPE_CHECKING:
    from nbformat import NotebookNode

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
BLANK = 'raise NotImplementedError("your turn: replace this line, then run the check below")'
MAY_FAIL = "raises-exception"
# Whatever looks like a marker: a misspelled one, or one of nbgrader's others, would give the solution away.
LIKE_A_MARKER = re.compile(
    r"#[\W_]*(begin|end|start|stop)[\W_]*(of\b)?[\W_]*(the\b)?[\W_]*(solution|answer|hidden|mark\W?scheme)"
    r"|#[\W_]*(solution|answer|hidden\W?tests?|mark\W?scheme)s?[\W_]*(begin|end|start|stop)"
    r"|###[\W_]*(begin|end|solution)",
    re.IGNORECASE,
)
IN_TEXT = re.compile(r"#+[\W_]*(begin|end)[\W_]*solution", re.IGNORECASE)  # where # begins a heading
README = """\
# Workshop

Activate the environment in which minivlm is installed, here called course: `source course/bin/activate`, on
Windows `course\\Scripts\\activate`. Then `minivlm doctor` says whether this machine is ready, and what to do
if it is not. To open the first notebook, run this in this folder:

```
jupyter-lab notebooks/00_tour.ipynb
```

Each exercise has a cell with a blank, a check that says what is wrong with your answer, and a line that lets
the rest of the notebook run whether or not you have solved it.

| notebook | minutes | exercises |
|---|---|---|
{table}
"""
# A file that a notebook shows or opens. Braces are those of an f-string.
SHOWN_FILE = re.compile(r"\.\./((?:[\w./-]|{[^}]*})+\.(?:png|jpg|svg|json))")


FOLDED = "\n\n<details><summary>Solution</summary>\n\n```python\n{}\n```\n\n</details>"


def student_copy(notebook: NotebookNode, solutions: bool = False) -> NotebookNode:
    """A copy of the notebook with blanks for solutions. The original is not changed.

    With `solutions`, each is folded at the end of the text above its exercise.

    Raises InputError: a marker without its partner, misspelled, or outside a code cell; an exercise without a
    marked solution, which would be handed out solved.
    """
    student = copy.deepcopy(notebook)
    text = None  # the last cell of text
    for number, cell in enumerate(student.cells, start=1):
        tags = cell.metadata.get("tags", [])
        exercise = "exercise" in tags or cell.metadata.get("nbgrader", {}).get("solution")
        where = f"cell {number} ({cell.get('id', 'no id')})"
        source = _blanked(cell.source, where, cell.cell_type == "code")
        solved = source != cell.source
        if solved and cell.cell_type != "code":
            raise InputError(f"{where} has a solution, but is not a code cell: move it into one")
        if exercise and not solved:
            raise InputError(f"{where} is an exercise without a solution: put it between {BEGIN} and {END}")
        if solved and solutions and text is not None:
            lines = [line for line in cell.source.split("\n") if line.strip() not in (BEGIN, END)]
            text.source += FOLDED.format("\n".join(lines))
        text = cell if cell.cell_type == "markdown" else text
        cell.source = source
        if solved or "check" in tags:
            cell.outputs, cell.execution_count = [], None
            cell.metadata["tags"] = [*tags, MAY_FAIL] if MAY_FAIL not in tags else tags
    return student


def _blanked(source: str, where: str, code: bool) -> str:
    """Raises InputError: as `student_copy`."""
    lines: list[str] = []
    begun = 0  # the line of the open marker
    for number, line in enumerate(source.split("\n"), start=1):
        text = line.strip()
        at = f"{where}, line {number}"
        if text == BEGIN:
            if begun:
                raise InputError(f"{at}: {BEGIN} again, after line {begun}: write {END} first")
            begun = number
            lines.append(line.replace(BEGIN, BLANK).rstrip())
        elif text == END:
            if not begun:
                raise InputError(f"{at}: {END} without {BEGIN} above it")
            begun = 0
        elif (LIKE_A_MARKER if code else IN_TEXT).search(text):
            raise InputError(f"{at}: {text!r} is nearly a marker: write {BEGIN} or {END}, or other words")
        elif not begun:
            lines.append(line)
    if begun:
        raise InputError(f"{where}, line {begun}: {BEGIN} without {END} below it in the same cell")
    return "\n".join(lines)


def find_notebooks() -> Path:
    """The folder of the course's notebooks: here, or next to the package in a clone.

    Raises InputError: there is none.
    """
    for folder in (Path("notebooks"), Path(minivlm.__file__).parents[1] / "notebooks"):
        if any(folder.glob("*.ipynb")):
            return folder
    raise InputError(
        "there is no folder notebooks/ here, and an installed minivlm has none: run this in a clone of the "
        "repository, or name the folder with --notebooks"
    )


def write_workshop(
    source: Path, out: Path, overwrite: bool = False, keep: bool = False, solutions: bool = False
) -> list[Path]:
    """Write student copies of all notebooks in a folder, with the pictures they show; returns what it wrote.

    The result works on its own with the installed package:

        out/README.md       what is in it, and how to start
        out/notebooks/      the student notebooks
        out/figures/        what they show and open as ../figures/...

    Nothing is written if anything is wrong with any notebook. With `keep`, files that are there already stay
    as they are, with the answers that they hold. `solutions` is as in `student_copy`.

    Raises InputError: no notebooks, one that cannot be read or copied (see `student_copy`), a missing
    picture or one outside the course, or files that already exist in `out`, unless `overwrite`.
    """
    with extra("notebooks"):
        import nbformat
    if out.resolve() == source.resolve().parent or (out / "notebooks").resolve() == source.resolve():
        raise InputError(f"{out} contains the notebooks to be copied: choose another folder")
    copies: dict[Path, str] = {}
    pictures: dict[Path, Path] = {}
    table = []
    for path in sorted(source.glob("*.ipynb")):
        notebook = read_notebook(path)
        try:
            student = student_copy(notebook, solutions)
            shown = _shown(student, source.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        copies[out / "notebooks" / path.name] = nbformat.writes(student) + "\n"
        pictures |= {out / name: source.parent / name for name in shown}
        table.append(_row(path.name, student))
    if not copies:
        raise InputError(f"{source} contains no notebooks: name the folder that does with --notebooks")

    texts = {out / "README.md": README.format(table="\n".join(table)), **copies}
    if keep:
        texts = {path: text for path, text in texts.items() if not path.exists()}
        pictures = {path: picture for path, picture in pictures.items() if not path.exists()}
    there = [path for path in (*texts, *pictures) if path.exists()]
    if there and not overwrite:
        raise InputError(
            f"{there[0]} already exists and may contain somebody's answers: choose another folder, or "
            "replace what is there with --overwrite"
        )
    for target, text in texts.items():
        with write_aside(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for target, picture in pictures.items():
        with write_aside(target) as temporary:
            shutil.copyfile(picture, temporary)
    return [path for path in copies if path in texts]


def _shown(notebook: NotebookNode, root: Path) -> set[str]:
    """Files that a notebook names as ../figures/..., relative to the root.

    Raises InputError: one is missing, is outside the root, or is no file.
    """
    found: set[str] = set()
    for cell in notebook.cells:
        for name in SHOWN_FILE.findall(cell.source):
            outside = (
                f"it shows ../{name}, which is not in {root.resolve()}: move it there, or remove the line"
            )
            if ".." in Path(name).parts:
                raise InputError(outside)
            files = list(root.glob(re.sub(r"({[^}]*})+", "*", name.lstrip("/"))))
            if not files:
                raise InputError(f"it shows ../{name}, which does not exist")
            for path in files:
                if not path.resolve().is_relative_to(root.resolve()):  # a link
                    raise InputError(outside)
                if not path.is_file():
                    raise InputError(f"it shows ../{name}, and {path} is not a file: put a picture there")
                found.add(str(path.relative_to(root)))
    return found


def _row(name: str, notebook: NotebookNode) -> str:
    """A row of the table of notebooks."""
    opening = notebook.cells[0].source if notebook.cells else ""
    title = re.match(r"# (.+)", opening)
    minutes = re.search(r"\*\*Minutes:\*\* (\d+)", opening)
    exercises = sum("exercise" in cell.metadata.get("tags", []) for cell in notebook.cells)
    link = f"[{title[1] if title else name}](notebooks/{name})"
    return f"| {link} | {minutes[1] if minutes else ''} | {exercises} |"
