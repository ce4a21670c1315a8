"""`minivlm train`: the drawn world's model from nothing, or any model on pictures of one's own.

With --objective, two towers are trained instead, see train_contrastive.py.
"""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minivlm.cli import options as shared
from minivlm.cli import train_contrastive
from minivlm.errors import InputError
from minivlm.training.contrastive_recipe import ContrastiveConfig
from minivlm.training.finetuning import PARTS, FinetuningConfig, finetune
from minivlm.training.loop import LOG, Loop, read_log
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import train

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = f"""\
Your own pictures are lines of JSON, each with the path of a picture, a prompt and its answer:
  {{"image": "photos/1.jpg", "prefix": "what is it?", "suffix": "a cup"}}
  {{"image": "photos/1.jpg", "prefix": "detect cup", "suffix": "<loc0256><loc0128><loc0767><loc0895> cup"}}
Paths are relative to the file. The four numbers of a box are y0 x0 y1 x1 in 1024ths of the picture's sides;
minivlm.processing.box_to_tokens makes them of pixels.

{train_contrastive.HELP}
Ctrl-C finishes the step and saves; the same command with --resume goes on.
"""
SHARED = ("seed", "warmup_steps", "bf16")  # fields of both configs
OWN = ("validation", "model", "epochs", "steps", "batch_size", "accumulate", "lr", "freeze", "max_length")


def add_to(commands: Commands) -> None:
    """Describe the command."""
    parser = commands.add_parser(
        "train",
        help="train a tiny model from nothing on drawn scenes, or any model on your own pictures",
        description="Train a tiny model from nothing on drawn scenes; the defaults made the shipped one.\n"
        "With --data, train a model that exists on your own pictures.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the model (default: runs/tiny; with --data, runs/tuned; or runs/OBJECTIVE)",
    )
    train_contrastive.add_to(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    number = partial(parser.add_argument, metavar="N")
    number("--save-every", type=shared.at_least_1, default=250, help="steps (default: 250)")
    number(
        "--measure-every",
        type=shared.at_least_0,
        help="steps between metrics for log.csv, on 100 held-out scenes or on --validation; "
        "0: never (default: 500; with --data, 50; with two towers, 250)",
    )
    shared.add_device(parser)
    number("--threads", type=shared.at_least_1, help="to compute with (default: all cores)")
    number("--workers", type=shared.at_least_0, default=1, help="processes that prepare batches (default: 1)")
    number("--seed", type=int, help="(default: 0)")
    number("--warmup-steps", type=int, help="(default: 100; with prompts of your own, a twentieth)")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bf16, with weights in fp32 (default: where the device has instructions for it)",
    )
    _add_own(parser)
    _add_recipe(parser)
    parser.set_defaults(run=run)


def _add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("your own pictures")
    number = partial(group.add_argument, metavar="N")
    group.add_argument("--data", type=Path, metavar="FILE.jsonl", help="what to train on, see below")
    group.add_argument("--validation", type=Path, metavar="FILE.jsonl", help="what to measure on")
    group.add_argument(
        "--model", metavar="FOLDER_OR_REPO_ID", help="where to start (default: the shipped tiny model)"
    )
    number("--epochs", type=int, help="times that every line is shown (default: 10)")
    number("--steps", type=int, help=f"instead of --epochs {_also('steps')}")
    number("--batch-size", type=int, help=f"lines computed at once (default: 8) {_also('batch_size')}")
    number("--accumulate", type=int, help="batches for one step, as one larger batch (default: 1)")
    help = f"learning rate (default: 1e-3 for small models, 2e-5 for large ones) {_also('lr')}"
    number("--lr", type=float, help=help)
    group.add_argument(
        "--freeze", choices=tuple(PARTS), action="append", help="leave this part as it is; may be given twice"
    )
    help = f"tokens of picture and line at most (default: the model's context) {_also('max_length')}"
    number("--max-length", type=int, help=help)
    group.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """An option for every other field of TrainingConfig."""
    group = parser.add_argument_group("recipe of the drawn world")
    for field in fields(TrainingConfig):
        if field.name not in SHARED:
            help = f"(default: {field.default}) {_also(field.name)}".rstrip()
            group.add_argument(shared.option_of(field.name), type=type(field.default), metavar="N", help=help)


def _also(name: str) -> str:
    """The default of a field that the recipe of two towers has as well."""
    others = {field.name: field.default for field in fields(ContrastiveConfig)}
    return f"(two towers: {others[name]})" if name in others else ""


def run(options: argparse.Namespace) -> None:
    """Train, and say what to do with the model."""
    recipe = [field.name for field in fields(TrainingConfig) if field.name not in SHARED]
    own = (*OWN, "on_bad_line")
    towers = options.objective != "answers"
    if towers:
        train_contrastive.check(options, (*recipe, *own))
    elif options.data is not None:
        shared.refuse(
            options, recipe, "is part of the drawn world's recipe: leave it out, or leave out --data"
        )
        if options.measure_every and options.validation is None:
            raise InputError("--measure-every has nothing to measure on: add --validation FILE.jsonl")
    else:
        shared.refuse(options, own, "is for pictures of your own: add --data FILE.jsonl, or leave it out")
    if not towers:
        shared.refuse(options, ("teacher",), "belongs to --objective distill: leave it out")
    device = shared.check_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = options.objective if towers else "tiny" if options.data is None else "tuned"
    out = options.out or Path("runs") / name
    loop = Loop(
        resume=options.resume,
        save_every=options.save_every,
        measure_every=options.measure_every,  # None: as often as suits the kind of run
        workers=options.workers,
        device=device,
    )
    started = time.monotonic()
    if towers:
        next_command = train_contrastive.train(options, out, loop)
    elif options.data is None:
        train(out, TrainingConfig(**shared.given(options, (*recipe, *SHARED))), loop=loop)
        next_command = f"Measure it:\n  minivlm eval --model {shlex.quote(str(out))}"
    else:
        next_command = _finetune(options, out, loop)
    minutes = (time.monotonic() - started) / 60
    print(f"Trained for {minutes:.1f} minutes with {torch.get_num_threads()} threads.")
    print(f"The model is in {out}. {next_command}")


def _finetune(options: argparse.Namespace, out: Path, loop: Loop) -> str:
    """Train on the user's pictures, and return what to do next."""
    values = shared.given(options, (*OWN, *SHARED))
    validation = values.pop("validation", None)
    values["freeze"] = tuple(part for part in PARTS if part in values.get("freeze", ()))
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    run = finetune(out, FinetuningConfig(**values), options.data, validation, warn=warn, loop=loop)
    measured = [line for line in read_log(out / LOG) if line.get("exact match") is not None]
    if measured:
        first, last = measured[0], measured[-1]
        print(
            f"Exact answers to {validation}: {first['exact match']:.3f} at step {first['step']}, "
            f"{last['exact match']:.3f} at step {last['step']}."
        )
    picture, prompt, model = (
        shlex.quote(str(part)) for part in (run.samples[0].path, run.samples[0].prefix, out)
    )
    return f"Ask it:\n  minivlm ask {picture} --prompt {prompt} --model {model}"
