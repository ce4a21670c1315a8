"""The command line: `minivlm demo | ask | look | train | train-masks | eval`, and for a classroom
`doctor | workshop | progress`, each in a file of its own.

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

from minivlm.cli import ask, demo, doctor, evaluate, look, progress, train, train_codebook, workshop
from minivlm.cli.options import one_line, show
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
  minivlm train --data train.jsonl --validation validation.jsonl --out runs/tuned
  minivlm train --objective siglip --out runs/siglip
  minivlm train-masks --out runs/masks.npz
  minivlm eval --model runs/tiny --scenes 200
  minivlm eval --model runs/siglip
  minivlm doctor
  minivlm workshop workshop
  minivlm progress handed_in --yes
"""


class _Parser(argparse.ArgumentParser):
    """Errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
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
    for command in (demo, ask, look, train, train_codebook, evaluate, doctor, workshop, progress):
        command.add_to(commands)
    return parser
