"""The command line, a file for each command: `minivlm demo | ask | look | eval`, to train
`data | train | finetune | merge | convert | train-contrastive | train-codebook | train-reasoning | plan`,
and for a classroom `doctor | workshop | progress`.

Bad input ends with a message on standard error that says what to do, and exit code 2. Answers go to standard
output as they are generated; notes and progress go to standard error.

Nothing here, nor in the modules of the commands, imports PyTorch before a command runs.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import minivlm
from minivlm.cli import (
    ask,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    finetune,
    look,
    merge,
    plan,
    progress,
    train,
    train_codebook,
    train_contrastive,
    train_reasoning,
    workshop,
)
from minivlm.cli.options import is_first, one_line, processes, show, tell
from minivlm.cli.program import command
from minivlm.errors import InputError, ToldElsewhere, extra

EXAMPLES = """\
examples:
  minivlm demo
  minivlm ask figures/samples/scene_1.png --prompt "caption en"
  minivlm ask photo.jpg --prompt "detect red circle" --draw boxes.png
  minivlm ask photo.jpg --prompt "segment red circle" --draw masks.png
  minivlm ask *.png --prompts-file prompts.txt --json
  minivlm ask photo.jpg --prompt "caption en" --model google/paligemma-3b-mix-224 --dtype bfloat16
  minivlm look photo.jpg --prompt "detect red circle" --out look
  minivlm train --out runs/tiny
  minivlm train --out runs/tiny --resume
  minivlm data convert coco instances.json --images photos --out my.jsonl
  minivlm data check my.jsonl --sheet my.html
  minivlm data split my.jsonl --validation 0.1
  minivlm data shards my-train.jsonl shards
  minivlm finetune --data my-train.jsonl --validation my-validation.jsonl --out runs/tuned
  minivlm finetune --data my-train.jsonl --lora 8 --out runs/adapter
  minivlm finetune --data my-train.jsonl --validation my-validation.jsonl --suggest
  minivlm eval --model runs/tuned --data my-validation.jsonl --worst worst.html
  minivlm merge --adapter runs/adapter --out runs/merged
  minivlm convert --model google/paligemma-3b-mix-224 --quantize int8 --out paligemma-int8
  minivlm train-contrastive --objective siglip --out runs/siglip
  minivlm train-codebook --out runs/masks.npz
  minivlm train-reasoning --task larger --out runs/larger
  minivlm eval --model runs/tiny --scenes 200
  minivlm eval --model runs/siglip
  minivlm plan --gpus 64 --model google/paligemma-3b-pt-224
  minivlm doctor
  minivlm workshop workshop
  minivlm progress handed_in --yes
"""

MOVED = {  # old spellings, and the commands that took their place
    ("train", "--objective"): "train-contrastive",
    ("train", "--data"): "finetune",
    ("train-masks",): "train-codebook",
}


class _Parser(argparse.ArgumentParser):
    """Errors as one line, with a guess at what was meant."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong is not None:
            message += _near(wrong[1], re.findall(r"[\w-]+", wrong[2]))
        self.exit(
            2, f"{self.prog}: error: {one_line(message)} (see {command(*self.prog.split()[1:], '--help')})\n"
        )

    def refuse_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """What is left over after all that was understood."""
        name = arguments[0].partition("=")[0]
        self.error(f"unrecognized arguments: {' '.join(arguments)}{_near(name, self._option_string_actions)}")


def _near(typed: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(typed, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


class _PrintCompletion(argparse.Action):
    """Print a script for the shell that completes commands, options and file names."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, option: object = None) -> None:
        with extra("completion"):
            import shtab
        print(shtab.complete(parser, shell))
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    moved = _moved(arguments)
    if moved is not None:
        tell(moved, "error")
        return 2
    try:
        options = _parse(arguments)
        with _joined(options):
            code = options.run(options) or 0
        sys.stdout.flush()
    except InputError as error:
        if not isinstance(error, ToldElsewhere):
            show(error, "error")
        return 2
    except KeyboardInterrupt as stop:
        if is_first():
            print(f"minivlm: stopped {one_line(str(stop))}".rstrip(), file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:  # a name too long for the system, for instance
            tell(f"{os.fsdecode(error.filename)}: {error.strerror}: check the name", "error")
            return 2
        if not isinstance(error, BrokenPipeError):  # the reader (head, less) has left, which is no mistake
            tell(f"cannot write the answers: {error.strerror or error}", "error")
        # Without this, Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(code)


@contextmanager
def _joined(options: argparse.Namespace) -> Iterator[None]:
    """Be one of the processes that torchrun has started. Only the first has something to say.

    Raises InputError: a command that has no use for several.
    """
    number, count = processes()
    if count == 1:
        yield
        return
    if not hasattr(options, "exchange_timeout"):
        if number == 0:
            raise InputError("torchrun is for commands that train: start this one without it")
        raise SystemExit(2)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of what was chosen on purpose
    from minivlm.distributed.torchrun import joined

    with joined(options.exchange_timeout), open(os.devnull, "w") as nowhere:
        if number == 0:
            yield
        else:
            with redirect_stdout(nowhere):
                yield


def _open_closed_streams() -> None:
    """Give a stream that was closed (`>&-`) a place where nothing is kept, before a file takes its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command, with its function `run`."""
    parser = _parser()
    if not arguments:  # help for whoever looks; for a script, a mistake, as argparse and git have it
        parser.print_help()
        parser.exit(2)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.refuse_unknown(unknown)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minivlm",
        description="A small vision-language model: ask it about pictures, train it, measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minivlm {minivlm.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        help="print a script for the shell that completes what is typed",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    models = (
        demo,
        ask,
        look,
        data,
        train,
        finetune,
        merge,
        convert,
        train_contrastive,
        train_codebook,
        train_reasoning,
        evaluate,
        plan,
    )
    for module in (*models, doctor, workshop, progress):
        module.add_to(commands)
    for one in commands.choices.values():
        one.set_defaults(parser=one)
    return parser


def _moved(arguments: Sequence[str]) -> str | None:
    """What to type instead of an old spelling."""
    typed = [argument.partition("=")[0] for argument in arguments]
    for old, new in MOVED.items():
        if typed[:1] == [old[0]] and set(old) <= set(typed):
            return f"minivlm {' '.join(old)} is now minivlm {new}: see minivlm {new} --help"
    return None
