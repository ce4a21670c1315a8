"""`minivlm demo`: the shipped model on the sample pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.cli import options as shared
from minivlm.cli.program import command
from minivlm.errors import InputError
from minivlm.files import check_output

if TYPE_CHECKING:
    from minivlm.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Describe the command."""
    demo = commands.add_parser("demo", help="the shipped model on the sample pictures")
    demo.add_argument(
        "--out", type=shared.path, default=Path("demo"), help="folder for pictures with boxes (default: demo)"
    )
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a table of answers, and write the pictures with what was pointed at."""
    from minivlm.cli.pictures import draw_answers, is_drawing, save_picture
    from minivlm.models.load import load_answering
    from minivlm.processing import load_picture, to_rgb
    from minivlm.world.demo import PROMPTS_FILE, SAMPLES, read_samples, write_samples

    # A folder of the workshop has the pictures, which its notebooks show, and no prompts.
    folder = SAMPLES if (SAMPLES / PROMPTS_FILE).is_file() else options.out / "samples"
    if not (folder / PROMPTS_FILE).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds other files than samples: choose another folder with --out")
        write_samples(folder)
    samples = read_samples(folder)
    for path in samples:
        drawing = options.out / path.name
        check_output(drawing, [*samples, folder / PROMPTS_FILE], replace=is_drawing(drawing))
    model, processor = load_answering()
    rows = [("picture", "prompt", "answer")]
    for path, prompts in samples.items():
        picture = to_rgb(load_picture(path))
        inputs: dict[str, Any] = processor([picture] * len(prompts), prompts)
        answers = processor.decode(model.generate(**inputs))
        rows += [(path.name, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        save_picture(draw_answers(picture, answers), options.out / path.name)
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for number, (name, prompt, answer) in enumerate(rows):
        shared.say(f"{name:<{widths[0]}}  {prompt:<{widths[1]}}  {answer}")
        if number == 0:
            shared.say(f"{'-' * widths[0]}  {'-' * widths[1]}  {'-' * 40}")
    shared.say(
        f"\nThe pictures with the boxes that the model pointed at are in {options.out.resolve()}.\n\nNext:"
    )
    sample = folder / "scene_1.png"
    shared.say(f"  ask your own question      {command('ask', sample, '--prompt', 'caption en')}")
    shared.say(f"  measure the model          {command('eval', '--scenes', '50')}")
    shared.say(f"  train your own             {command('train', '--out', 'runs/mine')}")
    if folder == SAMPLES:  # the course is in the repository alone
        print("  read how it works          make lab, from 00_tour on")
