"""`minivlm data convert | check | split`: from pictures in other formats to lines that can be trained on.

`data shards` and `data unpack` are in shards.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.cli import options as shared
from minivlm.cli import shards
from minivlm.cli.options import counted
from minivlm.cli.program import command
from minivlm.errors import InputError

if TYPE_CHECKING:
    from minivlm.cli.options import Commands
    from minivlm.data.annotated import Source
    from minivlm.data.check import Facts, Shown
    from minivlm.data.converting import Report

FORMATS = {  # each with what SOURCE is, and the options that only some formats have
    "coco": ("FILE.json", ("images",)),
    "yolo": ("FOLDER or data.yaml", ("images", "split", "names")),
    "voc": ("FOLDER", ("images", "split")),
    "folders": ("FOLDER with a folder for each class", ()),
    "csv": ("FILE.csv", ("images", "columns")),
    "hf": ("FOLDER that save_to_disk of datasets wrote", ("split", "columns", "box_format")),
}
OWN = ("images", "split", "names", "columns", "box_format")
TASKS = ("detect", "segment", "caption", "classify", "pairs")  # of `minivlm.data.annotated`
MOST_SHOWN = 10  # rows of a table

CONVERT_HELP = f"""\
formats:
{chr(10).join(f"  {name:8} {what}" for name, (what, _) in FORMATS.items())}

Each picture becomes a line such as
  {{"image": "photos/1.jpg", "prefix": "detect cat ; dog", "suffix": "<loc0256>... cat ; <loc0012>... dog"}}
with its path relative to the file that is written. A picture that is missing or broken, or one of whose
objects is, is left out and named at the end; then the exit code is 1. Nothing that exists is overwritten.
"""

CHECK_HELP = """\
Exit code 1: some lines would be refused in training.
"""

SPLIT_HELP = """\
Of my.jsonl, my-train.jsonl, my-validation.jsonl and so on are written beside it, with the lines as they are.
Pictures that are the same, pixel for pixel, stay together, whatever their files are called. Which part a
picture comes to depends on --seed and its pixels, not on its name or place.
"""


def add_to(commands: Commands) -> None:
    """Describe the command, which has commands of its own."""
    data = commands.add_parser(
        "data",
        help="convert, check, split and pack your own pictures for training",
        description="Make files for `minivlm finetune` and `minivlm train-contrastive`, and look at them.",
    )
    own = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_convert, _add_check, _add_split, shards.add_shards, shards.add_unpack):
        parser = add(own)
        parser.set_defaults(parser=parser)


def _add(own: Commands, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    return own.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_convert(own: Commands) -> argparse.ArgumentParser:
    parser = _add(
        own, "convert", "write lines for pictures that are described in another format", CONVERT_HELP
    )
    parser.add_argument("format", choices=tuple(FORMATS), metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("source", type=shared.path, metavar="SOURCE", help="see below")
    parser.add_argument(
        "--out", type=shared.path, metavar="FILE.jsonl", required=True, help="the file to write"
    )
    lines = parser.add_argument_group("lines")
    lines.add_argument("--task", choices=TASKS, help="what to learn (default: what the source is made for)")
    lines.add_argument(
        "--prompt",
        type=shared.text,
        metavar="TEXT",
        help="with {classes} where their names belong (default: that of PaliGemma)",
    )
    lines.add_argument(
        "--classes", nargs="+", metavar="NAME", help="only these classes, in this order (default: all)"
    )
    lines.add_argument(
        "--ask",
        choices=("all", "present"),
        default="all",
        help="for all classes in every picture, or for those that it shows (default: all)",
    )
    lines.add_argument(
        "--empty-answer",
        type=shared.text,
        metavar="WORD",
        help="the answer about a picture without objects, such as none (default: it is left out)",
    )
    lines.add_argument(
        "--every-answer",
        action="store_true",
        help="several lines for a picture with several captions (default: the first)",
    )
    lines.add_argument(
        "--codebook",
        type=shared.path,
        metavar="FILE.npz",
        help="for --task segment: of the model that will be trained (default: that of the shipped model)",
    )
    source = parser.add_argument_group("source")
    source.add_argument("--images", type=shared.path, metavar="FOLDER", help="where the pictures lie")
    source.add_argument("--split", metavar="NAME", help="yolo, voc, hf: one part of it, such as train")
    source.add_argument("--names", type=shared.path, metavar="FILE", help="yolo: a class in each line")
    source.add_argument(
        "--columns",
        nargs="+",
        type=_column,
        metavar="WHAT=NAME",
        help="csv, hf: what columns are called, as in image=photo answer=caption",
    )
    source.add_argument(
        "--box-format", choices=("xywh", "xyxy"), help="hf: corner and size, or two corners (default: xywh)"
    )
    source.add_argument(
        "--boxes",
        choices=("upright", "stored"),
        help="of pictures that EXIF turns: what boxes are about (default: what the sizes say)",
    )
    parser.set_defaults(run=run_convert)
    return parser


def _column(typed: str) -> tuple[str, str]:
    """The type of --columns."""
    what, equal, name = typed.partition("=")
    if not (what and equal and name):
        raise argparse.ArgumentTypeError(f"{typed!r} is not like image=photo")
    return what, name


def _add_check(own: Commands) -> argparse.ArgumentParser:
    parser = _add(own, "check", "say what training would refuse in a file, and what is in it", CHECK_HELP)
    parser.add_argument("file", type=shared.path, metavar="FILE.jsonl", help="or shards, see data shards")
    parser.add_argument(
        "--sheet", type=shared.path, metavar="FILE.html", help="write a page with pictures and answers"
    )
    parser.add_argument(
        "--samples", type=shared.at_least_1, default=24, metavar="N", help="lines on the page (default: 24)"
    )
    parser.add_argument("--seed", type=shared.seed, default=0, metavar="S", help="which lines (default: 0)")
    parser.add_argument(
        "--model",
        type=shared.text,
        metavar="FOLDER_OR_REPO_ID",
        help="what will be trained (default: the shipped tiny model; of pairs: new towers)",
    )
    parser.add_argument("--max-length", type=shared.at_least_1, metavar="N", help="as in finetune")
    parser.add_argument("--empty-answer", metavar="WORD", help="as in finetune")
    parser.set_defaults(run=run_check)
    return parser


def _add_split(own: Commands) -> argparse.ArgumentParser:
    parser = _add(own, "split", "divide a file for training, validation and testing", SPLIT_HELP)
    parser.add_argument("file", type=shared.path, metavar="FILE.jsonl")
    parser.add_argument(
        "--validation",
        type=shared.above_0,
        default=0.1,
        metavar="SHARE",
        help="of the pictures (default: 0.1)",
    )
    parser.add_argument("--test", type=shared.above_0, metavar="SHARE", help="(default: no such part)")
    parser.add_argument("--seed", type=shared.seed, default=0, metavar="S", help="(default: 0)")
    parser.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )
    parser.set_defaults(run=run_split)
    return parser


# ---- convert -----------------------------------------------------------------------------------------------


def run_convert(options: argparse.Namespace) -> int:
    """Write the lines, and say what was left out and why."""
    from minivlm.data.converting import BadPictures, LineForm, convert
    from minivlm.evaluation.waiting import Bar
    from minivlm.files import check_output
    from minivlm.processing import MaskCodebook

    kind, (_, own) = options.format, FORMATS[options.format]
    fits = {name: [one for one, (_, options) in FORMATS.items() if name in options] for name in OWN}
    for name in set(OWN) - set(own):
        shared.refuse(options, (name,), f"is for {' and '.join(fits[name])}: leave it out")
    check_output(options.out, replace=False)
    source = _open_source(kind, options)
    form = LineForm(
        task=options.task or source.task,
        prompt=options.prompt,
        ask=options.ask,
        classes=tuple(options.classes or ()),
        empty_answer=options.empty_answer,
        every_answer=options.every_answer,
        frame=options.boxes,
        codebook=None if options.codebook is None else MaskCodebook.from_file(options.codebook),
    )
    report = convert(source, form, options.out, partial(Bar, label="pictures", unit="picture"))
    _print_report(report, options.out)
    if report.bad:
        count = f"{len(report.bad)} {'entry is' if len(report.bad) == 1 else 'entries are'}"
        shared.show(BadPictures(report.bad, f"{count} bad and left out", "All others are written"), "warning")
    return 1 if report.bad else 0


def _open_source(kind: str, options: argparse.Namespace) -> Source:
    """What SOURCE holds, in its format."""
    from minivlm.data.class_folders import read_class_folders
    from minivlm.data.coco import read_coco
    from minivlm.data.hf_datasets import read_dataset
    from minivlm.data.tables import read_table
    from minivlm.data.voc import read_voc
    from minivlm.data.yolo import read_yolo

    columns = dict(options.columns or ())
    match kind:
        case "coco":
            return read_coco(options.source, options.images)
        case "yolo":
            return read_yolo(options.source, options.split, options.images, options.names)
        case "voc":
            return read_voc(options.source, options.split, options.images)
        case "folders":
            return read_class_folders(options.source)
        case "csv":
            return read_table(options.source, options.images, columns)
    pictures = options.out.with_name(f"{options.out.stem}-pictures")
    return read_dataset(options.source, pictures, options.split, columns, options.box_format or "xywh")


def _print_report(report: Report, out: Path) -> None:
    shared.say(f"{out}: {counted(report.lines, 'line')} about {counted(report.pictures, 'picture')}")
    if report.objects:
        _print_table("objects", report.objects.most_common())
    if report.left_out:
        _print_table("left out", report.left_out.most_common())
    shared.say(f"Look at it:\n  {command('data', 'check', out, '--sheet', out.with_suffix('.html'))}")


def _print_table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    shared.say(f"{title}:")
    for name, value in rows[:MOST_SHOWN]:
        name = name if len(name) <= 60 else name[:57] + "..."
        shared.say(f"  {value if isinstance(value, str) else format(value, ','):>8}  {name}")
    if len(rows) > MOST_SHOWN:
        shared.say(f"  {'':8}  and {len(rows) - MOST_SHOWN} more")


# ---- check -------------------------------------------------------------------------------------------------


def run_check(options: argparse.Namespace) -> int:
    """Print what is in the file, and draw some of it."""
    from minivlm.data.check import examine, kind_of_lines
    from minivlm.data.lines import BadLines
    from minivlm.evaluation.waiting import Bar
    from minivlm.files import check_output

    if options.sheet is not None:
        check_output(options.sheet, [options.file], replace=False)
    bad: list[BadLines] = []
    if kind_of_lines(options.file) == "pairs":
        shared.refuse(options, ("max_length", "empty_answer"), "is about answers, not about pairs")
        lines, limit = _read_pairs(options, bad), 0
    else:
        lines, limit = _read_samples(options, bad)
    facts = examine(lines, partial(Bar, label="pictures", unit="picture"))
    _print_facts(facts, limit)
    if options.sheet is not None:
        _write_sheet(lines, options)
    for error in bad:
        error.advice = "Training would refuse them, or leave them out with --on-bad-line skip"
        shared.show(error, "warning")
    return 1 if bad else 0


def _read_samples(options: argparse.Namespace, bad: list[Any]) -> tuple[list[Shown], int]:
    """The good lines of a file for `finetune`, and how many tokens a line may have."""
    from minivlm.data.check import Shown
    from minivlm.data.samples import length_of, read_samples
    from minivlm.models.load import SHIPPED, load_answering

    model, processor = load_answering(options.model or SHIPPED, dtype=None)
    context = model.language_model.config.max_position_embeddings
    limit = min(context, options.max_length or context)
    samples = read_samples(options.file, processor, limit, bad.append, options.empty_answer)
    return [
        Shown(one.line, one.paths, one.prefix, one.suffix, length_of(one, processor)) for one in samples
    ], limit


def _read_pairs(options: argparse.Namespace, bad: list[Any]) -> list[Shown]:
    """The good lines of a file for `train-contrastive`."""
    from minivlm.data.check import Shown
    from minivlm.data.pairs import read_pairs
    from minivlm.models.load import load_matching

    tokenizers = [] if options.model is None else [load_matching(options.model, dtype=None)[1].tokenizer]
    pairs = read_pairs(options.file, tokenizers, bad.append)
    lengths = [len(tokenizers[0].encode(pair.text)) if tokenizers else 0 for pair in pairs]
    return [
        Shown(one.line, (one.path,), "", one.text, length) for one, length in zip(pairs, lengths, strict=True)
    ]


def _print_facts(facts: Facts, limit: int) -> None:
    shared.say(f"{counted(facts.lines, 'good line')} about {counted(facts.pictures, 'picture')}")
    if facts.tokens.most:
        least, median, most = facts.tokens
        most_allowed = f", of {limit:,} at most" if limit else ""
        shared.say(f"tokens of a line: {least:,.0f} to {most:,.0f}, half below {median:,.0f}{most_allowed}")
    prompts = [row for row in facts.prompts if row[0]]
    if prompts:
        _print_table("prompts", prompts)
    if facts.answers:
        _print_table("answers without boxes", facts.answers)
    if facts.classes:
        shared.say("objects, and how much of the picture their boxes fill:")
        by_count = sorted(facts.classes.items(), key=lambda item: -item[1][0])
        for name, (count, (least, median, most)) in by_count[:MOST_SHOWN]:
            shared.say(f"  {count:>8,}  {name}: {least:.2g} % to {most:.2g} %, half below {median:.2g} %")
        if len(by_count) > MOST_SHOWN:
            shared.say(f"  {'':8}  and {len(by_count) - MOST_SHOWN} more")
    _print_alike("the same picture in several files", facts.same)
    _print_alike("pictures that look alike", facts.alike)


def _print_alike(title: str, groups: Sequence[Sequence[Path]]) -> None:
    if groups:
        shared.say(f"{title}: {len(groups)}")
        for group in groups[:MOST_SHOWN]:
            shared.say(f"  {'  '.join(map(str, group))}")
        if len(groups) > MOST_SHOWN:
            shared.say(f"  and {len(groups) - MOST_SHOWN} more")


def _write_sheet(lines: Sequence[Shown], options: argparse.Namespace) -> None:
    """A page with some of the lines, their pictures and what is drawn into them."""
    import numpy as np

    from minivlm.cli.pictures import draw_answers
    from minivlm.files import write_aside
    from minivlm.looking.sheet import Entry, sheet_page
    from minivlm.processing import load_picture, to_rgb

    count = min(options.samples, len(lines))
    chosen = np.random.default_rng(options.seed).choice(len(lines), count, replace=False)
    entries = []
    for line in (lines[number] for number in sorted(chosen.tolist())):
        pictures = [to_rgb(load_picture(path)) for path in line.paths]
        if len(pictures) == 1:  # boxes do not say which picture they are in
            pictures = [draw_answers(pictures[0], [line.answer])]
        names = ", ".join(map(str, line.paths))
        entries.append(Entry(pictures, f"line {line.line}: {names}", line.prompt, line.answer))
    with write_aside(options.sheet) as temporary:
        page = sheet_page(entries, f"{count} of {counted(len(lines), 'line')} of {options.file}")
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    shared.say(f"{options.sheet}: {counted(count, 'line')} to look at")


# ---- split -------------------------------------------------------------------------------------------------


def run_split(options: argparse.Namespace) -> None:
    """Write the parts, and say how large they are and what looks alike in different ones."""
    from minivlm.data.check import kind_of_lines
    from minivlm.data.split import split_lines
    from minivlm.evaluation.waiting import Bar

    shares = {"validation": options.validation}
    if options.test is not None:
        shares["test"] = options.test
    if sum(shares.values()) >= 1:
        raise InputError(
            f"--validation and --test are {sum(shares.values()):g} in all: leave some to train on"
        )
    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    watch = partial(Bar, label="pictures", unit="picture")
    divided = split_lines(options.file, shares, options.seed, warn, watch)
    for part in divided.parts:
        lines, pictures = counted(part.lines, "line"), counted(part.pictures, "different picture")
        shared.say(f"{part.path}: {lines} about {pictures}")
    _print_alike("pictures that look alike, but are in different parts", divided.apart)
    train, validation = divided.parts[0].path, divided.parts[1].path
    trains = "train-contrastive" if kind_of_lines(options.file) == "pairs" else "finetune"
    shared.say(f"Train on it:\n  {command(trains, '--data', train, '--validation', validation)}")
