"""What several commands share: options, the model that they name, and how messages look."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from minivlm.data.lines import BadLines
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED, load, load_paligemma
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.speed.compiled import compile_parts

Model = TypeVar("Model", bound=torch.nn.Module)

if TYPE_CHECKING:  # argparse has no public name for what add_subparsers returns
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model(parser: argparse.ArgumentParser, what: str = "a PaliGemma checkpoint") -> None:
    """--model, --revision, --dtype, --device, --quantize, --pack, --compile."""
    parser.add_argument(
        "--model", metavar="FOLDER_OR_REPO_ID", help=f"{what} (default: the shipped tiny one)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the repo (default: its main branch)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_device(parser)
    parser.add_argument("--quantize", choices=("int8",), help="round the decoder's matrices (default: no)")
    parser.add_argument(
        "--pack", action="store_true", help="a copy of the weights that is faster for prompts and batches"
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile, which pays for many answers"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")


def open_any(options: argparse.Namespace) -> tuple[Any, Any]:
    """As `open_model`, of whatever kind the folder is: see `minivlm.load`."""
    model, processor = load(options.model or SHIPPED, **_choices(options))
    return _compiled(model, options), processor


def open_model(options: argparse.Namespace) -> tuple[PaliGemma, Processor]:
    """The model that the options of `add_model` name. Raises InputError: as `check_device` and `load`."""
    model, processor = load_paligemma(options.model or SHIPPED, **_choices(options))
    return _compiled(model, options), processor


def _compiled(model: Model, options: argparse.Namespace) -> Model:
    if options.compile:
        compile_parts(model)
    return model


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_model` say about loading."""
    if options.model is None:
        refuse(options, ("revision",), "is of a repo of the Hub: add --model OWNER/NAME, or leave it out")
    device = check_device(options.device)
    return {
        "dtype": getattr(torch, options.dtype),
        "device": device,
        "revision": options.revision,
        "quantize": options.quantize,
        "pack": options.pack,
    }


def check_device(name: str) -> torch.device:
    """Raises InputError: no such device, or none that can be computed on here."""
    try:
        one = torch.ones(1, device=name)
        one.item()  # some devices exist but hold no numbers
        return one.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"device {name!r} cannot be used here ({reason}): try --device cpu") from error


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


def at_least_0(text: str) -> int:
    """The type of numbers that may be 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def at_least_1(text: str) -> int:
    """The type of numbers of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def one_line(message: str) -> str:
    """The name of a file, for instance, may have several."""
    return " ".join(message.splitlines())


def show(bad: BadLines, kind: str) -> None:
    """Bad lines one below the other, on standard error. `kind` is error or warning."""
    print(f"minivlm: {kind}: {one_line(bad.summary)}:", file=sys.stderr)
    for reason in bad.reasons:
        print(f"  {one_line(reason)}", file=sys.stderr)
    print(bad.advice, file=sys.stderr)
