"""The page to explore that `minivlm look` writes, opened as a file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hover import explore
from notebooks_and_sources import ROOT
from playwright.sync_api import Page, expect
from watching import Watcher, faint_texts, width

SAMPLE = ROOT / "figures" / "samples" / "scene_1.png"
# Windows allows fewer signs in the name of a file.
ODD = "&lt;i&gt;'.png" if os.name == "nt" else "\"'><script>window.hurt=1<&lt;.png"
PROMPT = "what color is the \"'><script>window.hurt=1</script><img src=x onerror=window.hurt=1>?"


def look(picture: Path, out: Path, *more: str) -> str:
    """The address of the page that `minivlm look` writes."""
    command = [sys.executable, "-m", "minivlm", "look", str(picture), "--no-occlusion", "--out", str(out)]
    subprocess.run([*command, *more], check=True)
    return (out / "hover.html").as_uri()


def test_the_page_of_look_follows_the_mouse(tmp_path: Path, page: Page) -> None:
    address = look(SAMPLE, tmp_path)
    watcher = Watcher(page, own=(address,))
    page.goto(address)
    explore(page, page.locator('div[id^="look-"]'))
    assert watcher.take() == []


def test_names_and_prompts_stay_text_and_can_be_read(tmp_path: Path, page: Page) -> None:
    picture = Path(shutil.copy(SAMPLE, tmp_path / ODD))
    address = look(picture, tmp_path / "out", "--prompt", PROMPT)
    watcher = Watcher(page, own=(address,))
    page.goto(address)
    assert page.title() == f"{ODD}: {PROMPT}"
    expect(page.locator("h1")).to_have_text(f"Inside the model: {ODD}")
    expect(page.locator("dd").first).to_have_text(PROMPT)
    assert (page.locator("dd.answer").text_content() or "").strip()
    assert page.evaluate("window.hurt === undefined && document.querySelectorAll('img').length === 0")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert faint_texts(page, 4.5) == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert width(page) <= 390
    assert watcher.take() == []


def test_the_legend_and_the_keyboard(tmp_path: Path, page: Page) -> None:
    page.goto(look(SAMPLE, tmp_path))
    legend, about = page.locator(".legend"), page.locator(".about")
    expect(legend).to_have_text("Choose what colors the patches.")
    page.locator("button", has_text="attention").click()
    expect(legend).to_have_text(re.compile(r"100 %, stands for \d+\.\d% of the attention\.$"))
    expect(page.locator("button[aria-pressed='true']")).to_have_text("attention")
    page.locator("rect").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(about).to_contain_text("row 2, column 2")
    expect(page.locator("rect").nth(9)).to_have_attribute("stroke", "#000")
    expect(page.locator("rect").first).to_have_attribute("stroke", "#fff")
