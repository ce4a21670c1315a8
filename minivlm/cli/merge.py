"""`minivlm merge`: a model and its adapter become one checkpoint, which needs neither of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.program import command

if TYPE_CHECKING:
    from minivlm.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "merge",
        help="make one checkpoint of a model and its adapter",
        description="Add a low-rank adapter to the weights of its model, and write a checkpoint that is as "
        "fast as the model alone. The folders that are read stay as they are.",
    )
    shared.add_source(parser, "the adapter's base", "of the weights that are written")
    parser.add_argument(
        "--adapter", type=shared.text, metavar="FOLDER_OR_REPO_ID", required=True, help="what to add to it"
    )
    parser.add_argument("--out", type=shared.path, required=True, help="folder for the checkpoint")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Merge and write."""
    from minivlm.adapters import merge_for_good
    from minivlm.models.load import load
    from minivlm.training.folder import run_folder

    out: Path = options.out
    name, choices = shared.source_of(options)
    with run_folder(out, resume=False):
        model, processor = load(name, adapter=options.adapter, **choices)
        merge_for_good(model)
        processor.save_pretrained(out)
        model.save_pretrained(out)  # config.json comes last: without it, a folder is no checkpoint
    shared.say(f"The model is in {out}. Measure it:\n  {command('eval', '--model', out)}")
