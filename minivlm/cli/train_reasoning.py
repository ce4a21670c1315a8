"""`minivlm train-reasoning`: questions that take two steps, from true answers and then from rewards."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = """\
The tasks:
  larger      is the red circle larger than the blue star?
  nearer      which is nearer to the red circle, the blue star or the green square?
  left_count  how many objects are left of the red circle?
  vertical    is the red circle above the blue star?
With --think, the answer names the boxes of these things before it concludes, and --true-boxes and --follows
can reward them. After some steps on true answers the model learns from its own: --group answers to each
prompt, of which those that are worth more than the others become more probable (GRPO).

curves.png shows reward, accuracy, entropy, mixed groups, length, and answers that never end. A run that has
collapsed, or that answers worse and worse, is stopped and says why.

Ctrl-C finishes the step and saves; the same command with --resume goes on.
"""
OWN = ("model", "task", "think", "loss", "max_new_tokens")  # fields of the recipe with options of their own

# Taken from `ReasoningConfig`, whose module takes seconds to import.
TASKS = ("larger", "nearer", "left_count", "vertical")
LOSSES = ("grpo", "dr_grpo")
WARMUP_STEPS = 5
RECIPE: shared.Recipe = {
    "true answers": {
        "supervised_steps": (20, ""),
        "rows": (32, "questions of a step"),
        "supervised_lr": (0.001, "peak learning rate"),
        "rehearsal": (0, "rows of old questions in every step, also on rewards"),
    },
    "rewards for own answers": {
        "rewarded_steps": (100, ""),
        "prompts": (32, "questions of a step"),
        "group": (8, "answers to each"),
        "temperature": (1.0, "at which they are drawn"),
        "lr": (0.0002, "peak learning rate"),
        "updates": (1, "steps of the optimizer on the answers of a step"),
        "clip_ratio": (0.2, "how far the second update may move a word's probability"),
        "kl": (0.0, "price of the distance from where rewards began"),
        "clip": (1.0, "norm of the gradient at most"),
    },
    "what an answer is worth": {
        "right": (1.0, "for the true conclusion"),
        "form": (0.0, "for an answer that ends, with boxes where it should think"),
        "true_boxes": (0.0, "for the IoU of its boxes with the things that they name"),
        "follows": (0.0, "for a conclusion that follows from its own boxes"),
        "length": (0.0, "price of 10 words"),
        "boxes": (0.0, "for four boxes, true or not: can be hacked"),
    },
}


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train-reasoning",
        help="train composed questions, from true answers and then from rewards",
        description="Train a model on questions that take two steps, by rewards for its own answers.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, default="larger", help="what is asked (default: larger)")
    parser.add_argument("--think", action="store_true", help="name boxes before the conclusion")
    parser.add_argument(
        "--model",
        type=shared.text,
        metavar="FOLDER_OR_REPO_ID",
        help="where to start (default: the shipped one)",
    )
    parser.add_argument(
        "--loss", choices=LOSSES, default="grpo", help="dr_grpo: without its two divisions (default: grpo)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=shared.at_least_1,
        metavar="N",
        help="of an answer (default: 12, or 64 with --think)",
    )
    shared.add_run(
        parser,
        out="runs/reasoning",
        measure_every=50,
        measured="200 held-out questions",
        warmup=f"{WARMUP_STEPS} of each stage",
    )
    shared.add_recipe(parser, RECIPE)
    parser.set_defaults(run=run, out=None)


def run(options: argparse.Namespace) -> None:
    """Train, and say how many conclusions are right and where to look."""
    from minivlm.training.folder import LOG
    from minivlm.training.log import read_log
    from minivlm.training.reasoning import CURVES, train_reasoning
    from minivlm.training.reasoning_recipe import ReasoningConfig

    shared.refuse(options, ("bf16",), "is for large models: these runs compute in fp32, leave it out")
    names = [*OWN, "seed", "warmup_steps", *(name for numbers in RECIPE.values() for name in numbers)]
    config = ReasoningConfig(**shared.given(options, names))
    out: Path = options.out or Path("runs/reasoning")
    started = time.monotonic()
    train_reasoning(out, config, loop=shared.prepare_loop(options, out))
    measured = [line for line in read_log(out / LOG) if line.get("held-out accuracy") is not None]
    if measured:
        first, last = measured[0], measured[-1]
        shared.say(
            f"Right conclusions on held-out questions: {first['held-out accuracy']:.3f} at step "
            f"{first['step']}, {last['held-out accuracy']:.3f} at step {last['step']}."
        )
    shared.print_end(started, out, f"How it learned: {out / CURVES}")
