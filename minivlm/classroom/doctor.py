"""Is this machine ready for the course? One finding for each thing that goes wrong in a room of laptops.

Versions are compared with constraints.txt, with which the numbers in the notebooks were printed. In a clone
it lies at the top; an installed package has it among its metadata.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import minivlm
from minivlm.checkpoints.devices import free_memory
from minivlm.errors import InputError, extra
from minivlm.models.load import load_answering
from minivlm.world.demo import sample_scene

OLDEST_PYTHON = (3, 11)
MEMORY = 3 * 2**30  # bytes: about one for a kernel, the rest for JupyterLab and a browser
PIP = f"{sys.executable} -m pip install"
SECONDS = 300  # for a kernel to import the package; the first time is slow
KERNEL = "python3"  # the name in every notebook of the course


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    advice: str = ""  # what to do; "" where nothing is wrong

    @property
    def ok(self) -> bool:
        """Whether nothing has to be done."""
        return not self.advice


def examine() -> Iterator[Finding]:
    """All findings, each as soon as it is known. What goes wrong in looking is a finding, too."""
    looks: tuple[Callable[[], Finding], ...] = (python, packages, kernel, threads, memory, model)
    for look in looks:
        try:
            yield look()
        except Exception as error:  # a doctor does not faint
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Finding(look.__name__, found, f"install again: {PIP} --force-reinstall minivlm")


def python() -> Finding:
    """The interpreter."""
    found = f"{sys.version.split()[0]} at {sys.executable}"
    oldest = ".".join(map(str, OLDEST_PYTHON))
    advice = "" if sys.version_info >= OLDEST_PYTHON else f"install Python {oldest} or newer"
    return Finding("python", found, advice)


def packages() -> Finding:
    """Versions of what minivlm and its notebooks need, beside those in constraints.txt."""
    pins = read_pins()
    wrong, wanted = [], []
    needed = sorted(_needed() & pins.keys())
    for name in needed:
        try:
            version = importlib.metadata.version(name).partition("+")[0]  # 2.13.0+cpu
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version != pins[name]:
            wrong.append(f"{name} {version}" + ("" if version == "missing" else f" instead of {pins[name]}"))
            wanted.append(f"{name}=={pins[name]}")
    if not wrong:
        return Finding("packages", f"{len(needed)} as in constraints.txt")
    return Finding("packages", ", ".join(wrong), f"{PIP} {' '.join(wanted)}")


def read_pins() -> dict[str, str]:
    """Package -> version, of constraints.txt.

    Raises FileNotFoundError: it is neither in a clone around the package nor in its metadata.
    """
    path = Path(minivlm.__file__).parents[1] / "constraints.txt"
    if path.is_file():
        text: str | None = path.read_text(encoding="utf-8")
    else:
        text = importlib.metadata.distribution("minivlm").read_text("extra_metadata/constraints.txt")
    if text is None:
        raise FileNotFoundError("constraints.txt is not there")
    found = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in text.splitlines())
    return {_plain(match[1]): match[2] for match in found if match}


def _needed() -> set[str]:
    """Names of the packages that minivlm and its extra [notebooks] list."""
    requirements = importlib.metadata.requires("minivlm") or []
    ours = [
        line for line in requirements if "extra ==" not in line or re.search(r"extra == .notebooks", line)
    ]
    return {_plain(match[0]) for line in ours if (match := re.match(r"[\w.-]+", line))}


def _plain(name: str) -> str:
    """One spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def kernel() -> Finding:
    """Jupyter starts the kernel of the notebooks, and that is this Python."""
    install = f"{sys.executable} -m ipykernel install --sys-prefix --name {KERNEL}"
    try:
        with extra("notebooks"):
            import ipykernel  # noqa: F401
            from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
            from jupyter_client.manager import start_new_kernel
    except InputError:
        return Finding("kernel", "Jupyter is not installed", f"{PIP} 'minivlm[notebooks]'")
    try:
        spec = KernelSpecManager().get_kernel_spec(KERNEL)
    except NoSuchKernel:
        return Finding("kernel", f"Jupyter knows no kernel {KERNEL!r}", install)
    try:
        manager, client = start_new_kernel(SECONDS, KERNEL, stderr=subprocess.DEVNULL)
        try:
            reply: Any = client.execute_interactive(
                "import sys, minivlm",
                user_expressions={"prefix": "sys.prefix"},
                output_hook=lambda message: None,
                timeout=SECONDS,
            )
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
    except Exception as error:  # a kernel has many ways to end
        return Finding("kernel", f"{KERNEL} does not start or answer: {error!r}", install)
    content = reply["content"]
    if content["status"] != "ok":
        found = f"{KERNEL} does not import minivlm: {content.get('evalue')}"
        return Finding("kernel", found, f"{_remove(spec.resource_dir)}{install}")
    prefix = content["user_expressions"]["prefix"]["data"]["text/plain"].strip("'\"")
    if Path(prefix) != Path(sys.prefix):
        return Finding(
            "kernel", f"{KERNEL} is the Python in {prefix}", f"{_remove(spec.resource_dir)}{install}"
        )
    return Finding("kernel", f"{KERNEL} starts, and is this Python")


def _remove(folder: str) -> str:
    """What to do about a kernel that is another Python."""
    return f"remove {folder}, then " if not Path(folder).is_relative_to(sys.prefix) else ""


def threads() -> Finding:
    """More threads than cores wait for each other."""
    count, cores = torch.get_num_threads(), _cores()
    found = f"{count} of PyTorch, {cores} cores"
    return Finding("threads", found, f"export OMP_NUM_THREADS={cores}" if count > cores else "")


def _cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> Finding:
    """Free memory, within the limits of a container; where the system does not tell, all that it has."""
    size = free_memory("cpu")
    if size is None:
        return Finding("memory", "unknown on this system")
    wanted = f"close other programs: a notebook and a browser want {MEMORY / 2**30:.0f} GiB"
    return Finding("memory", f"{size / 2**30:.1f} GiB", wanted if size < MEMORY else "")


def model() -> Finding:
    """The shipped model answers a question about a picture, and right."""
    scene, (_, example, *_) = sample_scene(0)
    paligemma, processor = load_answering()
    inputs: dict[str, Any] = processor([scene.draw(256)], [example.prefix])
    answer = processor.decode(paligemma.generate(**inputs))[0]
    found = f"{example.prefix} {answer}"
    if answer != example.suffix:
        return Finding("model", found, f"the answer is {example.suffix!r}: {PIP} --force-reinstall minivlm")
    return Finding("model", found)
