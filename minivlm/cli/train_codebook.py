"""`minivlm train-codebook`: the codebook that turns masks into words, from nothing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.files import check_output

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

STEPS = 2500  # the default of `train_masks`, whose module takes seconds to import


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train-codebook",
        help="train the codebook of masks from nothing",
        description="Train the codebook that turns masks into words; the defaults made the shipped one.",
    )
    parser.add_argument(
        "--out", type=shared.path, metavar="FILE", required=True, help="the codebook, an npz file"
    )
    parser.add_argument(
        "--steps", type=shared.at_least_1, default=STEPS, metavar="N", help=f"(default: {STEPS})"
    )
    parser.add_argument("--seed", type=shared.seed, default=0, metavar="S", help="(default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say where the codebook is."""
    from minivlm.training.codebook import train_masks

    check_output(options.out, replace=False)
    train_masks(options.out, steps=options.steps, seed=options.seed)
    shared.say(f"The codebook is in {options.out}.")
