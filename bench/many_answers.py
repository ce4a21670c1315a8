"""Many answers: one picture for all of its prompts, and pictures in batches (minivlm/models/many_answers.py).

Run: OMP_NUM_THREADS=1 python bench/many_answers.py --out bench/results/many_answers.txt

The shipped models, in fp32. Eight prompts about one picture: of one set, each is answered in a word or two;
of the other, a caption and boxes are among them, for which the rest waits. Then one prompt about 64 pictures
of different sizes, which Qwen2-VL reads as rows of different lengths, and PaliGemma as rows of one. The ways
take turns, and each is compared with one prompt at a time in the same round: above 1, it is faster. All have
to give the same answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import processor, spread
from PIL import Image

from minivlm.models import many_answers
from minivlm.models.answering import answer
from minivlm.models.load import MINIATURES, SHIPPED, load
from minivlm.models.many_answers import answers_to, batches

SYSTEMS = {"PaliGemma": SHIPPED} | {
    name: MINIATURES / folder
    for name, folder in {
        "LLaVA": "llava",
        "Qwen2-VL": "qwen2_vl",
        "Qwen2.5-VL": "qwen2_5_vl",
        "ClipCap": "clipcap",
        "Flamingo": "flamingo",
        "VisualGPT": "visualgpt",
    }.items()
}
SCENE = Path(__file__).parents[1] / "figures" / "samples" / "scene_1.png"
SHORT = (
    "what color is the triangle?",
    "what shape is the cyan object?",
    "how many circles are there?",
    "how many red objects are there?",
    "is there a red circle?",
    "is there a cyan star?",
    "what size is the blue triangle?",
    "is the red star left of the cyan star?",
)
MIXED = ("caption en", "detect yellow star", *SHORT[2:])
PICTURES, QUESTION = 64, "what color is the star?"
Way = Callable[[], list[str]]


def in_turns(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round, after one to warm up. Stops if answers differ."""
    said = [way() for way in ways.values()]
    if any(words != said[0] for words in said):
        raise SystemExit("the answers differ")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        order = list(ways)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def one_picture(loaded: Any, prompts: Sequence[str], rounds: int) -> str:
    """How many times as fast together, round by round."""
    ways: dict[str, Way] = {
        "alone": lambda: [answer(SCENE, prompt, loaded) for prompt in prompts],
        "together": lambda: answer(SCENE, prompts, loaded),
    }
    found = in_turns(ways, rounds)
    return spread([one / other for one, other in zip(found["alone"], found["together"], strict=True)])


def in_order(lengths: Sequence[int], batch_tokens: int, choices: dict[str, Any]) -> list[list[int]]:
    """`batches` without sorting."""
    found: list[list[int]] = []
    longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        room = batch_tokens // (longest + choices["max_new_tokens"])
        if not found or len(found[-1]) >= room:
            found.append([])
            longest = length
        found[-1].append(number)
    return found


def many_pictures(loaded: Any, rounds: int) -> tuple[str, str]:
    """How many times as fast as one at a time: batches in the order given, and sorted by length."""
    scene, rng = Image.open(SCENE), np.random.default_rng(0)
    sides = rng.integers(32, 225, (PICTURES, 2))
    pictures = [scene.resize((int(width), int(height))) for width, height in sides]

    def batched(arranged: Any) -> list[str]:
        many_answers.batches = arranged
        found = answers_to(*loaded, pictures, [QUESTION], max_new_tokens=8)
        return [one.text for (one,) in found]

    ways: dict[str, Way] = {
        "alone": lambda: [answer(picture, QUESTION, loaded, max_new_tokens=8) for picture in pictures],
        "in order": lambda: batched(in_order),
        "sorted": lambda: batched(batches),
    }
    found = in_turns(ways, rounds)
    ratios = [
        spread([one / other for one, other in zip(found["alone"], found[name], strict=True)])
        for name in ("in order", "sorted")
    ]
    return ratios[0], ratios[1]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [f"{processor()}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}"]
    lines += [f"{options.rounds} rounds: median (least to most)", ""]
    lines += ["## Eight prompts about one picture, beside one at a time", ""]
    lines += ["| | words | a caption and boxes among them |", "|---|---|---|"]
    for name, folder in SYSTEMS.items():
        loaded = load(folder)
        times = [one_picture(loaded, prompts, options.rounds) for prompts in (SHORT, MIXED)]
        lines.append(f"| {name} | {' | '.join(times)} |")
        print(lines[-1], flush=True)
    lines += ["", f"## One prompt about {PICTURES} pictures, beside one at a time", ""]
    lines += ["| | batches in the order given | batches of like rows |", "|---|---|---|"]
    for name in ("PaliGemma", "Qwen2-VL"):
        lines.append(f"| {name} | {' | '.join(many_pictures(load(SYSTEMS[name]), options.rounds))} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
