"""The pages for teachers agree with the notebooks: minutes, totals, and every link target."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from notebooks_and_sources import NOTEBOOKS, ROOT, read_cells

TEACHING = (ROOT / "docs/teaching.md").read_text(encoding="utf-8")
MISTAKES = (ROOT / "docs/common-mistakes.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def minutes_of(path: Path) -> int:
    found = re.search(r"\*\*Minutes:\*\* (\d+)", read_cells(path)[0].source)
    assert found is not None
    return int(found[1])


MINUTES = {path.stem: minutes_of(path) for path in NOTEBOOKS}
WORD = re.compile(r"\]\(\.\./notebooks/(\w+)\.ipynb\)")


def section(title: str) -> list[str]:
    """Rows of the tables below a heading, without their headers."""
    _, _, rest = TEACHING.partition(f"{title}\n")
    body = re.split(r"\n#+ ", rest)[0]
    return [line for line in body.splitlines() if line.startswith("|")][2:]


@pytest.mark.parametrize("plan", ["### Half a day", "### One day"])
def test_a_day_adds_up(plan: str) -> None:
    (title,) = [line for line in TEACHING.splitlines() if line.startswith(plan)]
    clock = None
    for row in section(title):
        start, minutes, what = (cell.strip() for cell in row.strip("|").split("|"))
        hours, past = start.split(":")
        begins = 60 * int(hours) + int(past)
        assert clock in (None, begins), f"{row}: the line before ends at {clock} minutes"
        clock = begins + int(minutes)
        for name in WORD.findall(what):
            assert int(minutes) == MINUTES[name], row


def test_the_days_add_up() -> None:
    rows = section("### Day by day: from a patch to the other systems")
    taught = []
    for row in rows:
        _, minutes, notebooks, _ = (cell.strip() for cell in row.strip("|").split("|"))
        names = WORD.findall(notebooks)
        assert int(minutes) == sum(MINUTES[name] for name in names), row
        taught += names
    assert taught == list(MINUTES), "the days have every notebook once, in order"


def test_every_notebook_has_a_line() -> None:
    rows = section("## Each notebook: where people get stuck, what to ask, what to show")
    listed = {
        WORD.findall(cells[0])[0]: int(cells[1]) for row in rows if (cells := row.strip("|").split("|"))
    }
    assert listed == MINUTES
    assert all(len(row.strip("|").split("|")) == 5 for row in rows)


def test_the_readme_has_the_same_minutes() -> None:
    for name, minutes in MINUTES.items():
        assert re.search(rf"\(notebooks/{name}\.ipynb\) \|.*\| {minutes} \| \d \|", README), name


@pytest.mark.parametrize("page", ["teaching.md", "common-mistakes.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_every_mistake_is_shown_somewhere() -> None:
    rows = [line for line in MISTAKES.splitlines() if line.startswith("| ") and "what you see" not in line]
    assert len(rows) > 30
    for row in rows:
        _, _, shown = row.strip("| ").rsplit(" | ", 2)
        links = re.findall(r"\[([^]]+)\]\(\.\./((?:notebooks|tests)/[\w./]+)\)", shown)
        assert links, row
        for name, target in links:
            path = ROOT / target
            if path.suffix == ".py":
                assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), name
                continue
            number, _, title = name.partition(": ")
            assert path.name.startswith(number)
            prose = "\n".join(cell.source for cell in read_cells(path) if cell.kind == "markdown")
            assert re.search(rf"^#+ {re.escape(title)}$", prose, re.MULTILINE), name


@pytest.mark.parametrize("target", ["doctor", "workshop", "wheelhouse"])
def test_commands_are_there(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"make {target}" in README
    assert f"make {target}" in TEACHING
