"""`minivlm ask`: every prompt about every picture.

A single answer is printed while it is written. Several are written together, which is faster, and each is
printed when it is its turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.cli import options as shared
from minivlm.errors import InputError

if TYPE_CHECKING:
    from minivlm.cli.options import Commands
    from minivlm.models.answering import Loaded
    from minivlm.processing import Video

HELP = """\
The shipped model knows colored shapes. It understands:
  caption en                                    what color is the star?
  detect red circle                             what shape is the red object?
  segment red circle                            what size is the red circle?
  how many circles are there?                   is there a red circle?
  is the red circle left of the blue star?

Without a prompt, on a terminal, it asks for prompts about one picture until Ctrl-D. Of the file of prompts,
empty lines and lines that begin with "# " are left out. With --json, "confidence" is the probability of the
answer's least sure token, from 0 to 1; a coordinate counts as any coordinate.
"""


def add_to(commands: Commands) -> None:
    """Describe the command."""
    ask = commands.add_parser(
        "ask",
        help="ask about pictures and videos",
        description="Ask every prompt about every picture or video.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.add_argument(
        "pictures",
        metavar="PICTURE",
        nargs="+",
        help="picture files; of a model that reads them, also videos, animations and folders of pictures",
    )
    ask.add_argument("--prompt", action="append", default=[], help="what to ask; may be given several times")
    ask.add_argument(
        "--prompts-file", type=shared.path, metavar="FILE", help="prompts from a text file, one a line"
    )
    ask.add_argument(
        "--fps",
        type=shared.above_0,
        metavar="N",
        help="frames a second that are read of a video (default: as the model's folder says, mostly 2); "
        "the pictures of a folder are taken for so many a second",
    )
    shared.add_model(ask)
    ask.add_argument(
        "--draw",
        type=shared.path,
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
    ask.add_argument(
        "--contrast",
        type=float,
        default=0.0,
        metavar="A",
        help="above 0: against what a distorted picture would say, with this weight (default: 0)",
    )
    ask.add_argument("--seed", type=shared.seed, help="makes sampling repeatable")
    ask.add_argument(
        "--batch-tokens",
        type=shared.at_least_1,
        default=4096,
        metavar="N",
        help="of several answers, so many tokens are in memory at a time, with their pictures and prompts; 1 "
        "answers one after the other (default: 4096)",
    )
    ask.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Ask, and print each answer while it is generated."""
    from minivlm.cli.pictures import draw_answers, drawings, save_picture
    from minivlm.cli.videos import open_videos, set_rate
    from minivlm.processing import load_picture, to_rgb

    prompts: Iterable[str] = [*options.prompt, *_read_prompts(options.prompts_file)]
    if not all(prompt.strip() for prompt in prompts):
        raise InputError('a --prompt is empty: ask something, such as "caption en"')
    chat = not prompts and len(options.pictures) == 1 and sys.stdin.isatty() and sys.stdout.isatty()
    if chat:
        prompts = _typed()
    elif not prompts:
        raise InputError('there is nothing to ask: add --prompt "caption en" or --prompts-file FILE')
    # Everything that can be refused is checked before the model is loaded. Pictures are opened once more when
    # it is their turn: many large ones would fill the memory.
    videos = open_videos(options)
    sizes = [(videos.get(path) or to_rgb(load_picture(path))).size for path in options.pictures]
    drawn: Sequence[Path | None] = [None] * len(sizes)
    if options.draw is not None:
        inputs = [*options.pictures, *([options.prompts_file] if options.prompts_file else [])]
        drawn = drawings(options.draw, options.pictures, sizes, inputs)
    loaded = shared.open_answering(options)
    set_rate(loaded[1], options.fps)
    shown: list[str | Video] = [videos.get(path, path) for path in options.pictures]
    answered: Iterable[list[str]]
    if chat or len(shown) == len(list(prompts)) == 1:
        answered = [_ask_in_turn(loaded, options, shown[0], sizes[0], prompts, chat)]
    else:
        answered = _ask_together(loaded, options, shown, sizes, list(prompts))
    for path, drawing, answers in zip(options.pictures, drawn, answered, strict=True):
        if drawing is not None:  # which is refused where there are videos
            save_picture(draw_answers(to_rgb(load_picture(path)), answers), drawing)
            if not options.json:
                shared.say(f"drawn: {drawing}")


def _ask_in_turn(
    loaded: Loaded,
    options: argparse.Namespace,
    shown: str | Video,
    size: tuple[int, int],
    prompts: Iterable[str],
    chat: bool,
) -> list[str]:
    """Print answers about one picture while they are written, and return them."""
    from minivlm.models.answering import AnswerStream

    answers: list[str] = []
    for prompt in prompts:
        try:
            stream = AnswerStream(*loaded, shown, prompt, **_choices(options))
            pieces = iter(stream)
            answer = next(pieces)  # what is refused here is refused before anything is printed
            if not options.json:
                start = "" if chat else f"{options.pictures[0]} | {prompt}\n"
                shared.say(f"{start}{answer}", end="")
            for piece in pieces:
                answer += piece
                if not options.json:
                    shared.say(piece, end="")
        except InputError as error:
            if not chat:
                raise
            shared.show(error, "error")
            continue
        first = not answers
        answers.append(answer)
        asked = options.pictures[0], shown, size, prompt
        _tell(loaded, options, asked, answer, stream.confidence, stream.repeats, first)
    return answers


def _ask_together(
    loaded: Loaded,
    options: argparse.Namespace,
    shown: Sequence[str | Video],
    sizes: Sequence[tuple[int, int]],
    prompts: Sequence[str],
) -> Iterator[list[str]]:
    """Print the answers about each picture, and yield them."""
    from minivlm.models.many_answers import answers_to

    several = answers_to(*loaded, shown, prompts, batch_tokens=options.batch_tokens, **_choices(options))
    for path, picture, size, answers in zip(options.pictures, shown, sizes, several, strict=True):
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if not options.json:
                shared.say(f"{path} | {prompt}\n{answer.text}", end="")
            _tell(loaded, options, (path, picture, size, prompt), *answer, first=number == 0)
        yield [answer.text for answer in answers]


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "contrast")
    return {name: getattr(options, name) for name in names}


def _tell(
    loaded: Loaded,
    options: argparse.Namespace,
    asked: tuple[str, str | Video, tuple[int, int], str],
    answer: str,
    confidence: float | None,
    repeats: bool,
    first: bool,
) -> None:
    """Print what is to be said after an answer: its boxes and notes, or all of it as JSON.

    Args:
        asked: the path, what is there, its size, and the prompt.
        first: whether this is the first answer about the picture.
    """
    from minivlm.cli import notes
    from minivlm.processing import Video

    path, shown, size, prompt = asked
    found = _found(answer, size)
    if options.json:
        sure = None if confidence is None else round(confidence, 4)
        line = {"picture": path, "prompt": prompt, "answer": answer, "confidence": sure, **found}
        print(json.dumps(line), flush=True)
    else:
        shared.say("")
        for box in found["boxes"]:
            shared.say(f"  {box['name']}: {box['box']}")
    of_shown: Iterable[str] = ()
    if first and isinstance(shown, Video):
        of_shown = notes.of_video(shown, loaded[1])
    elif first:
        of_shown = notes.of_picture(*size, loaded[1].image_processor)
    of_words = notes.of_prompt(prompt, loaded[1].tokenizer)
    for note in (*of_shown, *of_words, *notes.of_answer(confidence, repeats)):
        shared.tell(note, "note")


def _typed() -> Iterator[str]:
    """Prompts as they are typed, until the end of the input."""
    with suppress(ImportError):  # keys to go back to earlier lines, where the system has them
        import readline  # noqa: F401
    print("Ask about the picture. Ctrl-D ends.", file=sys.stderr)
    with suppress(EOFError):
        while True:
            prompt = input("> ").strip()
            if prompt:
                yield prompt
    print()


def _found(answer: str, size: tuple[int, int]) -> dict[str, list[dict[str, Any]]]:
    """The boxes in an answer, and its masks, in pixels of the picture or of the frames."""
    from minivlm.cli.pictures import run_lengths
    from minivlm.processing import text_to_boxes, text_to_masks

    def described(box: tuple[Any, ...]) -> dict[str, Any]:
        return {"name": box[4], "box": [round(edge, 1) for edge in box[:4]]}

    boxes = text_to_boxes(answer, *size)
    masks = text_to_masks(answer, *size)
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
    stripped = (line.strip() for line in lines)
    prompts = [line for line in stripped if line and line != "#" and not line.startswith("# ")]
    if not prompts:
        raise InputError(f"{path} holds no prompt: write one a line")
    return prompts
