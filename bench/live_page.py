"""How long does a reader of the live page wait for the first answer, and for one after an edit?

Run: python bench/live_page.py --out bench/results/live_page.txt

The page is opened from the disk in Chromium, as by a double click, each time in a new browser: from then
until the first answer is whole. Then a thing in the picture is moved by a key, ten times, and each time the
page answers anew: from the key to the whole answer. Milliseconds, by the page's own clock.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from attention import processor, spread
from playwright.sync_api import sync_playwright

from minivlm.world.renderers import QUIET, find_browser

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from live.build import write_live

DONE = "page.result !== null && page.result.done && !waiting"
MOVE = """
() => new Promise(told => {
    const before = page.result, start = performance.now();
    const key = new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true });
    document.querySelector("[data-thing='0']").dispatchEvent(key);
    const look = () => page.result !== before && page.result !== null && page.result.done && !waiting
        ? told(performance.now() - start) : setTimeout(look, 2);
    look();
})
"""


def main() -> None:
    """Print both times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="browsers (default: 5)")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    options = parser.parse_args()
    first: list[float] = []
    edits: list[float] = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_live(Path(folder))
        for _ in range(options.rounds):
            browser = playwright.chromium.launch(executable_path=find_browser(), args=list(QUIET))
            version, page = browser.version, browser.new_page()
            page.goto((Path(folder) / "index.html").as_uri(), wait_until="commit")
            page.wait_for_function(f"typeof page === 'object' && {DONE}", polling=5)
            first.append(page.evaluate("performance.now()"))
            page.locator("[data-thing='0']").focus()
            edits += [page.evaluate(MOVE) for _ in range(10)]
            browser.close()
    lines = [f"{processor()}; Chromium {version}; {options.rounds} browsers", ""]
    lines += ["| | ms: median (least to most) |", "|---|---|"]
    lines += [f"| opened, until the first answer | {spread(first, 0)} |"]
    lines += [f"| a thing moved, until the answer | {spread(edits, 0)} |"]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
