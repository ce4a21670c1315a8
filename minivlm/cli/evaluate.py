"""`minivlm eval`: how good a model is on scenes that training never saw.

A model that answers is asked questions. With one that matches, pictures look for their captions, and captions
for their pictures.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.errors import InputError

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

# Of `minivlm.evaluation.columns`, whose import takes seconds.
COLUMNS = (
    "held_out", "unseen_pairs", "other_grays", "tinted", "black", "turned", "jpeg", "matplotlib", "browser",
    "text_only",
)  # fmt: skip


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("eval", help="measure a model on scenes that training never saw")
    shared.add_model(parser, "a PaliGemma, LLaVA, Qwen-VL, CLIP or SigLIP checkpoint")
    parser.add_argument("--scenes", type=int, metavar="N", help="(default: 2000)")
    parser.add_argument("--seed", type=int, metavar="S", help="which scenes (default: 1)")
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        metavar="COLUMN",
        help=f"some of: {', '.join(COLUMNS)} (default: all; of CLIP and SigLIP, all but text_only)",
    )
    parser.add_argument(
        "--data",
        type=shared.path,
        metavar="FILE.jsonl",
        help="of CLIP and SigLIP: retrieval among your own pairs, instead of scenes",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from minivlm.data.pairs import read_pairs
    from minivlm.evaluation import evaluate
    from minivlm.evaluation.contrastive import PAIR_COLUMNS, evaluate_own_pairs, evaluate_pairs
    from minivlm.evaluation.tables import as_json, as_text

    if options.data is not None:
        shared.refuse(options, ("scenes", "seed", "columns"), "is about drawn scenes: leave out it or --data")
    asked = {"scenes": 2000, "seed": 1} | shared.given(options, ("scenes", "seed"))
    if asked["scenes"] < 1:
        raise InputError(f"--scenes is {asked['scenes']}: ask for at least 1")
    if asked["seed"] < 0:
        raise InputError(f"--seed is {asked['seed']}: it must not be negative")
    kind, model, processor = shared.open_reading(options)
    if kind == "answers":
        shared.refuse(options, ("data",), "is for CLIP and SigLIP: leave it out, or choose such a folder")
        columns = tuple(dict.fromkeys(options.columns or COLUMNS))
        table, baseline = evaluate(model, processor, columns=columns, **asked), "majority"
    elif options.data is None:
        columns = tuple(dict.fromkeys(options.columns or PAIR_COLUMNS))
        table, baseline = evaluate_pairs(model, processor, columns=columns, **asked), "chance"
    else:
        pairs = read_pairs(options.data, [processor.tokenizer])
        table, baseline = {"own pairs": evaluate_own_pairs(model, processor, pairs)}, "chance"
    print(json.dumps(as_json(table, baseline)) if options.json else as_text(table, baseline))
