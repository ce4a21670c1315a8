"""The notebooks in JupyterLab, in a browser: what a reader gets who runs them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from hover import explore
from lab import Lab, LabError, open_notebook, read_notebook, run_all, running_lab
from notebooks_and_sources import NOTEBOOKS
from outputs import differences
from playwright.sync_api import Page, expect

SLOW = {"07_training", "10_contrastive_training"}  # minutes, which nbval spends on them already
WITH_HOVER = {"09_looking_inside"}


def notebooks() -> list[Any]:
    """The slow ones first, so that one process is not left alone with them."""
    ordered = sorted(NOTEBOOKS, key=lambda path: path.stem not in SLOW)
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
        for path in ordered
    ]


@pytest.mark.parametrize("path", notebooks())
def test_run_all_gives_the_stored_outputs(path: Path, lab: Lab, page: Page) -> None:
    saved = run_all(page, lab, f"notebooks/{path.name}")
    assert differences(read_notebook(path), saved) == []

    pictures = page.locator('.jp-OutputArea div[id^="look-"]')
    assert bool(pictures.count()) == (path.stem in WITH_HOVER)
    for picture in pictures.all():
        explore(page, picture)


def test_a_port_in_use_is_no_obstacle(tmp_path: Path, course: Path, page: Page) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with running_lab(course, tmp_path, port=port) as lab:
            assert lab.port != port
            open_notebook(page, lab, "notebooks/00_tour.ipynb")
            expect(page.get_by_role("tab", name="00_tour.ipynb")).to_be_visible()


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(LabError, match=rf"(?s)exit code 1:.*{missing}"), running_lab(missing, tmp_path):
        pass
