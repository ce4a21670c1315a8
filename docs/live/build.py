"""Builds the live page: python docs/live/build.py [FOLDER], by default into build/live.

The folder opens by a double click on its index.html, and needs no server. It holds the files that lie beside
this script, and two that are written here: weights.js, with the settings, the tokenizer, the weights of the
shipped model, the colors and sizes of the drawn world, and the sample scenes; and two_towers_weights.js, with
the same of the shipped SigLIP.

A page that was opened from the disk may load scripts, and nothing else. So everything is a script.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHIPPED = {".html", ".css", ".js"}
WRITTEN = "weights.js"
WRITTEN_FOR_TOWERS = "two_towers_weights.js"


def main(arguments: list[str]) -> int:
    """Build the page, and say where it is."""
    parser = argparse.ArgumentParser(description="Builds the live page, which opens by a double click.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "live", help="where to")
    folder: Path = parser.parse_args(arguments).folder
    write_live(folder)
    print(f"The page is in {folder}: open {folder / 'index.html'} in a browser.")
    return 0


def write_live(folder: Path, book: str | None = None) -> None:
    """The whole page, in a folder of its own; `book` is the way to the book, if it is part of one."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.iterdir()):
        if path.suffix in SHIPPED:
            shutil.copyfile(path, folder / path.name)
    shared = {"DRAWN_WORLD": drawn_world(), "BOOK": book}
    write_script(folder / WRITTEN, {"CHECKPOINT": checkpoint(), **shared})
    write_script(folder / WRITTEN_FOR_TOWERS, {"TWO_TOWERS": two_towers(), **shared})


def write_script(path: Path, parts: dict[str, Any]) -> None:
    """Values as constants of JavaScript."""
    lines = [f"const {name} = {json.dumps(value, separators=(',', ':'))};" for name, value in parts.items()]
    path.write_text("\n".join(["// Written by docs/live/build.py", *lines, ""]), encoding="utf-8")


def checkpoint() -> dict[str, Any]:
    """The shipped model and the codebook of masks, with their settings."""
    from minivlm.models.load import SHIPPED as TINY
    from minivlm.models.load import load_answering
    from minivlm.processing.masks import load_codebook

    model, _ = load_answering()
    read = settings(TINY)
    # The file has an older name of it; the package's is that of newer files.
    read["config"]["image_token_id"] = model.config.image_token_id
    return {**read, "model": as_text(model), "codebook": as_text(load_codebook())}


def two_towers() -> dict[str, Any]:
    """The shipped SigLIP with its settings."""
    from minivlm.models.load import MINIATURES, load

    folder = MINIATURES / "magic"  # whose pictures guide a language model in notebook 13
    model, _ = load(folder)
    return {**settings(folder), "model": as_text(model)}


def settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint's files say about it."""
    files = {"config": "config", "tokenizer": "tokenizer", "preprocessor": "preprocessor_config"}
    return {
        name: json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        for name, file in files.items()
    }


def as_text(module: Any) -> dict[str, Any]:
    """Names and shapes of all weights, and their numbers one after the other, fp32 in base64."""
    import numpy as np

    weights = {name: weight.numpy().astype("<f4") for name, weight in module.state_dict().items()}
    flat = np.concatenate([weight.ravel() for weight in weights.values()])
    return {
        "shapes": [[name, list(weight.shape)] for name, weight in weights.items()],
        "base64": base64.b64encode(flat.tobytes()).decode(),
    }


def drawn_world() -> dict[str, Any]:
    """Names, colors and sizes of the drawn world, and the sample scenes with their prompts, without noise."""
    from minivlm.world.demo import SAMPLE_TASKS, sample_scene
    from minivlm.world.scenes import COLORS, SHAPES, SIZES

    samples = []
    for number in range(len(SAMPLE_TASKS)):
        scene, examples = sample_scene(number)
        samples.append({**as_plain(scene), "prompts": [example.prefix for example in examples]})
    return {"shapes": SHAPES, "colors": COLORS, "sizes": SIZES, "samples": samples}


def as_plain(scene: Any) -> dict[str, Any]:
    """A scene as scene.js draws it."""
    names = ("shape", "color", "size", "x", "y", "radius", "rgb")
    things = [{name: getattr(thing, name) for name in names} for thing in scene.things]
    return {"background": scene.background, "things": things}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
