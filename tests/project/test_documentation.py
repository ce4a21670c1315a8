"""README and the pages in docs/: their length, code that runs, and links that lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from notebooks_and_sources import ROOT
from PIL import Image

from minivlm import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")]
# The book puts index.md at the top, so its links are not those of docs/.
PAGES += [path for path in sorted(ROOT.glob("docs/*.md")) if path.name != "index.md"]
COMMANDS = sorted(
    {
        line
        for page in PAGES
        for line in re.findall(r"^\.venv/bin/(minivlm .+)$", page.read_text("utf-8"), re.M)
    }
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the book make them."""
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_takes_two_minutes() -> None:
    lines = [line for line in README.splitlines() if not line.startswith("| [")]  # a row for each notebook
    assert len(lines) <= 112
    words = re.findall(r"[^\W_][^\s|]*", re.sub(r"\]\([^)]*\)", "]", "\n".join(lines)))
    assert len(words) <= 900


def test_readme_shows_a_moving_picture_that_loads_quickly() -> None:
    path = ROOT / "figures" / "live.gif"
    assert re.search(r"!\[[^\]]{40,}\]\(figures/live\.gif\)", README)
    assert path.stat().st_size <= 1_000_000
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) > 20


def test_readme_code_runs_in_any_folder(tmp_path: Path) -> None:
    """And prints what the comment behind it says."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len([line for line in code.splitlines() if line]) == 4
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == code.strip().rpartition("  # ")[2]
    assert not any(tmp_path.iterdir())


def test_readme_draws_the_package_as_it_is() -> None:
    (tree,) = re.findall(r"^minivlm/\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    package = ROOT / "minivlm"
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)) == folders
    named = [re.split(r" {3,}", line.strip())[0] for line in tree.splitlines() if "/" not in line]
    files = {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    assert set(" ".join(named).split()) == files


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    options = cli._parser().parse_args(shlex.split(line)[1:])
    assert callable(options.run)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
