"""`minivlm train --objective clip | siglip | lit | distill`: which options belong to it, and what it says."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from minivlm.cli import options as shared
from minivlm.errors import InputError
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import SIZES_OF_TOWERS, ContrastiveConfig
from minivlm.training.loop import LOG, Loop, read_log

FIELDS = tuple(field.name for field in fields(ContrastiveConfig))
OF_DATA = ("validation", "on_bad_line")

HELP = """\
Two towers learn which picture and which caption belong together, with --objective:
  clip     by a softmax over all captions of a batch, and over all pictures
  siglip   by a yes or no for every pair
  lit      as siglip, with a locked image tower: that of --model, or of the shipped model
  distill  from the similarities of another model with two towers, --teacher
Without --data they see drawn scenes with captions. Lines of your own have a picture and its caption:
  {"image": "photos/1.jpg", "text": "a cup of tea on a red table"}
New towers have the sizes that --help shows for two towers; with --model, the towers of a folder are trained.
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    """--objective and its own options."""
    parser.add_argument(
        "--objective",
        choices=("answers", "clip", "siglip", "lit", "distill"),
        default="answers",
        help="what is learned: answers to prompts, or to match pictures and captions (default: answers)",
    )
    parser.add_argument(
        "--teacher", metavar="FOLDER_OR_REPO_ID", help="of --objective distill: CLIP or SigLIP"
    )


def check(options: argparse.Namespace, others: Sequence[str]) -> None:
    """Raises InputError: an option among `others` or of data that does not go with this objective."""
    objective = options.objective
    foreign = [name for name in others if name not in (*FIELDS, *OF_DATA)]
    shared.refuse(options, foreign, f"does not belong to --objective {objective}: leave it out")
    if options.data is None:
        shared.refuse(options, OF_DATA, "is for pairs of your own: add --data FILE.jsonl, or leave it out")
    elif options.measure_every and options.validation is None:
        raise InputError("--measure-every has nothing to measure on: add --validation FILE.jsonl")
    if objective == "lit":
        locked = [name for name in SIZES_OF_TOWERS if name.startswith(("image", "patch", "tower"))]
        shared.refuse(options, locked, "is decided by the locked tower: leave it out")
    elif options.model is not None:
        shared.refuse(options, SIZES_OF_TOWERS, "is decided by the folder of --model: leave one of them out")


def train(options: argparse.Namespace, out: Path, loop: Loop) -> str:
    """Train, say how well the towers find each other, and return what to do next."""
    config = ContrastiveConfig(**shared.given(options, FIELDS))
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    train_contrastive(out, config, options.data, options.validation, warn=warn, loop=loop)
    for line in reversed(read_log(out / LOG)):
        if line.get("image to text recall@1") is not None:
            print(
                f"Recall@1 at step {line['step']}: {line['image to text recall@1']:.3f} from image to text, "
                f"{line['text to image recall@1']:.3f} from text to image."
            )
            break
    own = "" if options.validation is None else f" --data {shlex.quote(str(options.validation))}"
    return f"Measure it:\n  minivlm eval --model {shlex.quote(str(out))}{own}"
