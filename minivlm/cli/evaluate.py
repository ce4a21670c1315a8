"""`minivlm eval`: how good a model is on scenes that training never saw."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.errors import InputError
from minivlm.evaluation import COLUMNS, as_json, as_text, evaluate

if TYPE_CHECKING:
    from minivlm.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("eval", help="measure a model on scenes that training never saw")
    shared.add_model(parser)
    parser.add_argument("--scenes", type=int, default=2000, metavar="N", help="(default: 2000)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="which scenes (default: 1)")
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=tuple(COLUMNS),
        default=list(COLUMNS),
        metavar="COLUMN",
        help=f"some of: {', '.join(COLUMNS)} (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    if options.scenes < 1:
        raise InputError(f"--scenes is {options.scenes}: ask for at least 1")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}: it must not be negative")
    model, processor = shared.open_model(options)
    columns = tuple(dict.fromkeys(options.columns))
    table = evaluate(model, processor, scenes=options.scenes, seed=options.seed, columns=columns)
    print(json.dumps(as_json(table)) if options.json else as_text(table))
