"""`minivlm ask`: every prompt about every picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from minivlm.cli import options as shared
from minivlm.cli.pictures import draw_answers, drawings, run_lengths, save_picture
from minivlm.errors import InputError
from minivlm.models.protocols import Answers
from minivlm.processing import (
    AnswerProcessor,
    load_picture,
    text_to_boxes,
    text_to_masks,
    to_device,
    to_rgb,
)

if TYPE_CHECKING:
    from minivlm.cli.options import Commands

HELP = """\
The shipped model knows colored shapes. It understands:
  caption en                                    what color is the star?
  detect red circle                             what shape is the red object?
  segment red circle                            what size is the red circle?
  how many circles are there?                   is there a red circle?
  is the red circle left of the blue star?
"""


def add_to(commands: Commands) -> None:
    """Describe the command."""
    ask = commands.add_parser(
        "ask",
        help="ask about pictures",
        description="Ask every prompt about every picture.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.add_argument(
        "pictures", metavar="PICTURE", nargs="+", help="picture files, of any format that Pillow reads"
    )
    ask.add_argument("--prompt", action="append", default=[], help="what to ask; may be given several times")
    ask.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts from a text file, one a line")
    shared.add_model(ask)
    ask.add_argument(
        "--draw",
        type=Path,
        metavar="OUT",
        help="write the picture with the boxes and masks of the answers; of several pictures, into a folder",
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
    ask.add_argument("--seed", type=shared.seed, help="makes sampling repeatable")
    ask.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Ask, and print each answer while it is generated."""
    prompts = [*options.prompt, *_read_prompts(options.prompts_file)]
    if not all(prompt.strip() for prompt in prompts):
        raise InputError('a --prompt is empty: ask something, such as "caption en"')
    if not prompts:
        raise InputError('there is nothing to ask: add --prompt "caption en" or --prompts-file FILE')
    # Everything that can be refused is checked before the model is loaded. Pictures are opened once more when
    # it is their turn: many large ones would fill the memory.
    sizes = [to_rgb(load_picture(path)).size for path in options.pictures]
    drawn: Sequence[Path | None] = [None] * len(sizes)
    if options.draw is not None:
        inputs = [*options.pictures, *([options.prompts_file] if options.prompts_file else [])]
        drawn = drawings(options.draw, options.pictures, sizes, inputs)
    model, processor = shared.open_answering(options)
    for path, drawing in zip(options.pictures, drawn, strict=True):
        picture = to_rgb(load_picture(path))
        answers = []
        for prompt in prompts:
            pieces = _stream_answer(model, processor, picture, prompt, options)
            answer = next(pieces)  # what is refused here is refused before anything is printed
            if not options.json:
                print(f"{path} | {prompt}\n{answer}", end="", flush=True)
            for piece in pieces:
                answer += piece
                if not options.json:
                    print(piece, end="", flush=True)
            answers.append(answer)
            if options.json:
                line = {"picture": path, "prompt": prompt, "answer": answer, **_found(answer, picture)}
                print(json.dumps(line), flush=True)
            else:
                print()
                for box in _found(answer, picture)["boxes"]:
                    print(f"  {box['name']}: {box['box']}")
        if drawing is not None:
            save_picture(draw_answers(picture, answers), drawing)
            if not options.json:
                print(f"drawn: {drawing}")


def _found(answer: str, picture: Image.Image) -> dict[str, list[dict[str, Any]]]:
    """The boxes in an answer, and its masks, in pixels of the picture."""

    def described(box: tuple[Any, ...]) -> dict[str, Any]:
        return {"name": box[4], "box": [round(edge, 1) for edge in box[:4]]}

    boxes = text_to_boxes(answer, *picture.size)
    masks = text_to_masks(answer, *picture.size)
    return {
        "boxes": [described(box) for box in boxes],
        "masks": [described(box) | {"mask": run_lengths(mask)} for box, mask in masks],
    }


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
    model: Answers,
    processor: AnswerProcessor,
    picture: Image.Image,
    prompt: str,
    options: argparse.Namespace,
) -> Iterator[str]:
    """The answer in pieces of text, as they become known."""
    ids: list[int] = []
    shown = ""
    tokens = model.stream(
        **to_device(processor([picture], [prompt]), model.device),
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
