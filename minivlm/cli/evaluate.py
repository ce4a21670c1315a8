"""`minivlm eval`: how good a model is on scenes that training never saw.

A model that answers is asked questions. With one that matches, pictures look for their captions, and captions
for their pictures. With --data, the pictures are your own.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from minivlm.cli import options as shared
from minivlm.errors import InputError

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

# Of `minivlm.evaluation.columns`, whose import takes seconds.
COLUMNS = (
    "held_out", "unseen_pairs", "other_grays", "tinted", "black", "turned", "jpeg", "matplotlib", "browser",
    "text_only",
)  # fmt: skip
MORE_COLUMNS = ("small_things",)


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser("eval", help="measure a model on scenes that training never saw")
    shared.add_model(parser, "a PaliGemma, LLaVA, Qwen-VL, CLIP or SigLIP checkpoint")
    parser.add_argument("--scenes", type=int, metavar="N", help="(default: 2000)")
    parser.add_argument("--seed", type=int, metavar="S", help="which scenes (default: 1)")
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=(*COLUMNS, *MORE_COLUMNS),
        metavar="COLUMN",
        help=f"some of: {', '.join(COLUMNS)} (default: all; of CLIP and SigLIP, all but text_only); "
        f"and, of a model that answers, {', '.join(MORE_COLUMNS)}",
    )
    parser.add_argument(
        "--data",
        type=shared.path,
        metavar="FILE.jsonl",
        help="your own lines or shards instead of scenes, as for finetune; of CLIP and SigLIP: pairs, as "
        "for train-contrastive",
    )
    own = parser.add_argument_group("own lines", "With --data, of a model that answers.")
    own.add_argument(
        "--worst",
        type=shared.path,
        metavar="PAGE.html",
        help="write a page of the pictures with the worst answers",
    )
    own.add_argument("--empty-answer", metavar="WORD", help="as in finetune")
    own.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )
    own.add_argument(
        "--codebook",
        type=shared.path,
        metavar="FILE.npz",
        help="of the model's masks (default: that of the shipped model)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


OWN = ("worst", "empty_answer", "on_bad_line", "codebook")


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from minivlm.data.pairs import read_pairs
    from minivlm.evaluation import evaluate
    from minivlm.evaluation.contrastive import PAIR_COLUMNS, evaluate_own_pairs, evaluate_pairs
    from minivlm.evaluation.tables import as_json, as_text
    from minivlm.files import check_output

    if options.data is not None:
        shared.refuse(options, ("scenes", "seed", "columns"), "is about drawn scenes: leave out it or --data")
    asked = {"scenes": 2000, "seed": 1} | shared.given(options, ("scenes", "seed"))
    if asked["scenes"] < 1:
        raise InputError(f"--scenes is {asked['scenes']}: ask for at least 1")
    if asked["seed"] < 0:
        raise InputError(f"--seed is {asked['seed']}: it must not be negative")
    if options.data is None:
        shared.refuse(options, OWN, "is about your own lines: add --data FILE.jsonl, or leave it out")
    if options.worst is not None:
        check_output(options.worst, [options.data], replace=False)
    kind, model, processor = shared.open_reading(options)
    if kind != "answers":
        shared.refuse(options, OWN, "is of models that answer: leave it out, or choose such a folder")
    elif options.data is not None:
        return _run_own(options, model, processor)
    if kind == "answers":
        columns = tuple(dict.fromkeys(options.columns or COLUMNS))
        table, baseline = evaluate(model, processor, columns=columns, **asked), "majority"
    elif options.data is None:
        columns = tuple(dict.fromkeys(options.columns or PAIR_COLUMNS))
        table, baseline = evaluate_pairs(model, processor, columns=columns, **asked), "chance"
    else:
        pairs = read_pairs(options.data, [processor.tokenizer])
        table, baseline = {"own pairs": evaluate_own_pairs(model, processor, pairs)}, "chance"
    print(json.dumps(as_json(table, baseline)) if options.json else as_text(table, baseline))


def _run_own(options: argparse.Namespace, model: Any, processor: Any) -> None:
    """Print the table about your own lines, and write the page of the worst."""
    from minivlm.data.samples import read_samples
    from minivlm.evaluation.confusion import confusions, confusions_as_text
    from minivlm.evaluation.own import answer_own, own_metrics
    from minivlm.evaluation.tables import as_json, as_text
    from minivlm.processing import MaskCodebook

    codebook = None if options.codebook is None else MaskCodebook.from_file(options.codebook)
    samples = read_samples(
        options.data,
        processor,
        model.language_model.config.max_position_embeddings,
        partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None,
        options.empty_answer,
    )
    given = answer_own(model, processor, samples)
    table = {"own lines": own_metrics(given, codebook)}
    mistaken = confusions(given.kinds, [sample.suffix for sample in samples], given.answers)
    if options.json:
        print(json.dumps(as_json(table) | {"confusions": mistaken}))
    else:
        shared.say("\n\n".join(filter(None, (as_text(table), confusions_as_text(mistaken)))))
    if options.worst is not None:
        from minivlm.cli.worst import write_worst

        count = write_worst(options.worst, model, processor, given, f"{options.data}")
        if not options.json:
            shared.say(f"{options.worst}: {count} to look at")
