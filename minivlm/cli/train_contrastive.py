"""`minivlm train-contrastive`: two towers that learn which picture and which caption belong together."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.program import command
from minivlm.errors import InputError

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

# Taken from `ContrastiveConfig`, whose module takes seconds to import.
OBJECTIVES = ("clip", "siglip", "lit", "distill")
RECIPE: shared.Recipe = {
    "sizes of new towers": {
        "image_size": (64, "pixels of a picture's side"),
        "patch_size": (8, "pixels of a patch's side"),
        "tower_width": (96, "of the image tower"),
        "tower_layers": (3, ""),
        "tower_heads": (3, ""),
        "text_width": (96, "of the text tower"),
        "text_layers": (2, ""),
        "text_heads": (3, ""),
        "max_length": (32, "tokens of a caption, with its start and end"),
    },
    "how they learn": {
        "steps": (1000, ""),
        "batch_size": (64, "pairs that are compared with each other"),
        "lr": (0.002, "peak learning rate"),
        "weight_decay": (0.02, "of matrices"),
        "clip": (1.0, "norm of the gradient at most"),
    },
}


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
        "--data", type=shared.path, metavar="FILE.jsonl", help="pairs of your own (default: drawn scenes)"
    )
    parser.add_argument(
        "--validation", type=shared.path, metavar="FILE.jsonl", help="pairs of your own to measure on"
    )
    parser.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )
    parser.add_argument(
        "--model", type=shared.text, metavar="FOLDER_OR_REPO_ID", help="where to start (default: new towers)"
    )
    parser.add_argument(
        "--teacher",
        type=shared.text,
        metavar="FOLDER_OR_REPO_ID",
        help="of --objective distill: CLIP or SigLIP",
    )
    shared.add_run(
        parser, out="runs/OBJECTIVE", measure_every=250, measured="200 held-out scenes or on --validation"
    )
    shared.add_recipe(parser, RECIPE)
    parser.set_defaults(run=run, out=None)


def run(options: argparse.Namespace) -> None:
    """Train, and say how well the towers find each other and how to measure more."""
    from minivlm.training.contrastive import train_contrastive
    from minivlm.training.contrastive_recipe import ContrastiveConfig
    from minivlm.training.folder import LOG
    from minivlm.training.log import read_log

    _check(options)
    names = [*OWN, *shared.SHARED, *(name for numbers in RECIPE.values() for name in numbers)]
    config = ContrastiveConfig(**shared.given(options, names))
    out = options.out or Path("runs") / config.objective
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    loop = shared.prepare_loop(options, out)
    started = time.monotonic()
    train_contrastive(out, config, options.data, options.validation, warn=warn, loop=loop)
    if not shared.is_first():
        return
    for line in reversed(read_log(out / LOG)):
        if line.get("image to text recall@1") is not None:
            shared.say(
                f"Recall@1 at step {line['step']}: {line['image to text recall@1']:.3f} from image to text, "
                f"{line['text to image recall@1']:.3f} from text to image."
            )
            break
    own = () if options.validation is None else ("--data", options.validation)
    measure = command("eval", "--model", out, *own)
    shared.print_end(started, out, f"Measure it:\n  {measure}")


def _check(options: argparse.Namespace) -> None:
    """Raises InputError: options that do not belong together."""
    sizes = tuple(RECIPE["sizes of new towers"])
    if options.data is None:
        needs = ("validation", "on_bad_line")
        shared.refuse(options, needs, "is for pairs of your own: add --data FILE.jsonl, or leave it out")
    elif options.measure_every and options.validation is None:
        raise InputError("--measure-every has nothing to measure on: add --validation FILE.jsonl")
    if options.objective == "lit":
        locked = [name for name in sizes if name.startswith(("image", "patch", "tower"))]
        shared.refuse(options, locked, "is decided by the locked tower: leave it out")
    elif options.model is not None:
        shared.refuse(options, sizes, "is decided by the folder of --model: leave one of them out")
