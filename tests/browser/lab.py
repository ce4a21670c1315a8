"""JupyterLab as a reader has it: a real server, notebooks opened in a browser and run through the menus."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import nbformat
from nbformat import NotebookNode
from playwright.sync_api import Locator, Page, expect

PORT = 8888  # Jupyter's own; a server that finds it in use takes another
START_SECONDS = 180.0
RUN_SECONDS = 2700.0  # 07_training takes six minutes on a core of its own; beside other work, four times that
# No question whether to fetch news, which would lie over the notebook.
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


@dataclass(frozen=True)
class Lab:
    """A server that runs, and the folder that it shows."""

    url: str  # ends with a slash
    port: int
    token: str
    folder: Path


class LabError(RuntimeError):
    """JupyterLab did what it should not; the message holds what it logged."""


@contextmanager
def running_lab(folder: Path, scratch: Path, port: int = PORT, options: Sequence[str] = ()) -> Iterator[Lab]:
    """JupyterLab over `folder`, with settings and state of its own in `scratch`.

    Raises LabError: it ended, or was not ready in time.
    """
    places = {
        "JUPYTER_CONFIG_DIR": scratch / "config",
        "JUPYTER_DATA_DIR": scratch / "data",
        "JUPYTER_RUNTIME_DIR": scratch / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": scratch / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": scratch / "workspaces",
        "IPYTHONDIR": scratch / "ipython",
    }
    for place in places.values():
        place.mkdir(parents=True)
    (places["JUPYTER_CONFIG_DIR"] / "labconfig").mkdir()
    overrides = places["JUPYTER_CONFIG_DIR"] / "labconfig" / "default_setting_overrides.json"
    overrides.write_text(json.dumps(SETTINGS))

    token = secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
        *(f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        *options,
    ]
    # One thread, as when the outputs were stored: sums are added in the same order.
    environment = os.environ | {name: str(place) for name, place in places.items()} | {"OMP_NUM_THREADS": "1"}
    log = scratch / "jupyterlab.log"
    with log.open("wb") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=scratch)
    try:
        yield Lab(token=token, folder=folder, **_wait_for_start(server, places["JUPYTER_RUNTIME_DIR"], log))
    finally:
        server.terminate()  # the server ends its kernels
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for_start(server: subprocess.Popen[bytes], runtime: Path, log: Path) -> dict[str, Any]:
    """Address and port, which the server writes down once it listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise LabError(f"JupyterLab ended with exit code {server.returncode}:\n{log.read_text()}")
        found = runtime / f"jpserver-{server.pid}.json"
        if found.exists() and found.read_text().strip():
            about = json.loads(found.read_text())
            return {"url": about["url"], "port": about["port"]}
        time.sleep(0.1)
    raise LabError(f"JupyterLab was not ready after {START_SECONDS:g} s:\n{log.read_text()}")


def shut_down_kernels(lab: Lab) -> None:
    """End all kernels: each holds PyTorch in memory."""
    for kernel in json.loads(_ask(lab, "GET", "api/kernels")):
        _ask(lab, "DELETE", f"api/kernels/{kernel['id']}")


def _ask(lab: Lab, method: str, path: str) -> bytes:
    request = Request(lab.url + path, method=method, headers={"Authorization": f"token {lab.token}"})
    with urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
    return content


def open_notebook(page: Page, lab: Lab, path: str) -> None:
    """Open a notebook of the lab's folder, and wait for its kernel."""
    page.goto(f"{lab.url}lab/tree/{path}?token={lab.token}&reset")
    # The status bar, since the notebook's own indicator says "idle" before there is a kernel.
    status = page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle")
    expect(status).to_be_visible(timeout=START_SECONDS * 1000)
    expect(page.locator(".jp-Notebook .jp-Cell").first).to_be_visible()


def choose(page: Page, menu: str, entry: str) -> None:
    """Click on an entry of the menu bar."""
    page.get_by_role("menubar").get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=entry, exact=True).click()


def save(page: Page) -> None:
    """Save the notebook, and wait until the server has written it."""
    with page.expect_response(lambda r: r.request.method == "PUT" and "/api/contents/" in r.url) as written:
        page.keyboard.press("Control+s")
    assert written.value.ok, f"saving failed: {written.value.status}"


def read_notebook(path: Path) -> NotebookNode:
    """A notebook, with texts as one string each."""
    return nbformat.read(path, as_version=4)


def run_all(page: Page, lab: Lab, path: str, seconds: float = RUN_SECONDS) -> NotebookNode:
    """Open a notebook, clear its outputs, run all its cells, save it. Returns what was saved.

    It ends when all cells have run, or one has failed: the saved file says so, and not the page, which shows
    "idle" also in the moment before the first cell begins.

    Raises LabError: it takes longer than `seconds`.
    """
    open_notebook(page, lab, path)
    choose(page, "Edit", "Clear Outputs of All Cells")
    choose(page, "Run", "Run All Cells")
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        _wait_until_idle(page, left)
        save(page)
        notebook = read_notebook(lab.folder / path)
        if _has_ended(notebook):
            return notebook
        page.wait_for_timeout(500)
    raise LabError(f"{path} had cells left to run after {seconds:g} s")


def cell_with(page: Page, source: str) -> Locator:
    """The code cell that holds a text."""
    cell = page.locator(".jp-Notebook .jp-CodeCell").filter(
        has=page.locator(".jp-InputArea").get_by_text(source)
    )
    expect(cell).to_have_count(1)
    return cell


def type_instead_of(page: Page, cell: Locator, line: str, lines: Sequence[str]) -> None:
    """Put the cursor into a line of a cell, and replace it by lines of the same indentation, key by key.

    The editor indents a new line as the one before and closes brackets; keys that close them again pass over.
    """
    cell.locator(".cm-line", has_text=line).click()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+End")
    for number, text in enumerate(lines):
        if number:
            page.keyboard.press("Enter")
        page.keyboard.type(text)


def _has_ended(notebook: NotebookNode) -> bool:
    """Whether every cell has run, or one failed that may not, after which Jupyter runs no more."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    stopped = any(
        output["output_type"] == "error"
        for cell in cells
        if "raises-exception" not in cell["metadata"].get("tags", [])
        for output in cell["outputs"]
    )
    return stopped or all(cell["execution_count"] is not None for cell in cells)


def _wait_until_idle(page: Page, seconds: float) -> None:
    indicator = page.locator(".jp-Notebook-ExecutionIndicator")
    expect(indicator).to_have_attribute("data-status", "idle", timeout=seconds * 1000)
