"""The browsers, JupyterLab, and a folder for pictures of what was seen: build/browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, running_lab, shut_down_kernels
from notebooks_and_sources import ROOT
from playwright.sync_api import Browser, Error, Page, Playwright, expect, sync_playwright

from minivlm.classroom.workshop import write_workshop
from minivlm.world.renderers import BROWSERS, CHROMIUM, QUIET, find_browser

SEEN = ROOT / "build" / "browser"
FIREFOX = "MINIVLM_FIREFOX"  # the environment variable that names one
PATIENCE = 120_000.0  # milliseconds for one step; a machine may have other work
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def driver() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def chromium(driver: Playwright) -> Iterator[Browser]:
    """The system's browser. Where there is none, tests are skipped; under CI=true they fail."""
    path = find_browser()
    if path is None:
        names = ", ".join(BROWSERS)
        message = (
            f"there is no browser ({names}): install one, such as apt-get install chromium, "
            f"or set {CHROMIUM} to its path"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def firefox(driver: Playwright) -> Iterator[Browser]:
    """Playwright's own, or the system's. Tests are skipped without one that it can drive."""
    named = os.environ.get(FIREFOX) or shutil.which("firefox") or shutil.which("firefox-esr")
    if Path(driver.firefox.executable_path).exists() and FIREFOX not in os.environ:
        browser = driver.firefox.launch(timeout=PATIENCE)
    elif named is None:
        pytest.skip(
            f"there is no Firefox: python -m playwright install firefox, or set {FIREFOX} to its path"
        )
    else:
        browser = driver.firefox.launch(channel="moz-firefox", executable_path=named, timeout=PATIENCE)
    try:
        browser.new_page().close()
    except Error as error:
        browser.close()
        pytest.skip(f"Playwright cannot drive {named}: {error.message.splitlines()[0]}")
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    yield from fresh_page(chromium, request.node.name)


def fresh_page(browser: Browser, test: str) -> Iterator[Page]:
    """A page of a fresh profile. What it shows in the end is kept as a picture with the name of the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    yield page
    SEEN.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", test).strip("_")
    page.screenshot(path=SEEN / f"{name}.png")
    context.close()


@pytest.fixture(scope="session")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the notebooks and their figures."""
    folder = tmp_path_factory.mktemp("course")
    for name in ("notebooks", "figures"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    return folder


@pytest.fixture(scope="session")
def workshop(course: Path) -> str:
    """Student copies of the notebooks; where they are in the folder of the course."""
    write_workshop(course / "notebooks", course / "workshop")
    return "workshop"


@pytest.fixture(scope="session")
def server(chromium: Browser, course: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab over the copy, for all tests of this process."""
    with running_lab(course, tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def lab(server: Lab) -> Iterator[Lab]:
    """The same, with no kernels left when the test ends."""
    yield server
    shut_down_kernels(server)
