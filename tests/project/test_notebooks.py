"""What nbval cannot see: a notebook with cleared outputs would pass it, and so would a figure without a fact.

nbval itself runs over the notebooks in `make test`; these tests read the files only.
"""

from __future__ import annotations

import ast
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from notebooks_and_sources import NOTEBOOKS, ROOT, Cell, ignored_outputs, read_cells

LONGEST_CELL = 40  # lines
MOST_UNUSED = 12  # names that the first cell imports for later sections
LARGEST_PICTURE = 150_000  # bytes, base64 decoded
SECTIONS = ("## Recap", "## What the real models change", "## References")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Cell]:
    return [cell for cell in read_cells(path) if cell.kind == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each_notebook
def test_every_cell_was_run_in_order(path: Path) -> None:
    cells = code_cells(path)
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert [cell.raw["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@each_notebook
def test_metadata_is_plain(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}, "widget state or other leftovers"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        # `repeats` is explained in test_numbers_in_prose.py; whatever else there is may be a timestamp.
        assert set(cell["metadata"]) <= {"tags", "repeats"}, f"cell {cell['id']} has other metadata"


@each_notebook
def test_outputs_are_clean(path: Path) -> None:
    for cell in code_cells(path):
        for output in cell.outputs:
            where = f"cell {cell.number} of {path.name}"
            assert output.get("name") != "stderr", f"{where} writes to stderr: {output['text']}"
            if output["output_type"] == "error":
                assert "raises-exception" in cell.tags, f"{where} stores an error"
            data = output.get("data", {})
            assert not any("widget" in kind for kind in data), f"{where} stores a widget"
            if "image/png" in data:
                assert len("".join(data["image/png"])) * 3 // 4 <= LARGEST_PICTURE, (
                    f"{where}: picture too large"
                )
            text = "".join(output.get("text", "")) + "".join(data.get("text/plain", ""))
            assert not re.search(r"/(home|root|work|tmp|Users|usr)/|[A-Z]:\\", text), (
                f"{where} shows a path: {text}"
            )


@each_notebook
def test_cells_are_short_and_without_trailing_semicolons(path: Path) -> None:
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, f"cell {cell.number} is too long"
        assert not cell.source.rstrip().endswith(";"), f"cell {cell.number} ends with a semicolon"


@each_notebook
def test_the_first_cell_imports_little_for_later(path: Path) -> None:
    """What a later section needs is imported there. The first section ends at the second heading."""
    first, *cells = read_cells(path)[next(i for i, c in enumerate(read_cells(path)) if c.kind == "code") :]
    headings = [
        i for i, cell in enumerate(cells) if cell.kind == "markdown" and "\n## " in f"\n{cell.source}"
    ]
    section = [cell.source for cell in cells[: headings[1]] if cell.kind == "code"]
    nodes = [node for source in [first.source, *section] for node in ast.walk(ast.parse(source))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    imports = [node for node in ast.parse(first.source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    assert len(names - used) <= MOST_UNUSED, sorted(names - used)


@each_notebook
def test_figures_are_followed_by_a_fact(path: Path) -> None:
    """nbval does not compare pixels, so a cell that draws prints what the eye should see."""
    for cell in code_cells(path):
        draws = any("image/png" in output.get("data", {}) for output in cell.outputs)
        prints = any(output["output_type"] == "stream" for output in cell.outputs)
        assert prints or not draws, f"cell {cell.number} draws and prints nothing"


@each_notebook
def test_numbers_of_one_run_have_a_fact_beside_them(path: Path) -> None:
    """What stands after a ≈ is not compared (sanitize.cfg), so something else in that output has to be."""
    for cell in code_cells(path):
        text = "".join("".join(output.get("text", "")) for output in cell.outputs)
        if "≈" in text:
            assert re.search("True|False", text), f"cell {cell.number} of {path.name} has no fact that holds"


@each_notebook
def test_first_picture_comes_early(path: Path) -> None:
    cells = read_cells(path)
    has_picture = [
        "![" in cell.source
        if cell.kind == "markdown"
        else any("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in cells
    ]
    code_pictures = [
        cell.number for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]
    assert any(has_picture[: len(cells) // 3])
    assert code_pictures, "no figure from real tensors"
    assert code_pictures[0] < len(cells) // 2


@each_notebook
def test_sections(path: Path) -> None:
    cells = read_cells(path)
    prose = [cell.source for cell in cells if cell.kind == "markdown"]
    opening = prose[0]
    assert opening.startswith("# "), "the first cell is the title"
    assert "map_" in opening, "the first cell shows the map of the course"
    for words in ("**Question.**", "**At the end you can**", "**Minutes:**", "**Before:**"):
        assert words in opening, f"{words} is missing at the start"
    joined = "\n".join(prose)
    for section in SECTIONS:
        assert f"\n{section}" in "\n" + joined, f"no section {section}"
    recap = next(source for source in prose if source.startswith("## Recap"))
    assert len(re.findall(r"^\d\. ", recap, flags=re.M)) == 5, "the recap has five numbered lines"
    assert re.search(r"^#+ .*[Bb]reak", joined, flags=re.M), "nothing is broken on purpose"


@each_notebook
def test_exercises_are_complete(path: Path) -> None:
    cells = read_cells(path)
    heading = re.compile(r"^### Exercise \d", re.MULTILINE)
    titles = [cell for cell in cells if cell.kind == "markdown" and heading.search(cell.source)]
    assert 3 <= len(titles) <= 7
    kinds = []
    for title in titles:
        line = re.search(r"^Difficulty: [●○]{3} · \d+ minutes(?: · (.+))?$", title.source, re.MULTILINE)
        assert line, f"{title.source!r}"
        kinds.append(line[1])
        hints = re.findall(r"<summary>(.+?)</summary>", title.source)
        assert hints == ["Hint 1", "Hint 2", "Hint 3"], f"{title.source!r}"
        exercise, check, catch_up = cells[title.number + 1 : title.number + 4]
        assert "exercise" in exercise.tags
        assert exercise.source.count("### BEGIN SOLUTION") == 1
        assert exercise.source.count("### END SOLUTION") == 1
        assert "check" in check.tags
        assert re.search(r"\bchecks\.\w+\.\w+\(", check.source)
        assert any("Right: " in "".join(output.get("text", "")) for output in check.outputs)
        assert "catch-up" in catch_up.tags
    assert set(kinds) - {None} == {"predict, then run", "find the bug", "from a blank cell"}


@each_notebook
def test_keys_of_an_answer_are_named(path: Path) -> None:
    """A student copy lacks the solution: the keys of a dictionary to return stand in the exercise's text."""
    for title, exercise in pairwise(read_cells(path)):
        if "exercise" not in exercise.tags:
            continue
        above = title.source + exercise.source.split("### BEGIN SOLUTION")[0]
        returned = [
            node.value for node in ast.walk(ast.parse(exercise.source)) if isinstance(node, ast.Return)
        ]
        for answer in returned:
            keys = answer.keys if isinstance(answer, ast.Dict) else []
            unnamed = [
                key.value for key in keys if isinstance(key, ast.Constant) and str(key.value) not in above
            ]
            assert not unnamed, f"cell {title.id} does not say that the keys {unnamed} are expected"


@each_notebook
def test_pictures_have_alt_texts_and_links_are_relative(path: Path) -> None:
    for cell in read_cells(path):
        if cell.kind != "markdown":
            continue
        for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", cell.source):
            assert alt.strip(), f"a picture without alt text: {target}"
            assert (path.parent / target).exists(), f"{target} does not exist"
        for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)#]+)[^)]*\)", cell.source):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"link to {target}, which does not exist"


def test_ignored_outputs_are_listed_with_a_reason() -> None:
    tagged = {
        (cell.notebook, cell.id)
        for path in NOTEBOOKS
        for cell in read_cells(path)
        if "nbval-ignore-output" in cell.tags or "NBVAL_IGNORE_OUTPUT" in cell.source
    }
    listed = {(notebook, cell) for notebook, cells in ignored_outputs().items() for cell in cells}
    assert tagged == listed
    assert all(len(reason) > 20 for cells in ignored_outputs().values() for reason in cells.values())


def test_no_cell_is_skipped() -> None:
    for path in NOTEBOOKS:
        for cell in read_cells(path):
            assert not {"nbval-skip", "skip-execution"} & set(cell.tags)
            assert "NBVAL_SKIP" not in cell.source


def test_readme_lists_every_notebook() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in readme
