"""How a message calls the program: the command that works in this shell, from this folder.

Environments are folders with empty scripts; only the last test starts what was printed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from notebooks_and_sources import ROOT

from minivlm.classroom import doctor
from minivlm.cli import main
from minivlm.cli.program import command

pytestmark = pytest.mark.skipif(os.name == "nt", reason="scripts of Windows have other names")


class Place:
    """An environment below a folder, which is also the current one, and no other program on PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.use(self.make("clone/.venv/bin"))
        self.go("clone")
        self.switch_on()

    def make(self, name: str, *programs: str) -> Path:
        """A folder with the scripts of an environment."""
        scripts = self.folder / name
        scripts.mkdir(parents=True)
        for program in programs or ("minivlm", "python3"):
            (scripts / program).touch(mode=0o755)
        return scripts

    def use(self, scripts: Path) -> None:
        """Let the program run in this environment."""
        self.monkeypatch.setattr(sysconfig, "get_path", lambda name: {"scripts": str(scripts)}[name])
        self.monkeypatch.setattr(sys, "executable", str(scripts / "python3"))

    def switch_on(self, *scripts: Path) -> None:
        """Put these folders, and no others, on PATH."""
        self.monkeypatch.setenv("PATH", os.pathsep.join(map(str, scripts)))

    def go(self, name: str) -> None:
        """Change the current folder."""
        (self.folder / name).mkdir(exist_ok=True)
        self.monkeypatch.chdir(self.folder / name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path.resolve(), monkeypatch)


def test_in_a_clone_whose_environment_is_not_switched_on(place: Place) -> None:
    assert command("eval") == ".venv/bin/minivlm eval"


def test_an_environment_of_another_name(place: Place) -> None:
    """docs/teaching.md calls it course."""
    place.use(place.make("clone/course/bin"))
    assert command("doctor") == "course/bin/minivlm doctor"


def test_an_environment_that_is_switched_on(place: Place) -> None:
    place.switch_on(place.folder / "clone/.venv/bin")
    assert command("eval") == "minivlm eval"
    place.go("elsewhere")
    assert command("eval") == "minivlm eval"


def test_a_link_to_the_script(place: Place) -> None:
    """As pipx and uv install tools."""
    links = place.make("links", "other")
    (links / "minivlm").symlink_to(place.folder / "clone/.venv/bin/minivlm")
    place.switch_on(links)
    place.go("elsewhere")
    assert command("eval") == "minivlm eval"


def test_the_script_of_another_environment(place: Place) -> None:
    """`minivlm` would be another program; so would `python3`."""
    place.switch_on(place.make("other/bin"))
    assert command("eval") == ".venv/bin/minivlm eval"
    place.go("elsewhere")
    assert command("eval") == f"{place.folder}/clone/.venv/bin/python3 -m minivlm eval"


def test_pythons_that_are_one_file(place: Place) -> None:
    """Each environment has a link to the Python that made it, which does not find the package."""
    system = place.make("system", "python3")
    mine = place.make("my env", "other")
    (mine / "python3").symlink_to(system / "python3")
    place.use(mine)
    place.switch_on(system)
    assert command("eval") == f"'{mine}/python3' -m minivlm eval"


def test_no_script(place: Place) -> None:
    """The package is used where it lies, by the Python on PATH."""
    scripts = place.make("clone/bare/bin", "python3")
    place.use(scripts)
    place.switch_on(scripts)
    assert command("eval") == "python3 -m minivlm eval"


def test_arguments_are_quoted(place: Place) -> None:
    line = command("ask", Path("my photo.jpg"), "--prompt", "caption en")
    assert shlex.split(line) == [".venv/bin/minivlm", "ask", "my photo.jpg", "--prompt", "caption en"]


def test_advice_of_the_doctor(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("memory", "1 GiB", "close some")]))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("1 to fix, then run .venv/bin/minivlm doctor again.\n")


@pytest.mark.parametrize("here", [True, False], ids=["in the clone", "elsewhere"])
def test_what_is_printed_works(here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this environment, by a shell that knows only the programs of the system."""
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(ROOT if here else tmp_path)
    done = subprocess.run(command("demo", "--help"), shell=True, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: minivlm demo")
