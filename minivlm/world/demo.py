"""The demo: sample pictures, and prompts that show what the shipped model can do.

The samples are drawn scenes from seeds that training never used. They are larger (256 pixels) than what the
model sees (64), so the demo exercises the whole path from a picture file to an answer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minivlm.errors import InputError
from minivlm.files import write_aside
from minivlm.world.questions import Example, ask
from minivlm.world.scenes import Scene, make_scene

SAMPLES = Path("figures") / "samples"  # in the repository; elsewhere they are drawn when needed
PROMPTS_FILE = "prompts.json"
SAMPLE_TASKS = (
    ("caption", "color", "detect"),
    ("caption", "relation", "detect"),
    ("caption", "count", "detect"),
    ("caption", "size", "detect"),
    ("caption", "existence", "detect"),
    ("caption", "shape", "detect"),
)


def sample_scene(number: int) -> tuple[Scene, list[Example]]:
    """Scene number 0 to 5, with its prompts and correct answers."""
    rng = np.random.default_rng([2026, number])
    while True:
        scene = make_scene(rng, "test")
        examples = [ask(scene, task, rng) for task in SAMPLE_TASKS[number]]
        if len(scene.things) >= 3 and all(example is not None for example in examples):
            return scene, [example for example in examples if example is not None]


def write_samples(folder: Path, pixels: int = 256) -> None:
    """Draw the sample pictures into a folder, with prompts.json: picture name -> prompts."""
    prompts = {}
    for number in range(len(SAMPLE_TASKS)):
        scene, examples = sample_scene(number)
        name = f"scene_{number + 1}.png"
        with write_aside(folder / name) as temporary:
            scene.draw(pixels).save(temporary, format="PNG")
        prompts[name] = [example.prefix for example in examples]
    with write_aside(folder / PROMPTS_FILE) as temporary:
        temporary.write_text(json.dumps(prompts, indent=2) + "\n", encoding="utf-8")


def read_samples(folder: Path) -> dict[Path, list[str]]:
    """Read the prompts.json of a folder: picture -> prompts.

    Raises InputError: no such file, or it does not hold lists of prompts by picture name.
    """
    path = folder / PROMPTS_FILE
    try:
        by_picture = json.loads(path.read_text(encoding="utf-8"))
        return {folder / name: [str(prompt) for prompt in prompts] for name, prompts in by_picture.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f'{path} cannot be read ({error}): expected {{"picture.png": ["prompt", ...]}}'
        ) from error
