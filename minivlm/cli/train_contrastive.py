"""`minivlm train-contrastive`: two towers that learn which picture and which caption belong together."""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.program import command
from minivlm.errors import InputError
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import OBJECTIVES, SIZES_OF_TOWERS, ContrastiveConfig
from minivlm.training.loop import LOG, read_log

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = """\
The objectives:
  clip     a softmax over all captions of a batch, and over all pictures
  siglip   a yes or no for every pair
  lit      as siglip, with a locked image tower: that of --model, or of the shipped model
  distill  the similarities of another model with two towers, --teacher
Without --data the towers see drawn scenes with captions. Lines of your own have a picture and its caption:
  {"image": "photos/1.jpg", "text": "a cup of tea on a red table"}
New towers have the sizes of the recipe above; with --model, the towers of a folder are trained.

Ctrl-C finishes the step and saves; the same command with --resume goes on.
"""
OWN = ("objective", "model", "teacher")  # fields of the recipe that have options of their own


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train-contrastive",
        help="train two towers on pictures with captions",
        description="Train two towers that find the caption of a picture, and the picture of a caption.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="siglip", help="what is learned (default: siglip)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="pairs of your own (default: drawn scenes)"
    )
    parser.add_argument(
        "--validation", type=Path, metavar="FILE.jsonl", help="pairs of your own to measure on"
    )
    parser.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )
    parser.add_argument("--model", metavar="FOLDER_OR_REPO_ID", help="where to start (default: new towers)")
    parser.add_argument(
        "--teacher", metavar="FOLDER_OR_REPO_ID", help="of --objective distill: CLIP or SigLIP"
    )
    shared.add_run(
        parser, out="runs/OBJECTIVE", measure_every=250, measured="200 held-out scenes or on --validation"
    )
    recipe = parser.add_argument_group("recipe")
    for field in fields(ContrastiveConfig):
        if field.name not in (*OWN, *shared.SHARED):
            shared.add_field(recipe, field)
    parser.set_defaults(run=run, out=None)


def run(options: argparse.Namespace) -> None:
    """Train, and say how well the towers find each other and how to measure more."""
    _check(options)
    config = ContrastiveConfig(**shared.given(options, [field.name for field in fields(ContrastiveConfig)]))
    out = options.out or Path("runs") / config.objective
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    loop = shared.prepare_loop(options)
    started = time.monotonic()
    train_contrastive(out, config, options.data, options.validation, warn=warn, loop=loop)
    for line in reversed(read_log(out / LOG)):
        if line.get("image to text recall@1") is not None:
            print(
                f"Recall@1 at step {line['step']}: {line['image to text recall@1']:.3f} from image to text, "
                f"{line['text to image recall@1']:.3f} from text to image."
            )
            break
    own = () if options.validation is None else ("--data", options.validation)
    measure = command("eval", "--model", out, *own)
    shared.print_end(started, out, f"Measure it:\n  {measure}")


def _check(options: argparse.Namespace) -> None:
    """Raises InputError: options that do not belong together."""
    if options.data is None:
        needs = ("validation", "on_bad_line")
        shared.refuse(options, needs, "is for pairs of your own: add --data FILE.jsonl, or leave it out")
    elif options.measure_every and options.validation is None:
        raise InputError("--measure-every has nothing to measure on: add --validation FILE.jsonl")
    if options.objective == "lit":
        locked = [name for name in SIZES_OF_TOWERS if name.startswith(("image", "patch", "tower"))]
        shared.refuse(options, locked, "is decided by the locked tower: leave it out")
    elif options.model is not None:
        shared.refuse(options, SIZES_OF_TOWERS, "is decided by the folder of --model: leave one of them out")
