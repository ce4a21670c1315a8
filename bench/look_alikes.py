"""What makes a model tell apart two things of one color?

Run: minivlm train --out runs/before --alike-steps 0 --last-steps 0
     OMP_NUM_THREADS=1 python bench/look_alikes.py --start runs/before --runs runs/look_alikes \\
         --out bench/results/look_alikes.txt
     python bench/look_alikes.py --start runs/before --finish runs/tiny

A model that was trained with the first four stages of `minivlm train` finds things by their color. Here it
goes on with the fifth, for the same number of steps in three ways, each of which adds to the one above it:

pairs       more questions about pairs, above all of one color and one above the other
one color   and scenes in which most things share a color
pointing    and words that learn to say where things lie

Measured on scenes of the test split: relations of pairs of one color (in scenes that were given one), and
the relations and captions of `minivlm eval`. Three seeds, of pictures and questions. A run is kept in --runs,
is resumed if it was stopped, and is not made again.

The last command goes on with the model of the first as the recipe says, and leaves what ships. So does
`minivlm train` with all of its steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from kept import keep, read
from recipe import spread

from minivlm.errors import InputError
from minivlm.evaluation.answers import Question, answer_questions, evaluate
from minivlm.models.load import load_answering
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.training.digest import digest_of_weights
from minivlm.training.folder import holds_state, run_folder
from minivlm.training.loop import Loop, run_to_end
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import Run
from minivlm.training.state import save_state
from minivlm.world.look_alikes import ask_pair, in_one_color
from minivlm.world.scenes import make_scene

SHORT = TrainingConfig(alike_steps=1000, last_steps=0, pictures=24)
WHOLE = TrainingConfig()
WAYS: dict[str, dict[str, Any]] = {
    "pairs": {"alike_share": 0.0, "point_weight": 0.0},
    "one color": {"point_weight": 0.0},
    "pointing": {},
}
BEFORE = "before"
SCENES = 300
MEASURED = ("relation", "exact caption")
Result = dict[str, float]


def pairs_of_one_color(count: int, pixels: int, seed: int = 1) -> list[Question]:
    """Questions about two things of one color, in scenes that training never shows."""
    rng, questions = np.random.default_rng([seed, 77]), []
    while len(questions) < count:
        scene = in_one_color(make_scene(rng, "test"), rng)
        example = ask_pair(scene, rng)
        if example is not None and len({thing.color for thing in example.things}) == 1:
            questions.append(Question(scene, scene.draw(pixels), example))
    return questions


def measure(model: PaliGemma, processor: Processor, scenes: int = SCENES) -> Result:
    """Shares of right answers."""
    questions = pairs_of_one_color(2 * scenes, processor.image_processor.image_size)
    answers = answer_questions(model, processor, questions)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for question, answer in zip(questions, answers, strict=True):
        upright = any(word in question.example.prefix for word in (" above ", " below "))
        right[upright].append(answer == question.example.suffix)
    table = evaluate(model, processor, scenes=scenes, columns=("held_out",), progress=False)["held_out"]
    return {
        "one color, above or below": mean(right[True]),
        "one color, left or right": mean(right[False]),
        **{name: table[name].value for name in MEASURED},
    }


def begin(start: Path, out: Path, config: TrainingConfig) -> None:
    """Leave the state of a run in `out` that is about to begin with look-alikes, with the weights of `start`.

    Raises InputError: `start` holds another model than the recipe's.
    """
    run = Run(config)
    model, _ = load_answering(start)
    if not isinstance(model, PaliGemma) or model.config != run.model.config:
        raise InputError(f"{start} holds another model than `minivlm train` makes: train one with it")
    run.model.load_state_dict(model.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    step = config.first_step("alike")
    save_state(out / "state.safetensors", step, run.masters, {}, asdict(config))
    (out / "log.csv").write_text("step\n", encoding="utf-8")


def go_on(start: Path, out: Path, config: TrainingConfig, loop: Loop) -> Run:
    """The last stages, from the weights of `start`."""
    if not holds_state(out):
        begin(start, out, config)
    run = Run(config, loop.device, loop.workers)
    with run_folder(out, resume=True):
        run_to_end(run, out, loop)
    return run


def one_way(start: Path, out: Path, way: str, seed: int, scenes: int = SCENES) -> Result:
    """A way with a seed, measured, or what was measured before."""
    config = TrainingConfig(**{**asdict(SHORT), "seed": seed, **WAYS[way]})
    numbers = {**asdict(config), "start": digest_of_weights(load_answering(start)[0])}
    known = read(out, numbers, scenes)
    if known is None:
        run = go_on(start, out, config, Loop(resume=True, save_every=100, measure_every=0))
        measured = measure(run.model.eval(), run.processor, scenes)
        known = {"config": numbers, "scenes": scenes, "measured": measured}
        keep(out, known)
    found: Result = known["measured"]
    return found


def as_text(found: dict[str, Sequence[Result]]) -> str:
    """A line for each way: means of its seeds, and how far they lie apart."""
    names = list(next(iter(found.values()))[0])
    lines = [f"| way | {' | '.join(names)} | seeds |", "|---" * (len(names) + 2) + "|"]
    for way, seeds in found.items():
        cells = [spread([seed[name] for seed in seeds]) for name in names]
        lines.append(f"| {way} | {' | '.join(cells)} | {len(seeds) if way != BEFORE else '-'} |")
    return "\n".join(lines)


def main() -> None:
    """Train, measure, and print the table; or finish a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, required=True, help="a model of the first four stages")
    parser.add_argument("--finish", type=Path, metavar="OUT", help="go on as the recipe says, and stop")
    parser.add_argument("--runs", type=Path, default=Path("runs/look_alikes"))
    parser.add_argument("--out", type=Path, help="write the table there as well")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if options.finish:
        go_on(options.start, options.finish, WHOLE, Loop(resume=True, save_every=200))
        return
    model, processor = load_answering(options.start)
    assert isinstance(model, PaliGemma)
    assert isinstance(processor, Processor)
    found: dict[str, Sequence[Result]] = {BEFORE: [measure(model, processor)]}
    for way in WAYS:
        seeds = [
            one_way(options.start, options.runs / f"{way.replace(' ', '-')}-{seed}", way, seed)
            for seed in options.seeds
        ]
        found[way] = seeds
        print(as_text(found), flush=True)
    if options.out:
        options.out.write_text(as_text(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
