"""The files that set up the environment agree: pyproject, constraints, environment.yml, Makefile and README.

No conda channel is asked here: environment.yml is parsed and compared, not solved.
"""

import re
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    """What the package and all its extras ask for, but for references to its own extras."""
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return [r for r in map(Requirement, chain(*lists)) if r.name != project()["name"]]


@cache
def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line) for line in lines]
    wrong = [line for line, match in zip(lines, found, strict=True) if match is None]
    assert not wrong, f"constraints.txt holds lines that are not `name==version`: {wrong}"
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


def conda_and_pip() -> tuple[list[str], list[str]]:
    """The two lists of environment.yml."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_part,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    return [entry for entry in listed if isinstance(entry, str)], pip_part


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert name in pins(), f"{name} has no pin: make constraints.txt again (its first lines say how)"
    assert requirement.specifier.contains(pins()[name], prereleases=True)


def test_pins_hold_on_every_platform() -> None:
    local = [f"{name}=={version}" for name, version in pins().items() if version.local]
    assert not local, f"these name the build of one platform: {local}"


def test_conda_has_the_pythons_that_the_package_supports() -> None:
    conda, _ = conda_and_pip()
    asked = {(r := Requirement(entry)).name: r.specifier for entry in conda}
    assert set(asked) == {"python", "pip"}, "only Python and pip come from conda"

    classifier = re.compile(r"Programming Language :: Python :: (3\.\d+)")
    supported = {match[1] for text in project()["classifiers"] if (match := classifier.fullmatch(text))}
    candidates = {f"3.{minor}" for minor in range(8, 30)}
    assert {v for v in candidates if asked["python"].contains(v)} == supported
    lowest = min(supported, key=Version)
    assert SpecifierSet(project()["requires-python"]) == SpecifierSet(f">={lowest}")


def test_conda_installs_what_pyproject_lists() -> None:
    _, pip_part = conda_and_pip()
    options = [line for line in pip_part if line.startswith("-")]
    assert options == pip_part, "a package by name belongs into pyproject.toml, not into environment.yml"

    index = re.search(r"^TORCH_INDEX\s*\?=\s*(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert index, "the Makefile gives TORCH_INDEX no default"
    # Hugging Face's datasets and TensorBoard are large, and nothing of the course needs them.
    large = ("datasets", "tensorboard")
    extras = ",".join(name for name in project()["optional-dependencies"] if name not in large)
    assert pip_part == ["-c constraints.txt", f"--extra-index-url {index[1]}", f"-e .[{extras}]"]


@pytest.mark.parametrize("target", ["demo", "test", "lab", "notebooks", "book", "wheel"])
def test_readme_names_each_command(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"make {target}" in (ROOT / "README.md").read_text()
