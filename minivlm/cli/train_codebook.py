"""`minivlm train-codebook`: the codebook that turns masks into words, from nothing."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.files import check_output
from minivlm.training.codebook import train_masks

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

STEPS = inspect.signature(train_masks).parameters["steps"].default


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train-codebook",
        help="train the codebook of masks from nothing",
        description="Train the codebook that turns masks into words; the defaults made the shipped one.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the codebook, an npz file")
    parser.add_argument(
        "--steps", type=shared.at_least_1, default=STEPS, metavar="N", help=f"(default: {STEPS})"
    )
    parser.add_argument("--seed", type=shared.seed, default=0, metavar="S", help="(default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say where the codebook is."""
    check_output(options.out, replace=False)
    train_masks(options.out, steps=options.steps, seed=options.seed)
    print(f"The codebook is in {options.out}.")
