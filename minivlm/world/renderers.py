"""The same scenes drawn by other programs: matplotlib and a browser.

A model that has learned shapes, rather than the pixels of one program, gives the same answers about all of
them. Background, colors, positions and noise are those of `Scene.draw`. Only the edges differ: each program
has its own way of blending the colors of a pixel that a shape covers in part.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from minivlm.errors import InputError
from minivlm.world.scenes import Scene, Thing

if TYPE_CHECKING:
    from matplotlib.patches import Patch

CHROMIUM = "MINIVLM_CHROMIUM"  # the environment variable that names the browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCENES_PER_ROW = 20  # of a page
SCENES_PER_PAGE = 400
SECONDS_PER_PAGE = 120.0
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--force-color-profile=srgb",
)


def draw_with_matplotlib(scenes: Sequence[Scene], pixels: int = 64) -> list[Image.Image]:
    """Circles and polygons as matplotlib's Agg draws them, with the scene's noise."""
    from matplotlib.figure import Figure  # half a second, so only where it is needed

    figure = Figure(dpi=1)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    pictures = []
    for scene in scenes:
        height = _height(scene, pixels)
        figure.set_size_inches(pixels, height)
        axes.set(xlim=(0, scene.width), ylim=(height * scene.width / pixels, 0))  # y points down
        patches = [axes.add_patch(_patch(thing)) for thing in scene.things]
        file = io.BytesIO()
        figure.savefig(file, format="rgba", dpi=1, facecolor=_hex(scene.ground))
        rgba = np.frombuffer(file.getvalue(), dtype=np.uint8).reshape(height, pixels, 4)
        pictures.append(_with_noise(rgba[..., :3], scene))
        for patch in patches:
            patch.remove()
    return pictures


def _patch(thing: Thing) -> Patch:
    from matplotlib.patches import Circle, Polygon

    patch: Patch
    if thing.shape == "circle":
        patch = Circle((thing.x, thing.y), thing.radius)
    else:
        patch = Polygon(thing.outline)
    # A line around the shape would make it larger, and snapping would move its edges to whole pixels.
    patch.set(facecolor=_hex(thing.rgb), linewidth=0.0, antialiased=True, snap=False)
    return patch


def find_browser() -> str | None:
    """The path of a Chromium, or None if there is none.

    Raises InputError: MINIVLM_CHROMIUM names no program.
    """
    named = os.environ.get(CHROMIUM)
    if named:
        if shutil.which(named) is None:
            raise InputError(
                f"{CHROMIUM} is {named!r}, which is not a program: set it to a Chromium, or unset it"
            )
        return shutil.which(named)
    return next((path for path in map(shutil.which, BROWSERS) if path is not None), None)


def draw_with_browser(scenes: Sequence[Scene], pixels: int = 64) -> list[Image.Image]:
    """SVG as headless Chromium draws it, with the scene's noise; many scenes per page.

    Raises InputError: there is no browser, it fails, or it takes too long.
    """
    browser = find_browser()
    if browser is None:
        raise InputError(f"no {', '.join(BROWSERS)} was found: install one, or set {CHROMIUM} to its path")
    pictures = []
    for start in range(0, len(scenes), SCENES_PER_PAGE):
        shown = scenes[start : start + SCENES_PER_PAGE]
        rows = -(-len(shown) // SCENES_PER_ROW)  # rounded up
        high = _row_height(shown, pixels)
        page = _take_picture(browser, as_html(shown, pixels), pixels * SCENES_PER_ROW, high * rows)
        for number, scene in enumerate(shown):
            row, column = divmod(number, SCENES_PER_ROW)
            cut = page[row * high :, column * pixels :][: _height(scene, pixels), :pixels]
            pictures.append(_with_noise(cut, scene))
    return pictures


def as_html(scenes: Sequence[Scene], pixels: int) -> str:
    """A page with a grid of scenes, left to right and top to bottom."""
    cells, high = [], _row_height(scenes, pixels)
    for number, scene in enumerate(scenes):
        row, column = divmod(number, SCENES_PER_ROW)
        height = _height(scene, pixels)
        shapes = "".join(_svg(thing) for thing in scene.things)
        cells.append(
            f'<svg viewBox="0 0 {scene.width:g} {height * scene.width / pixels:g}" '
            f'width="{pixels}" height="{height}" '
            f'style="position:absolute;left:{column * pixels}px;top:{row * high}px;'
            f'background:{_hex(scene.ground)}">{shapes}</svg>'
        )
    return f'<!doctype html><html><body style="margin:0">{"".join(cells)}</body></html>'


def _height(scene: Scene, pixels: int) -> int:
    """Of a picture that is so many pixels wide; `Scene.draw` rounds in the same way."""
    return round(pixels * scene.height / scene.width)


def _row_height(scenes: Sequence[Scene], pixels: int) -> int:
    """Of a row of a page: that of the highest picture."""
    return max(_height(scene, pixels) for scene in scenes)


def _svg(thing: Thing) -> str:
    fill = _hex(thing.rgb)
    if thing.shape == "circle":
        return f'<circle cx="{thing.x:.4f}" cy="{thing.y:.4f}" r="{thing.radius:.4f}" fill="{fill}"/>'
    points = " ".join(f"{x:.4f},{y:.4f}" for x, y in thing.outline)
    return f'<polygon points="{points}" fill="{fill}"/>'


def _take_picture(browser: str, html: str, width: int, height: int) -> np.ndarray:
    """The page as the browser shows it, [height, width, 3]."""
    with tempfile.TemporaryDirectory(prefix="minivlm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "page.html").write_text(html, encoding="utf-8")
        command = [
            browser,
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},{height}",
            f"--screenshot={folder / 'page.png'}",
            (folder / "page.html").as_uri(),
        ]
        try:
            with (folder / "said.txt").open("wb") as said:
                done = subprocess.run(
                    command, stdout=said, stderr=said, timeout=SECONDS_PER_PAGE, check=False
                )
            if not (folder / "page.png").exists():
                lines = (folder / "said.txt").read_text(errors="replace").split("\n")
                raise _refusal(browser, f"drew nothing (exit code {done.returncode}; {lines[0]!r})")
            with Image.open(folder / "page.png") as picture:
                page = np.asarray(picture.convert("RGB"))
        except subprocess.TimeoutExpired as error:
            raise _refusal(browser, f"took more than {SECONDS_PER_PAGE:g} seconds for a page") from error
        except OSError as error:
            raise _refusal(browser, f"did not work ({error})") from error
    if page.shape != (height, width, 3):
        raise _refusal(browser, f"drew {page.shape[1]} x {page.shape[0]} pixels, not {width} x {height}")
    return page


def _refusal(browser: str, what: str) -> InputError:
    return InputError(f"{browser} {what}: set {CHROMIUM} to another browser, or leave out the column browser")


def _with_noise(picture: np.ndarray, scene: Scene) -> Image.Image:
    """A picture [height, width, 3] with the noise that `Scene.draw` adds to an empty background."""
    ground = replace(scene, things=(), background=128, tint=(0, 0, 0))
    noise = np.asarray(ground.draw(picture.shape[1]), dtype=np.int64) - 128
    return Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8))


def _hex(rgb: tuple[int, ...]) -> str:
    return "#" + "".join(f"{value:02x}" for value in rgb)
