"""`minivlm eval`: how good a model is on scenes that training never saw.

A model that writes is asked questions; of two towers it is seen how well they find each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.data.pairs import read_pairs
from minivlm.errors import InputError
from minivlm.evaluation import contrastive, evaluate
from minivlm.evaluation.columns import COLUMNS
from minivlm.evaluation.contrastive import PAIR_COLUMNS, evaluate_own_pairs, evaluate_pairs
from minivlm.evaluation.tables import as_json, as_text
from minivlm.models.clip import CLIP
from minivlm.models.paligemma import PaliGemma
from minivlm.models.siglip import SigLIP
from minivlm.processing import PairProcessor

if TYPE_CHECKING:
    from minivlm.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("eval", help="measure a model on scenes that training never saw")
    shared.add_model(parser, "a PaliGemma, CLIP or SigLIP checkpoint")
    parser.add_argument("--scenes", type=int, metavar="N", help="(default: 2000)")
    parser.add_argument("--seed", type=int, metavar="S", help="which scenes (default: 1)")
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=tuple(COLUMNS),
        metavar="COLUMN",
        help=f"some of: {', '.join(COLUMNS)} (default: all; of CLIP and SigLIP, all but text_only)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help="of CLIP and SigLIP: retrieval among your own pairs, instead of scenes",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    if options.data is not None:
        shared.refuse(options, ("scenes", "seed", "columns"), "is about drawn scenes: leave out it or --data")
    scenes = 2000 if options.scenes is None else options.scenes
    seed = 1 if options.seed is None else options.seed
    if scenes < 1:
        raise InputError(f"--scenes is {scenes}: ask for at least 1")
    if seed < 0:
        raise InputError(f"--seed is {seed}: it must not be negative")
    model, processor = shared.open_any(options)
    if isinstance(model, CLIP | SigLIP):
        columns = tuple(dict.fromkeys(options.columns or PAIR_COLUMNS))
        _print_pairs(options, model, processor, scenes, seed, columns)
        return
    if not isinstance(model, PaliGemma):
        raise InputError(
            f"{options.model} holds a {type(model).__name__}, which neither answers nor reads captions: "
            "choose a PaliGemma, CLIP or SigLIP"
        )
    shared.refuse(options, ("data",), "is for CLIP and SigLIP: leave it out, or choose such a folder")
    columns = tuple(dict.fromkeys(options.columns or COLUMNS))
    table = evaluate(model, processor, scenes=scenes, seed=seed, columns=columns)
    print(json.dumps(as_json(table)) if options.json else as_text(table))


def _print_pairs(
    options: argparse.Namespace,
    model: CLIP | SigLIP,
    processor: PairProcessor,
    scenes: int,
    seed: int,
    columns: tuple[str, ...],
) -> None:
    if options.data is None:
        table = evaluate_pairs(model, processor, scenes=scenes, seed=seed, columns=columns)
    else:
        pairs = read_pairs(options.data, [processor.tokenizer])
        table = {"own pairs": evaluate_own_pairs(model, processor, pairs)}
    as_one = contrastive.as_json(table) if options.json else contrastive.as_text(table)
    print(json.dumps(as_one) if options.json else as_one)
