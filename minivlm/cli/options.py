"""What several commands share: options, the model that they name, and how messages look."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.errors import InputError

if TYPE_CHECKING:
    from minivlm.models.load import Kind, LoadOptions
    from minivlm.models.protocols import Answers
    from minivlm.processing import AnswerProcessor
    from minivlm.training.loop import Loop

    # argparse has no public name for what add_subparsers returns
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# PyTorch takes seconds to import. No command does it before it runs, so that --help and mistakes in typing
# are answered at once: what needs it is imported by the function that uses it.

Recipe = Mapping[str, Mapping[str, tuple[int | float, str]]]  # group -> field -> default, and what it means
SHARED = ("seed", "warmup_steps", "bf16")  # options of `add_run` that are fields of every recipe


# ---- the model ---------------------------------------------------------------------------------------------


def add_model(
    parser: argparse.ArgumentParser, what: str = "a PaliGemma, LLaVA or Qwen-VL checkpoint"
) -> None:
    """--model, --revision, --adapter, --dtype, --device, --quantize, --pack, --compile."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=text, metavar="FOLDER_OR_REPO_ID", help=f"{what} (default: the shipped tiny one)"
    )
    group.add_argument("--revision", help="branch, tag or commit of the repo (default: its main branch)")
    group.add_argument(
        "--adapter",
        type=text,
        metavar="FOLDER_OR_REPO_ID",
        help="a low-rank adapter for the model, as minivlm finetune --lora or peft makes it",
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_device(group)
    group.add_argument(
        "--quantize", choices=("int8", "int4"), help="round the decoder's matrices (default: no)"
    )
    group.add_argument(
        "--pack", action="store_true", help="a copy of the weights that is faster for prompts and batches"
    )
    group.add_argument(
        "--compile", action="store_true", help="use torch.compile, which helps with many answers"
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """--device."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")


def open_answering(options: argparse.Namespace) -> tuple[Answers, AnswerProcessor]:
    """The model that the options of `add_model` name, and its processor.

    Raises InputError: it writes no answers; otherwise as `load`.
    """
    return _open(options, "answers", _choices(options))


def open_reading(options: argparse.Namespace) -> tuple[Kind, Any, Any]:
    """The kind of the model that the options of `add_model` name, the model, and its processor.

    Raises InputError: it reads no text; otherwise as `load`.
    """
    from minivlm.models.load import SHIPPED, SYSTEMS, kind_of

    choices, name = _choices(options), options.model or SHIPPED
    kind = kind_of(name, options.revision)
    if kind == "classifies":
        readers = [row for row, system in SYSTEMS.items() if system.kind != kind]
        raise InputError(f"{name} holds a model that reads no text: choose a folder of {', '.join(readers)}")
    return kind, *_open(options, kind, choices)


def _open(options: argparse.Namespace, kind: Kind, choices: LoadOptions) -> tuple[Any, Any]:
    from minivlm.models.load import SHIPPED, load

    model, processor = load(options.model or SHIPPED, kind=kind, **choices)
    if options.compile:
        from minivlm.speed.compiled import compile_parts

        compile_parts(model)
    return model, processor


def _choices(options: argparse.Namespace) -> LoadOptions:
    """What the options of `add_model` say about loading."""
    import torch

    from minivlm.checkpoints.devices import check_device

    if options.model is None:
        refuse(options, ("revision",), "is of a repo of the Hub: add --model OWNER/NAME, or leave it out")
    return {
        "dtype": getattr(torch, options.dtype),
        "device": check_device(options.device),
        "revision": options.revision,
        "quantize": options.quantize,
        "pack": options.pack,
        "adapter": options.adapter,
    }


# ---- a model that is written anew --------------------------------------------------------------------------


def add_source(parser: argparse.ArgumentParser, model: str, dtype: str) -> None:
    """--model, --revision, --dtype, and what each of them is of."""
    parser.add_argument(
        "--model",
        type=text,
        metavar="FOLDER_OR_REPO_ID",
        help=f"{model} (default: the shipped tiny one)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repo (default: its main branch)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help=f"{dtype} (default: that of the model's files)",
    )


def source_of(options: argparse.Namespace) -> tuple[str | Path, dict[str, Any]]:
    """What the options of `add_source` say: a folder or repo id, and how it is loaded."""
    import torch

    from minivlm.models.load import SHIPPED

    if options.model is None:
        refuse(options, ("revision",), "is of a repo of the Hub: add --model OWNER/NAME, or leave it out")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    return options.model or SHIPPED, {"dtype": dtype, "revision": options.revision}


# ---- a training run ----------------------------------------------------------------------------------------


def add_run(
    parser: argparse.ArgumentParser, out: str, measure_every: int, measured: str, warmup: str = "100"
) -> None:
    """--out, --resume, --save-every, --measure-every, --device, --threads, --workers, and those in `SHARED`.

    Args:
        out: the default folder.
        measure_every: the default number of steps.
        measured: what metrics are taken on.
        warmup: the default number of steps.
    """
    group = parser.add_argument_group("run")
    number = partial(group.add_argument, metavar="N")
    group.add_argument("--out", type=path, default=Path(out), help=f"folder for the model (default: {out})")
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    number("--save-every", type=at_least_1, default=250, help="steps (default: 250)")
    number(
        "--measure-every",
        type=at_least_0,
        help=f"steps between metrics for log.csv, on {measured} (default: {measure_every}; 0: never)",
    )
    add_device(group)
    number("--threads", type=at_least_1, help="to compute with (default: all cores)")
    number(
        "--exchange-timeout",
        type=above_0,
        default=600.0,
        help="seconds that a process waits for another, of those that torchrun started (default: 600)",
    )
    number("--workers", type=at_least_0, default=1, help="processes that prepare batches (default: 1)")
    number("--seed", type=int, help="(default: 0)")
    number("--warmup-steps", type=int, help=f"(default: {warmup})")
    group.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bf16, with weights in fp32 (default: where the device has instructions for it)",
    )


def add_recipe(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """An option for each number of a recipe, in groups."""
    for title, numbers in recipe.items():
        group = parser.add_argument_group(title)
        for name, (default, meaning) in numbers.items():
            group.add_argument(
                option_of(name),
                type=type(default),
                metavar="N",
                help=f"{meaning} (default: {default})".strip(),
            )


def prepare_loop(options: argparse.Namespace, out: Path | None = None) -> Loop:
    """Set the number of threads, and return what the options of `add_run` say about the loop.

    out: the run's folder, where it is not --out.

    Raises InputError: the device cannot be used; more threads or workers than make sense here.
    """
    import torch

    from minivlm.checkpoints.devices import check_device
    from minivlm.distributed.torchrun import own_device, restarts
    from minivlm.training.folder import holds_state
    from minivlm.training.limits import MOST_AT_ONCE
    from minivlm.training.loop import Loop

    loop = Loop(
        # Processes that torchrun starts again get the same command, and go on from what they have saved.
        resume=options.resume or (restarts() > 0 and holds_state(out or options.out)),
        save_every=options.save_every,
        measure_every=options.measure_every,  # None: as often as suits the kind of run
        workers=options.workers,
        device=own_device(check_device(options.device)),
        progress=None if is_first() else False,
    )
    if options.threads is not None:
        if options.threads > MOST_AT_ONCE:
            raise InputError(f"threads is {options.threads}: choose a number from 1 to {MOST_AT_ONCE} here")
        torch.set_num_threads(options.threads)
    return loop


def print_end(started: float, out: Path, what_next: str, made: str = "model") -> None:
    """The last lines of a run that began at `started`, a time of `time.monotonic`."""
    import torch

    minutes = (time.monotonic() - started) / 60
    say(f"Trained for {minutes:.1f} minutes with {torch.get_num_threads()} threads.")
    say(f"The {made} is in {out}. {what_next}")


# ---- single options ----------------------------------------------------------------------------------------


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values of those options that the user gave; others are None."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def refuse(options: argparse.Namespace, names: Iterable[str], reason: str) -> None:
    """Raises InputError: one of these options was given."""
    for name in given(options, names):
        raise InputError(f"{option_of(name)} {reason}")


def option_of(name: str) -> str:
    """`warmup_steps` as it is typed."""
    return "--" + name.replace("_", "-")


def seed(text: str) -> int:
    """The type of --seed."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to below 2^62")
    return int(text)


def text(typed: str) -> str:
    """The type of names: `--model ""` is a mistake, often a variable of the shell that was never set."""
    if not typed.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return typed


def path(typed: str) -> Path:
    """The type of files and folders. An empty one would be the current folder."""
    return Path(text(typed))


def at_least_0(text: str) -> int:
    """The type of numbers that may be 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def at_least_1(text: str) -> int:
    """The type of counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def above_0(text: str) -> float:
    """The type of rates."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


# ---- messages ----------------------------------------------------------------------------------------------


OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Names, prompts and answers without what a terminal would obey: escapes, and turns of the direction."""
    return OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def counted(number: int, what: str) -> str:
    """Such as 1 line, or 2,000 lines."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def say(text: str, end: str = "\n") -> None:
    """Print on standard output, at once."""
    print(plain(text), end=end, flush=True)


def processes() -> tuple[int, int]:
    """The number of this process, and how many torchrun has started; (0, 1) without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_first() -> bool:
    """Whether this process is the one that talks."""
    return processes()[0] == 0


def tell(message: str, kind: str) -> None:
    """A line on standard error. `kind` is error, warning or note; all processes have only errors to tell."""
    if kind == "error" or is_first():
        print(f"minivlm: {kind}: {one_line(message)}", file=sys.stderr)


def one_line(message: str) -> str:
    """The message without line breaks, which the name of a file, for instance, may bring in."""
    return plain(" ".join(message.splitlines()))


def show(error: InputError, kind: str) -> None:
    """A message on standard error; bad lines of a file stand one below the other."""
    reasons = getattr(error, "reasons", None)
    if reasons is None:  # no `BadLines`, whose module takes seconds to import
        tell(str(error), kind)
        return
    bad: Any = error
    tell(f"{bad.summary}:", kind)
    for reason in reasons:
        print(f"  {one_line(reason)}", file=sys.stderr)
    print(bad.advice, file=sys.stderr)
