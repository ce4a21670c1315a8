"""The command line: `minivlm demo | ask | train | eval`.

Bad input ends with one line on standard error that says what to do, and exit code 2. Answers go to standard
output as they are generated; progress bars go to standard error, and only to a terminal.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from minivlm.demo import SAMPLES, read_samples, write_samples
from minivlm.errors import InputError
from minivlm.evaluation import as_json, as_text, evaluate
from minivlm.files import write_aside
from minivlm.models.load import SHIPPED, load
from minivlm.models.paligemma import PaliGemma
from minivlm.plots import draw_boxes, side_by_side
from minivlm.processing import Box, Processor, load_picture, text_to_boxes, to_rgb
from minivlm.recipe import TrainingConfig
from minivlm.training import train

EXAMPLES = """\
examples:
  minivlm demo
  minivlm ask figures/samples/scene_1.png --prompt "caption en"
  minivlm ask photo.jpg --prompt "detect red circle" --draw boxes.png
  minivlm ask *.png --prompts-file prompts.txt --json
  minivlm ask photo.jpg --prompt "caption en" --model google/paligemma-3b-mix-224 --dtype bfloat16
  minivlm train --out runs/tiny
  minivlm train --out runs/tiny --resume
  minivlm eval --model runs/tiny --scenes 200
"""

ASK_HELP = """\
The shipped model knows colored shapes. It understands:
  caption en                                    what color is the star?
  detect red circle                             what shape is the red object?
  how many circles are there?                   what size is the red circle?
  is there a red circle?                        is the red circle left of the blue star?
"""


class _Parser(argparse.ArgumentParser):
    """Errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except InputError as error:
        print(f"minivlm: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minivlm: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader (head, less) has left, which is no mistake
            print(f"minivlm: error: cannot write the answers: {error.strerror or error}", file=sys.stderr)
        # Without this, Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _one_line(message: str) -> str:
    """The name of a file, for instance, may have several."""
    return " ".join(message.splitlines())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minivlm",
        description="A small vision-language model: ask it about pictures, train it, measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="the shipped model on the sample pictures")
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for pictures with boxes (default: demo)"
    )
    demo.set_defaults(run=_demo)

    ask = commands.add_parser(
        "ask",
        help="ask about pictures",
        description="Ask every prompt about every picture.",
        epilog=ASK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.add_argument(
        "pictures", metavar="PICTURE", nargs="+", help="picture files, of any format that Pillow reads"
    )
    ask.add_argument("--prompt", action="append", default=[], help="what to ask; may be given several times")
    ask.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts from a text file, one a line")
    _add_model(ask)
    ask.add_argument(
        "--draw", type=Path, metavar="OUT.png", help="write the pictures with the boxes of the answers"
    )
    ask.add_argument("--json", action="store_true", help="one JSON object a line")
    ask.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of an answer (default: 64)"
    )
    ask.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="above 0: sample (default: 0)"
    )
    ask.add_argument("--top-k", type=int, metavar="K", help="sample from the K best tokens")
    ask.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the best tokens of total probability P"
    )
    ask.add_argument("--seed", type=_seed, help="makes sampling repeatable")
    ask.set_defaults(run=_ask)

    training = commands.add_parser(
        "train",
        help="train a tiny model from nothing on drawn scenes",
        description="Train a tiny model from nothing on drawn scenes; the defaults made the shipped one.",
    )
    training.add_argument(
        "--out", type=Path, default=Path("runs") / "tiny", help="folder for the model (default: runs/tiny)"
    )
    training.add_argument("--resume", action="store_true", help="continue the run in --out")
    training.add_argument(
        "--save-every", type=_at_least_1, default=250, metavar="STEPS", help="(default: 250)"
    )
    training.add_argument(
        "--threads", type=_at_least_1, metavar="N", help="threads to compute with (default: all cores)"
    )
    _add_recipe(training)
    training.set_defaults(run=_train)

    evaluation = commands.add_parser("eval", help="measure a model on scenes that training never saw")
    _add_model(evaluation)
    evaluation.add_argument("--scenes", type=int, default=1000, metavar="N", help="(default: 1000)")
    evaluation.add_argument("--seed", type=int, default=1, metavar="S", help="which scenes (default: 1)")
    evaluation.add_argument("--json", action="store_true", help="one JSON object")
    evaluation.set_defaults(run=_eval)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER_OR_REPO_ID", help="a PaliGemma checkpoint (default: the shipped tiny one)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """An option for every field of TrainingConfig."""
    group = parser.add_argument_group("recipe")
    for field in fields(TrainingConfig):
        name = "--" + field.name.replace("_", "-")
        if field.name == "bf16":
            group.add_argument(
                name,
                action=argparse.BooleanOptionalAction,
                help="(default: where the CPU has instructions for it)",
            )
        else:
            group.add_argument(
                name, type=type(field.default), metavar="N", help=f"(default: {field.default})"
            )


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to below 2^62")
    return int(text)


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _load(options: argparse.Namespace) -> tuple[PaliGemma, Processor]:
    try:
        one = torch.ones(1, device=options.device)
        one.item()  # some devices exist but hold no numbers
        device = one.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"device {options.device!r} cannot be used here ({reason}): try --device cpu"
        ) from error
    return load(options.model or SHIPPED, dtype=getattr(torch, options.dtype), device=device)


def _demo(options: argparse.Namespace) -> None:
    folder = SAMPLES
    if not folder.is_dir():
        folder = options.out / "samples"
        write_samples(folder)
    model, processor = load()
    rows = [("picture", "prompt", "answer")]
    for path, prompts in read_samples(folder).items():
        picture = to_rgb(load_picture(path))
        inputs: dict[str, Any] = processor([picture] * len(prompts), prompts)
        answers = processor.decode(model.generate(**inputs))
        rows += [(path.name, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        boxes = [box for answer in answers for box in text_to_boxes(answer, *picture.size)]
        _save_picture(draw_boxes(picture, boxes), options.out / path.name)
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for number, (name, prompt, answer) in enumerate(rows):
        print(f"{name:<{widths[0]}}  {prompt:<{widths[1]}}  {answer}")
        if number == 0:
            print(f"{'-' * widths[0]}  {'-' * widths[1]}  {'-' * 40}")
    print(
        f"\nThe pictures with the boxes that the model pointed at are in {options.out.resolve()}.\n\n"
        "Next:\n"
        f'  ask your own question      .venv/bin/minivlm ask {folder}/scene_1.png --prompt "caption en"\n'
        "  measure the model          .venv/bin/minivlm eval\n"
        "  train your own             .venv/bin/minivlm train --out runs/mine\n"
        "  read how it works          make lab, from 00_tour on"
    )


def _ask(options: argparse.Namespace) -> None:
    prompts = [*options.prompt, *_read_prompts(options.prompts_file)]
    if not all(prompt.strip() for prompt in prompts):
        raise InputError('a --prompt is empty: ask something, such as "caption en"')
    if not prompts:
        raise InputError('there is nothing to ask: add --prompt "caption en" or --prompts-file FILE')
    if options.draw is not None:
        _check_picture_name(options.draw)
    # Everything that can be refused is looked at before the model is loaded.
    pictures = [to_rgb(load_picture(path)) for path in options.pictures]
    model, processor = _load(options)
    drawn = []
    for path, picture in zip(options.pictures, pictures, strict=True):
        found: list[Box] = []
        for prompt in prompts:
            pieces = _stream_answer(model, processor, picture, prompt, options)
            answer = next(pieces)  # what is refused here is refused before anything is printed
            if not options.json:
                print(f"{path} | {prompt}\n{answer}", end="", flush=True)
            for piece in pieces:
                answer += piece
                if not options.json:
                    print(piece, end="", flush=True)
            boxes = text_to_boxes(answer, *picture.size)
            found += boxes
            if options.json:
                line = {
                    "picture": path,
                    "prompt": prompt,
                    "answer": answer,
                    "boxes": [{"name": box.name, "box": [round(v, 1) for v in box[:4]]} for box in boxes],
                }
                print(json.dumps(line), flush=True)
            else:
                print()
                for box in boxes:
                    print(f"  {box.name}: {[round(v, 1) for v in box[:4]]}")
        if options.draw is not None:
            drawn.append(draw_boxes(picture, found))
    if options.draw is not None:
        _save_picture(side_by_side(drawn), options.draw)
        if not options.json:
            print(f"drawn: {options.draw}")


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"{path} cannot be read: {reason}. Give a text file with one prompt a line"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} holds no prompt: write one a line")
    return prompts


def _stream_answer(
    model: PaliGemma, processor: Processor, picture: Image.Image, prompt: str, options: argparse.Namespace
) -> Iterator[str]:
    """The answer in pieces of text, as they are known."""
    inputs: dict[str, Any] = processor([picture], [prompt])
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    ids: list[int] = []
    shown = ""
    tokens = model.stream(
        **inputs,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    for token in tokens:
        ids.append(int(token[0]))
        text = processor.decode(torch.tensor([ids]))[0]
        # Half of a character that takes several byte tokens decodes to U+FFFD: wait for the rest.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def _check_picture_name(path: Path) -> None:
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=kind)
    except (KeyError, OSError, ValueError) as error:  # unknown, can only be read, or holds no colors
        raise InputError(
            f"{path} has no ending that names a picture format to write: use something like {path.stem}.png"
        ) from error


def _save_picture(picture: Image.Image, path: Path) -> None:
    with write_aside(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def _train(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = [field.name for field in fields(TrainingConfig)]
    chosen: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    started = time.monotonic()
    train(options.out, TrainingConfig(**chosen), resume=options.resume, save_every=options.save_every)
    minutes = (time.monotonic() - started) / 60
    print(f"Trained for {minutes:.1f} minutes with {torch.get_num_threads()} threads.")
    print(f"The model is in {options.out}. Measure it:\n  minivlm eval --model {options.out}")


def _eval(options: argparse.Namespace) -> None:
    if options.scenes < 1:
        raise InputError(f"--scenes is {options.scenes}: ask for at least 1")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}: it must not be negative")
    model, processor = _load(options)
    table = evaluate(model, processor, scenes=options.scenes, seed=options.seed)
    print(json.dumps(as_json(table)) if options.json else as_text(table))
