"""Checks the types of the scripts with TypeScript's checker: python docs/live/check_types.py

A page is a program of its own: its scripts share one scope, in the order of the page. So each page is checked
alone, with its scripts and with the settings in tsconfig.json, and a script that it forgot is a name that
nobody defined. This is a tool of development, and nothing is fetched: without node and tsc, nothing is
checked. `npm install --no-save typescript` puts tsc where it is found.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> int:
    """Check all pages, and print what is wrong."""
    tsc = find_tsc()
    if tsc is None:
        print("docs/live: types not checked, as there is no node with tsc (npm install --no-save typescript)")
        return 0
    faults = check(HERE, tsc)
    print("\n".join(faults) if faults else f"docs/live: no fault in the types of {len(pages(HERE))} pages")
    return 1 if faults else 0


def find_tsc() -> str | None:
    """TypeScript's checker, of this folder or of the system, if node can run it."""
    if shutil.which("node") is None:
        return None
    return shutil.which("tsc", path=str(ROOT / "node_modules" / ".bin")) or shutil.which("tsc")


def pages(folder: Path) -> list[Path]:
    """The pages of a folder."""
    return sorted(folder.glob("*.html"))


def scripts(page: Path) -> list[Path]:
    """The scripts of a page, without those that build.py writes."""
    named = re.findall(r'<script src="([^"]+)"', page.read_text(encoding="utf-8"))
    return [page.with_name(name) for name in named if page.with_name(name).exists()]


def check(folder: Path, tsc: str) -> list[str]:
    """What is wrong with the scripts of all pages, each fault once."""
    faults: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary) / "tsconfig.json"
        for page in pages(folder):
            files = [folder / "types.d.ts", *scripts(page)]
            settings = {"extends": str(folder / "tsconfig.json"), "files": [str(path) for path in files]}
            project.write_text(json.dumps(settings), encoding="utf-8")
            command = [tsc, "--project", str(project), "--pretty", "false"]
            said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            found = (said.stdout + said.stderr).splitlines()
            faults |= dict.fromkeys(found or [f"tsc failed for {page.name}"] * (said.returncode != 0))
    return list(faults)


if __name__ == "__main__":
    sys.exit(main())
