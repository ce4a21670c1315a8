"""Installs a wheel into an empty environment and runs the demonstration there: python tests/try_wheel.py dist

The environment sees the packages of the one that runs this script, but not this repository, and pip may
neither fetch nor build anything. What is tried is therefore the wheel itself: that it holds every module, the
shipped model and the command.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "caption en"


def main(folder: Path) -> None:
    """Try the one wheel that lies in a folder. Raises CalledProcessError or AssertionError."""
    (wheel,) = folder.glob("*.whl")
    check_content(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        place, empty = Path(scratch) / "venv", Path(scratch) / "empty"
        empty.mkdir()
        python = install(wheel, place)
        command = python.with_name("minivlm" + python.suffix)

        # Neither this repository nor anything else that the caller's shell names may be found.
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

        def run(*arguments: str | Path) -> str:
            return subprocess.run(
                arguments,
                cwd=empty,
                env=quiet,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            ).stdout

        home = Path(run(python, "-c", "import minivlm; print(minivlm.__file__)").strip())
        assert home.is_relative_to(place.resolve()), (
            f"minivlm was found in {home}, and not in the environment"
        )
        shown = run(command, "demo")
        assert PROMPT in shown, shown
        assert not re.search("figures|make lab", shown), (
            "the demonstration speaks of what only the repository has"
        )
        pictures = sorted(path.name for path in (empty / "demo").glob("*.png"))
        assert pictures == [f"scene_{number}.png" for number in range(1, 7)], pictures
        answer = run(command, "ask", Path("demo", "samples", "scene_1.png"), "--prompt", PROMPT)
        described = answer.splitlines()[1]
        assert described, f"`ask` says nothing about a picture:\n{answer}"
        assert described in shown, (
            f"`ask` says {described!r} about a picture of which `demo` says another thing:\n{shown}"
        )
    print(
        f"{wheel.name}: installed into an empty environment, where `minivlm demo` and `minivlm ask` answer."
    )


def check_content(wheel: Path) -> None:
    """Every file of the package that git would keep is in the wheel, and nothing else is."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "minivlm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected, f"missing: {sorted(expected - held)}, not expected: {sorted(held - expected)}"


def install(wheel: Path, place: Path) -> Path:
    """A new environment with the wheel, and the path of its Python."""
    venv.create(place, with_pip=False)
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(place), "platbase": str(place)}))
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python)]
    options = ["--no-deps", "--no-index", "--force-reinstall", "--no-warn-script-location"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True)
    return python


if __name__ == "__main__":
    main(Path(sys.argv[1]))
