"""A number that the text repeats from an output is the number of that output.

Such a number is listed in the metadata of its cell: `"repeats": {"0.94": "07-058"}` says that cell 07-058
prints a number that is 0.94 when it is rounded to as many places. After a notebook has been run again, a
number that no longer holds fails here. Numbers that cells above happen to print as well, but that come from
elsewhere, are listed with an empty place, `{"224": ""}`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from notebooks_and_sources import NOTEBOOKS, Cell, read_cells

# Places of a box, decimals, numbers with a thousands separator or of three digits and more, percentages.
IN_PROSE = re.compile(
    r"<loc\d{4}>|(?<![\w.,])(?:\d*\.\d+|\d{1,3}(?:,\d{3})+|\d{3,})(?: ?%)?(?![\w,.]*\d)|(?<![\w.,])\d+ ?%"
)
PRINTED = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+")
NEAR = 3  # code cells above a sentence of which it may speak without a mark

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def prints(number: str, cell: Cell) -> bool:
    """Whether a cell prints this number, rounded as it is in the text; 94 % may be printed as 0.94."""
    if number.startswith("<"):
        return number in cell.printed
    text = number.replace(",", "").rstrip("% ")
    places = len(text.partition(".")[2])
    scales = (1, 100) if number.endswith("%") else (1,)
    printed = [float(found.replace(",", "")) for found in PRINTED.findall(cell.printed)]
    half = 0.5 * 10**-places + 1e-9  # a tie may be rounded either way
    return any(abs(value * scale - float(text)) <= half for value in printed for scale in scales)


@each_notebook
def test_marked_numbers_are_those_of_the_outputs(path: Path) -> None:
    cells = read_cells(path)
    by_id = {cell.id: cell for cell in cells}
    for cell in cells:
        for number, source in cell.raw["metadata"].get("repeats", {}).items():
            assert number in IN_PROSE.findall(cell.prose), (
                f"cell {cell.id} does not say {number}: drop the mark"
            )
            if source:
                assert by_id[source].number < cell.number, f"cell {cell.id}: {source} comes later"
                assert prints(number, by_id[source]), f"cell {cell.id}: {source} no longer prints {number}"


@each_notebook
def test_numbers_that_repeat_an_output_are_marked(path: Path) -> None:
    cells = read_cells(path)
    missing = {}
    for cell in cells[1:]:
        if cell.source.startswith("## References"):  # numbers of sections
            continue
        above = [other for other in cells[: cell.number] if other.kind == "code"][-NEAR:]
        marks = cell.raw["metadata"].get("repeats", {})
        for number in set(IN_PROSE.findall(cell.prose)) - set(marks):
            sources = [other.id for other in above if prints(number, other)]
            if sources:
                missing[cell.id] = {**missing.get(cell.id, {}), number: sources[-1]}
    assert not missing, f"add to the metadata of these cells under `repeats`: {missing}"
