"""The command line, a file for each command: `minivlm demo | ask | look | eval`, to train
`train | finetune | train-contrastive | train-codebook`, and for a classroom `doctor | workshop | progress`.

Bad input ends with a message on standard error that says what to do, and exit code 2. Answers go to standard
output as they are generated; progress bars go to standard error, and only to a terminal.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from minivlm.cli import (
    ask,
    demo,
    doctor,
    evaluate,
    finetune,
    look,
    progress,
    train,
    train_codebook,
    train_contrastive,
    workshop,
)
from minivlm.cli.options import one_line, show
from minivlm.cli.program import command
from minivlm.data.lines import BadLines
from minivlm.errors import InputError

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
  minivlm finetune --data train.jsonl --validation validation.jsonl --out runs/tuned
  minivlm train-contrastive --objective siglip --out runs/siglip
  minivlm train-codebook --out runs/masks.npz
  minivlm eval --model runs/tiny --scenes 200
  minivlm eval --model runs/siglip
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
    """Errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"{self.prog}: error: {one_line(message)} (see {command(*self.prog.split()[1:], '--help')})\n"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    moved = _moved(arguments)
    if moved is not None:
        print(f"minivlm: error: {moved}", file=sys.stderr)
        return 2
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
    except BadLines as error:
        show(error, "error")
        return 2
    except InputError as error:
        print(f"minivlm: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"minivlm: stopped {one_line(str(stop))}".rstrip(), file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader (head, less) has left, which is no mistake
            print(f"minivlm: error: cannot write the answers: {error.strerror or error}", file=sys.stderr)
        # Without this, Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minivlm",
        description="A small vision-language model: ask it about pictures, train it, measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    models = (demo, ask, look, train, finetune, train_contrastive, train_codebook, evaluate)
    for module in (*models, doctor, workshop, progress):
        module.add_to(commands)
    return parser


def _moved(arguments: Sequence[str]) -> str | None:
    """What to type instead of an old spelling."""
    typed = [argument.partition("=")[0] for argument in arguments]
    for old, new in MOVED.items():
        if typed[:1] == [old[0]] and set(old) <= set(typed):
            return f"minivlm {' '.join(old)} is now minivlm {new}: see minivlm {new} --help"
    return None
