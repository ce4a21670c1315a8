"""`minivlm finetune`: a model that answers, trained further on your own pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from minivlm.cli import options as shared
from minivlm.cli.program import command
from minivlm.errors import InputError

if TYPE_CHECKING:
    from minivlm.adapters import LoraConfig
    from minivlm.cli.options import Commands
    from minivlm.training.finetuning import Finetuning

HELP = """\
Your pictures are described by lines of JSON, each with the path of a picture, a prompt and its answer:
  {"image": "photos/1.jpg", "prefix": "what is it?", "suffix": "a cup"}
  {"image": "photos/1.jpg", "prefix": "detect cup", "suffix": "<loc0256><loc0128><loc0767><loc0895> cup"}
Paths are relative to the file. A folder of shards, which `minivlm data shards` makes, can stand for a file.
The four numbers of a box are y0 x0 y1 x1 in 1024ths of the picture's sides; minivlm.processing.box_to_tokens
makes them from pixels, and `minivlm data convert` from COCO, YOLO and other formats. For a picture without
the objects asked for, write a word such as none, or leave the suffix empty and choose the word with
--empty-answer.

Ctrl-C finishes the step and saves; the same command with --resume goes on.
"""

LORA = ("lora_alpha", "lora_targets", "rslora", "dora", "quantize")
BEST = ("loss", "exact", "iou")  # of `minivlm.training.best`
PARTS = ("tower", "decoder")  # of `minivlm.training.finetuning`, whose import takes seconds


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "finetune",
        help="train a model further on your own pictures",
        description="Train the shipped model, or any other that answers, on your own pictures.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=shared.path, metavar="FILE.jsonl", required=True, help="what to train on, see below"
    )
    parser.add_argument("--validation", type=shared.path, metavar="FILE.jsonl", help="what to measure on")
    parser.add_argument(
        "--model",
        type=shared.text,
        metavar="FOLDER_OR_REPO_ID",
        help="where to start (default: the shipped tiny model)",
    )
    parser.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )
    parser.add_argument(
        "--empty-answer",
        metavar="WORD",
        help="what an empty suffix stands for, such as none (default: such lines are bad)",
    )
    shared.add_run(
        parser, out="runs/tuned", measure_every=50, measured="--validation", warmup="a twentieth of all steps"
    )
    choice = parser.add_argument_group(
        "best state", "With --validation. Without --best, the last one is left."
    )
    choice.add_argument(
        "--best",
        choices=BEST,
        help="leave the state with the lowest loss, the most exact answers, or the best boxes",
    )
    choice.add_argument(
        "--patience",
        type=shared.at_least_1,
        metavar="N",
        help="end the run after so many measurements without a better state (default: never)",
    )
    parser.add_argument(
        "--log",
        choices=("csv", "tensorboard"),
        default="csv",
        help="tensorboard: losses and metrics there as well, in a folder of --out (default: csv alone)",
    )
    parser.add_argument(
        "--suggest", action="store_true", help="train nothing, and print settings to begin with"
    )
    recipe = parser.add_argument_group("recipe")
    number = partial(recipe.add_argument, metavar="N")
    number("--epochs", type=int, help="times that every line is shown (default: 10)")
    number("--steps", type=int, help="instead of --epochs")
    number("--batch-size", type=int, help="lines computed at once (default: 8)")
    recipe.add_argument(
        "--replay",
        type=float,
        metavar="SHARE",
        help="of rows from the drawn world, such as 0.2, against forgetting; with 0 as well, the end says "
        "what was forgotten (default: none)",
    )
    recipe.add_argument(
        "--augment",
        type=lambda typed: tuple(typed.split(",")),
        metavar="KIND,KIND",
        help="show other views of pictures, with boxes moved along: some of shift, zoom, crop, color "
        "(default: none)",
    )
    recipe.add_argument(
        "--checkpointing",
        action="store_true",
        help="gradient checkpointing: less memory, about a third more time, the same result",
    )
    recipe.add_argument(
        "--shard",
        action="store_true",
        help="with torchrun: divide weights, gradients and moments among the processes, so that a model fits "
        "that is too large for one",
    )
    number("--accumulate", type=int, help="batches for one step, as one larger batch (default: 1)")
    number("--lr", type=float, help="learning rate (default: 1e-3 for small models, 2e-5 for large ones)")
    recipe.add_argument(
        "--freeze", choices=PARTS, action="append", help="leave this part as it is; may be given twice"
    )
    number("--max-length", type=int, help="tokens of picture and line at most (default: the model's context)")
    adapter = parser.add_argument_group(
        "adapter",
        "With --lora, the model stays as it is, and a low-rank adapter learns, which needs far less memory.\n"
        "It is what --out holds then: ask --adapter, merge and the package peft open it.",
    )
    adapter.add_argument("--lora", type=int, metavar="RANK", help="such as 8 or 16")
    adapter.add_argument(
        "--lora-alpha",
        type=shared.above_0,
        metavar="N",
        help="strength of the change (default: twice the rank)",
    )
    adapter.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="ends of names of layers, as transformers has them, such as q_proj v_proj (default: all linear "
        "layers of the decoder's blocks)",
    )
    adapter.add_argument(
        "--rslora", action="store_true", default=None, help="divide alpha by the root of the rank, not by it"
    )
    adapter.add_argument(
        "--dora", action="store_true", default=None, help="learn the length of each row on its own"
    )
    adapter.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="round the decoder that the adapter is trained for; in bf16, int4 takes a third of its memory "
        "(default: no)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and say how good the answers are and how to ask for more."""
    from dataclasses import fields, replace

    from minivlm.data.overlap import name_overlap, overlap
    from minivlm.training.finetuning import FinetuningConfig, finetune
    from minivlm.training.folder import LOG
    from minivlm.training.log import read_log
    from minivlm.training.replay import forgetting_as_text

    if options.suggest:
        return _suggest(options)
    if options.measure_every and options.validation is None:
        raise InputError("--measure-every has nothing to measure on: add --validation FILE.jsonl")
    if options.best is None:
        shared.refuse(options, ("patience",), "waits for a better state: add --best, or leave it out")
    elif options.validation is None:
        raise InputError(f"--best {options.best} has nothing to measure on: add --validation FILE.jsonl")
    values = shared.given(options, [field.name for field in fields(FinetuningConfig)])
    values["freeze"] = tuple(part for part in PARTS if part in values.get("freeze", ()))
    config = FinetuningConfig(**values)
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    loop = replace(
        shared.prepare_loop(options),
        checkpointing=options.checkpointing,
        shard=options.shard,
        log=options.log,
        tell=shared.say,
    )
    started = time.monotonic()
    if options.lora is None:
        shared.refuse(options, LORA, "is of an adapter: add --lora RANK, or leave it out")
        done = finetune(options.out, config, options.data, options.validation, warn=warn, loop=loop)
    else:
        from minivlm.training.lora import finetune_adapter

        lora = _adapter(options)
        done = finetune_adapter(
            options.out, config, lora, options.data, options.validation, warn=warn, loop=loop
        )
    if not shared.is_first():
        return
    measured = [line for line in read_log(options.out / LOG) if line.get("exact match") is not None]
    if measured:
        first, last = measured[0], measured[-1]
        shared.say(
            f"Exact answers to {options.validation}: {first['exact match']:.3f} at step {first['step']}, "
            f"{last['exact match']:.3f} at step {last['step']}."
        )
    _tell_best(done, measured)
    if shared_lines := overlap(done.validation, done.samples):
        shared.say(
            f"These numbers are too good: training showed the pictures of {len(shared_lines)} of "
            f"{len(done.validation)} validation lines, {name_overlap(shared_lines)}."
        )
    if done.world is not None:
        shared.say(forgetting_as_text(*done.world))
    # `ask` shows one picture with a prompt.
    sample = next((one for one in done.samples if len(one.paths) == 1), done.samples[0])
    made = "model" if options.lora is None else "adapter"
    base = [] if options.lora is None or options.model is None else ["--model", options.model]
    rounded = [] if options.quantize is None else ["--quantize", options.quantize]
    with_it = [*base, f"--{made}", str(options.out), *rounded]
    ask = command("ask", sample.paths[0], "--prompt", sample.prefix, *with_it)
    shared.print_end(started, options.out, f"Ask it:\n  {ask}", made)


def _suggest(options: argparse.Namespace) -> None:
    """Print settings to begin with, and the command that has them."""
    from minivlm.data.samples import read_samples
    from minivlm.models.load import SHIPPED, load_answering
    from minivlm.models.quantized import require_plain
    from minivlm.training.suggest import suggest, suggestions_as_text

    model: Any
    model, processor = load_answering(options.model or SHIPPED, dtype=None)
    require_plain(model, "training all weights, which --suggest is about,")
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    limit = model.language_model.config.max_position_embeddings
    samples = read_samples(options.data, processor, limit, warn, options.empty_answer)
    weights = sum(weight.numel() for weight in model.parameters())
    found = suggest(
        samples,
        weights,
        options.validation,
        knows_world=options.model is None,
        device=options.device,
    )
    shared.say(f"For {len(samples)} lines and {weights / 1e6:,.1f} million weights, to begin with:")
    shared.say(suggestions_as_text(found))
    given = [] if options.validation is None else ["--validation", str(options.validation)]
    given += [] if options.model is None else ["--model", options.model]
    chosen = [part for one in found for part in (one.option, one.value) if one.option != "--validation"]
    typed = command("finetune", "--data", str(options.data), *given, "--out", str(options.out), *chosen)
    shared.say(f"All of them:\n  {typed}")


def _tell_best(done: Finetuning, measured: Sequence[dict[str, Any]]) -> None:
    """Which state the folder holds, and whether the run ended before its last step."""
    if done.choice is None:
        return
    step = done.choice.best_step(measured)
    best = next(line for line in measured if line["step"] == step)
    column = done.choice.column
    shared.say(f"The folder holds the state of step {step}, the best by {column}: {best[column]:.4g}.")
    if done.step < done.total_steps:
        shared.say(
            f"The run ended at step {done.step} of {done.total_steps}: {done.choice.patience} measurements "
            "in a row were no better."
        )


def _adapter(options: argparse.Namespace) -> LoraConfig:
    """What the options of the adapter say."""
    from minivlm.adapters import LoraConfig

    return LoraConfig(
        target_modules=None if options.lora_targets is None else tuple(options.lora_targets),
        r=options.lora,
        lora_alpha=2 * options.lora if options.lora_alpha is None else options.lora_alpha,
        use_rslora=bool(options.rslora),
        use_dora=bool(options.dora),
    )
