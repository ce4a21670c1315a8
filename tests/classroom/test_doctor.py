"""`minivlm doctor`: OK, or FAIL with something to do, and an exit code that says so."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from notebooks_and_sources import ROOT

from minivlm.checkpoints.devices import free_memory
from minivlm.classroom import doctor
from minivlm.classroom.doctor import Finding
from minivlm.cli import main


def test_this_machine_has_a_kernel_and_a_model() -> None:
    """A real kernel is started."""
    for finding in (doctor.python(), doctor.kernel(), doctor.model()):
        assert finding.ok, finding
    assert doctor.kernel().found == "python3 starts, and is this Python"
    assert doctor.model().found == "what color is the triangle? blue"


def test_output_and_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Finding("python", "3.11"), Finding("memory", "1.0 GiB", "close other programs")
    monkeypatch.setattr(doctor, "examine", lambda: iter([good]))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "OK    python    3.11\nThis machine is ready.\n"
    monkeypatch.setattr(doctor, "examine", lambda: iter([good, bad]))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["FAIL  memory    1.0 GiB", "      what to do: close other programs"]


def test_an_error_while_looking_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise RuntimeError("no\nmodel")

    fine = Finding("any", "fine")
    for name in ("python", "packages", "kernel", "threads", "memory"):
        monkeypatch.setattr(doctor, name, lambda: fine)
    monkeypatch.setattr(doctor, "model", broken)
    *others, last = doctor.examine()
    assert others == [fine] * 5
    assert (last.name, last.found, last.ok) == ("broken", "RuntimeError: no model", False)


def versions(**changes: str | None) -> Callable[[str], str]:
    """Pinned versions, but for some; None is a package that is missing."""
    pins = doctor.read_pins()

    def version(name: str) -> str:
        found = changes.get(name, pins[name])
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    return version


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = doctor.read_pins()
    monkeypatch.setattr(importlib.metadata, "version", versions(torch=f"{pins['torch']}+cpu"))
    finding = doctor.packages()
    assert finding.ok
    assert finding.found == "11 as in constraints.txt"
    monkeypatch.setattr(importlib.metadata, "version", versions(torch="2.4.0", nbval=None))
    finding = doctor.packages()
    assert finding.found == f"nbval missing, torch 2.4.0 instead of {pins['torch']}"
    assert finding.advice.endswith(f"pip install nbval=={pins['nbval']} torch=={pins['torch']}")
    assert finding.advice.startswith(sys.executable)


def test_pins_travel_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a clone, the file lies above the package; installed from a wheel, among the metadata."""
    package = tmp_path / "minivlm"
    package.mkdir()
    metadata = tmp_path / "minivlm-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: minivlm\n")
    monkeypatch.setattr(doctor.minivlm, "__file__", str(package / "__init__.py"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"constraints\.txt"):
        doctor.read_pins()
    (metadata / "extra_metadata").mkdir()
    (metadata / "extra_metadata/constraints.txt").write_text("torch==2.0\n")
    assert doctor.read_pins() == {"torch": "2.0"}
    (tmp_path / "constraints.txt").write_text("# comment\nPy_YAML==1.0\n")
    assert doctor.read_pins() == {"py-yaml": "1.0"}


def test_the_wheel_holds_the_pins() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wheel = tomllib.loads(text)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["extra-metadata"] == {"constraints.txt": "constraints.txt"}


def write_kernel(folder: Path, command: list[str]) -> None:
    (folder / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": command, "display_name": "Another", "language": "python"}
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))


def test_a_kernel_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kernel(
        tmp_path, [str(tmp_path / "no-such-python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    finding = doctor.kernel()
    assert "does not start or answer" in finding.found
    assert finding.advice.endswith("ipykernel install --sys-prefix --name python3")


def test_a_kernel_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = (
        "import sys; sys.prefix = '/other'; from ipykernel.kernelapp import launch_new_instance as l; l()"
    )
    write_kernel(tmp_path, [sys.executable, "-c", launcher, "-f", "{connection_file}"])
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    finding = doctor.kernel()
    assert finding.found == "python3 is the Python in /other"
    assert finding.advice.startswith(f"remove {tmp_path / 'kernels' / 'python3'}, then ")


def test_no_jupyter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    finding = doctor.kernel()
    assert finding.found == "Jupyter is not installed"
    assert "pip install 'minivlm[notebooks]'" in finding.advice


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 4)
    for count, ok in ((1, True), (4, True), (5, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        finding = doctor.threads()
        assert (finding.ok, finding.found) == (ok, f"{count} of PyTorch, 4 cores")
    assert finding.advice == "export OMP_NUM_THREADS=4"


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, ok, found in ((None, True, "unknown"), (2**30, False, "1.0 GiB"), (2**34, True, "16.0 GiB")):
        monkeypatch.setattr(doctor, "free_memory", lambda device, size=size: size)
        finding = doctor.memory()
        assert finding.ok is ok
        assert found in finding.found


def test_memory_is_that_of_this_process() -> None:
    free = free_memory("cpu")
    if free is None:
        pytest.skip("this system does not tell")
    found = re.fullmatch(r"(\d+\.\d) GiB", doctor.memory().found)
    assert found is not None
    assert float(found[1]) == pytest.approx(free / 2**30, abs=2)


def test_a_model_that_answers_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        model, processor = real()
        monkeypatch.setattr(type(processor), "decode", lambda *_: ["red"])
        return model, processor

    real = doctor.load_answering
    monkeypatch.setattr(doctor, "load_answering", load)
    finding = doctor.model()
    assert finding.found == "what color is the triangle? red"
    assert "the answer is 'blue'" in finding.advice
