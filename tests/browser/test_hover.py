"""The page to explore that `minivlm look` writes, opened as a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hover import explore
from notebooks_and_sources import ROOT
from playwright.sync_api import Page
from watching import Watcher


def test_the_page_of_look_follows_the_mouse(tmp_path: Path, page: Page) -> None:
    picture = ROOT / "figures" / "samples" / "scene_1.png"
    command = [
        sys.executable,
        "-m",
        "minivlm",
        "look",
        str(picture),
        "--no-occlusion",
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, check=True)
    address = (tmp_path / "hover.html").as_uri()
    watcher = Watcher(page, own=(address,))
    page.goto(address)
    explore(page, page.locator('div[id^="look-"]'))
    assert watcher.take() == []
