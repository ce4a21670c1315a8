"""`minivlm train`: a tiny model from nothing, on scenes of the drawn world."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.program import command
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import train

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = "Ctrl-C finishes the step and saves; the same command with --resume goes on."


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train",
        help="train a tiny model from nothing on drawn scenes",
        description="Train a tiny model from nothing on drawn scenes; the defaults made the shipped one.",
        epilog=HELP,
    )
    shared.add_run(parser, out="runs/tiny", measure_every=500, measured="100 held-out scenes")
    recipe = parser.add_argument_group("recipe")
    for field in fields(TrainingConfig):
        if field.name not in shared.SHARED:
            shared.add_field(recipe, field)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say what to do with the model."""
    config = TrainingConfig(**shared.given(options, [field.name for field in fields(TrainingConfig)]))
    loop = shared.prepare_loop(options)
    started = time.monotonic()
    train(options.out, config, loop=loop)
    measure = command("eval", "--model", options.out)
    shared.print_end(started, options.out, f"Measure it:\n  {measure}")
