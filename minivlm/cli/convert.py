"""`minivlm convert`: a folder of rounded weights, which is smaller and opens without rounding."""

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
        "convert",
        help="write a folder with int8 or int4 weights, which opens at once",
        description="Round the decoder's matrices once, and write a folder that ask, look and eval open "
        "without --quantize, in the time of a plain one, with the same answers. Only minivlm reads it, and "
        "nothing but an adapter can be trained on it: keep the folder that it is made from.",
    )
    shared.add_source(parser, "what to convert", "of scales, and of weights that are not rounded")
    parser.add_argument("--quantize", choices=("int8", "int4"), required=True, help="what to round to")
    parser.add_argument("--out", type=shared.path, required=True, help="a new folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Round and write."""
    from minivlm.files import check_new_folder
    from minivlm.models.load import load_answering
    from minivlm.models.quantized import save_quantized

    out: Path = options.out
    name, choices = shared.source_of(options)
    check_new_folder(out)
    model, processor = load_answering(name, quantize=options.quantize, **choices)
    save_quantized(model, processor, out)
    shared.say(f"The model is in {out}. Measure it:\n  {command('eval', '--model', out)}")
