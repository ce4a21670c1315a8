"""The page to explore that `minivlm look` writes, opened as a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hover import explore
from notebooks_and_sources import ROOT
from playwright.sync_api import Page


def test_the_page_of_look_follows_the_mouse(tmp_path: Path, page: Page) -> None:
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    picture = ROOT / "figures" / "samples" / "scene_1.png"
    command = [sys.executable, "-m", "minivlm", "look", str(picture), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    address = (tmp_path / "hover.html").as_uri()
    page.goto(address)
    explore(page, page.locator('div[id^="look-"]'))

    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
