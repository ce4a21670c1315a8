"""The files around the code: citation, changelog, the workflow, the hooks and the container.

Nothing here is run. The files are read and compared with what they speak of, since a workflow that drifted
away from the Makefile would be noticed only where it runs.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import minivlm

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def recipe(target: str) -> list[str]:
    """The commands of a target as make runs them with `python` in the place of the environment's."""
    text = MAKEFILE.replace("\\\n", " ")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    variables = dict(re.findall(r"^(\w+)\s*:=\s*(.*)$", text, re.MULTILINE))
    commands = found[1].replace("$(NBVAL)", variables["NBVAL"]).replace("$(BIN)/", "")
    lines = [" ".join(shlex.split(line)) for line in commands.splitlines()]
    return [line.removeprefix("OMP_NUM_THREADS=1 ") for line in lines if not line.startswith("rm ")]


def test_citation() -> None:
    citation = load("CITATION.cff")
    assert set(citation) >= {"cff-version", "message", "title", "authors"}, "what the format requires"
    assert citation["version"] == minivlm.__version__
    assert citation["license"] == "Apache-2.0"
    assert all("name" in author or "family-names" in author for author in citation["authors"])


def test_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert versions[0] == minivlm.__version__
    kinds = set(re.findall(r"^### (.*)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


JOBS = ("lint", "unit", "nbval", "browser", "wheel")


def test_workflow_has_a_job_for_each_part() -> None:
    jobs = load(".github/workflows/test.yml")["jobs"]
    assert tuple(jobs) == JOBS
    assert all("needs" not in job for job in jobs.values()), "a failure in one job would hide the others"
    for name in ("unit", "nbval"):
        matrix = jobs[name]["strategy"]["matrix"]
        assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}
        assert len(matrix["python"]) == 2


@pytest.mark.parametrize("name", JOBS)
def test_workflow_runs_what_make_runs(name: str) -> None:
    job = load(".github/workflows/test.yml")["jobs"][name]
    commands = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    without_make = commands.pop("Without make", None)
    ((_, with_make),) = commands.items()
    make, *words = shlex.split(with_make)
    variables = [word for word in words if "=" in word]
    targets = [word for word in words if "=" not in word]
    assert make == "make"
    assert targets == ["test-browser" if name == "browser" else name]
    assert all(f"$({variable.partition('=')[0]})" in MAKEFILE for variable in variables)
    if without_make is not None:
        install, *rest = [" ".join(shlex.split(line)) for line in without_make.splitlines()]
        assert install == "python -m pip install -c constraints.txt -e .[dev]"
        assert rest == [command for target in targets for command in recipe(target)]


def test_make_test_runs_every_part_also_after_a_failure(tmp_path: Path) -> None:
    """With an environment whose Python fails at everything, and says what it was asked for."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    python.chmod(0o755)
    for name in ("torch", "notebooks", "book", "dev"):
        (tmp_path / f".ready-{name}").touch()
    command = ["make", "-C", str(ROOT), "test", f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "make test: failed in: lint unit nbval" in done.stderr
    for part in ("ruff check", "docs/book/build.py", "--nbval"):
        assert any(part in line and not line.startswith("OMP") for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("needs", "warned"), [("nvidia-cublas==13.1; platform_system == 'Linux'", True), ("sympy", False)]
)
def test_make_warns_before_it_fetches_cuda(needs: str, warned: bool, tmp_path: Path) -> None:
    """With a pip that does nothing, and metadata of a torch of ours."""
    metadata = tmp_path / "packages" / "torch-2.13.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\nRequires-Dist: {needs}\n")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && exit 0\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    command = ["make", "-C", str(ROOT), f"VENV={tmp_path}", f"{tmp_path}/.ready-torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ("5.1 GB in all instead of 1.4" in done.stderr) == (warned and sys.platform == "linux")
    assert ("TORCH_INDEX=" in done.stderr) == (warned and sys.platform == "linux")


def test_make_passes_flags_to_the_lab(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "jupyter-lab", "minivlm"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\necho "asked: $@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("torch", "notebooks"):
        (tmp_path / f".ready-{name}").touch()
    command = ["make", "-C", str(ROOT), "lab", f"VENV={tmp_path}", "LAB_ARGS=--allow-root --no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "asked: workshop mine --keep --solutions" in done.stdout
    assert "asked: --allow-root --no-browser --LabApp" in done.stdout


@pytest.mark.parametrize("target", ["test", "book"])
def test_make_says_beforehand_how_long_it_takes(target: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho work\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    for name in ("torch", "notebooks", "book", "dev"):
        (tmp_path / f".ready-{name}").touch()
    command = ["make", "-C", str(ROOT), target, f"VENV={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, worked = done.stdout.index(f"make {target}: about "), done.stdout.index("\nwork\n")
    assert said < worked


def test_hooks_call_tools_that_make_test_calls() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    for hook in repository["hooks"]:
        program, option, module, *_ = shlex.split(hook["entry"])
        assert (program, option) == (".venv/bin/python", "-m")
        assert find_spec(module), f"{module} is not installed"
        assert any(f"-m {module}" in command for command in recipe("lint"))


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_issue_forms(name: str) -> None:
    form = load(f".github/ISSUE_TEMPLATE/{name}")
    assert set(form) == {"name", "description", "body"}
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_container_calls_targets_that_exist() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    command, target = container["postCreateCommand"].split()
    assert command == "make"
    assert recipe(target)


DOCUMENTS = ["CONTRIBUTING.md", "README.md", ".github/pull_request_template.md", "bench/README.md"]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES])
def test_documents_name_what_exists(document: str) -> None:
    """Every `make` target, and every file of the repository, that a document names in code."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)", text):
        assert recipe(target)
    for path in re.findall(
        r"`((?:minivlm|tests|notebooks|docs|figures|bench|\.github|\.devcontainer)/[\w./]+)`", text
    ):
        if not re.search(r"NN|NAME", path):  # stands for a name that the reader chooses
            assert (ROOT / path).exists(), f"{document} speaks of {path}"


def test_names_of_test_files_differ() -> None:
    """pytest imports them by name, whatever folder they lie in, and refuses the second one of a name."""
    names = Counter(path.name for path in ROOT.glob("tests/**/test_*.py"))
    assert not [name for name, times in names.items() if times > 1]
