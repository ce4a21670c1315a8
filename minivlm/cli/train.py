"""`minivlm train`: a tiny model from nothing, on scenes of the drawn world."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.program import command

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = "Ctrl-C finishes the step and saves; the same command with --resume goes on."

# The fields of `TrainingConfig`. They are written here once more, since its module takes seconds to import.
RECIPE: shared.Recipe = {
    "sizes of the model": {
        "image_size": (64, "pixels of a picture's side"),
        "patch_size": (8, "pixels of a patch's side"),
        "tower_width": (96, "of the image tower"),
        "tower_layers": (3, ""),
        "tower_heads": (3, ""),
        "text_width": (128, "of the decoder"),
        "text_layers": (4, ""),
        "text_heads": (4, ""),
    },
    "steps of each stage": {
        "tower_steps": (1500, "the image tower alone"),
        "packed_steps": (5000, "many questions in a row"),
        "review_steps": (2200, "the same with more relations, at lower rates"),
        "prefix_steps": (900, "rows as in use, one question each"),
    },
    "what a step sees": {
        "tower_pictures": (128, "while the tower is alone"),
        "pictures": (48, "afterwards"),
        "questions": (9, "for each picture at most, packed"),
        "row_tokens": (104, "of packed questions"),
        "prefix_questions": (3, "for each picture in the last stage"),
        "prefix_row_tokens": (40, "of one question"),
        "relations": (2, "questions about relations in a round of all"),
        "review_relations": (5, "the same in the review"),
    },
    "how it learns": {
        "muon_lr": (0.02, "peak rate of matrices"),
        "adamw_lr": (0.003, "peak rate of everything else"),
        "tower_lr_factor": (0.3, "of the tower's rates after its stage"),
        "review_lr_factor": (0.5, "of all rates in the review"),
        "weight_decay": (0.02, ""),
        "clip": (1.0, "norm of the gradient at most"),
        "dense_weight": (0.5, "of the tower's own loss after its stage"),
        "loc_sigma": (6.0, "bins; how soft the targets of coordinates are"),
    },
}


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train",
        help="train a tiny model from nothing on drawn scenes",
        description="Train a tiny model from nothing on drawn scenes; the defaults made the shipped one.",
        epilog=HELP,
    )
    shared.add_run(parser, out="runs/tiny", measure_every=500, measured="100 held-out scenes")
    shared.add_recipe(parser, RECIPE)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say what to do with the model."""
    from minivlm.training.recipe import TrainingConfig
    from minivlm.training.scratch import train

    names = [*shared.SHARED, *(name for numbers in RECIPE.values() for name in numbers)]
    config = TrainingConfig(**shared.given(options, names))
    loop = shared.prepare_loop(options)
    started = time.monotonic()
    train(options.out, config, loop=loop)
    measure = command("eval", "--model", options.out)
    shared.print_end(started, options.out, f"Measure it:\n  {measure}")
