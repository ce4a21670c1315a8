"""`minivlm data shards | unpack`: from lines and their pictures to a few tars, and back."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from minivlm.cli import options as shared
from minivlm.cli.options import counted
from minivlm.cli.program import command

if TYPE_CHECKING:
    from minivlm.cli.options import Commands
    from minivlm.data.sharding import Written

SHARDS_HELP = """\
OUT_FOLDER is new. Of my.jsonl, the tars are my-000000.tar, my-000001.tar and so on, in the form of
WebDataset: 00000000.jpg is a picture, byte for byte, and 00000000.json beside it its lines. Wherever a
command takes a file of lines, it takes the folder as well, or one of its tars, or a pattern in quotes:
"shards/my-{000000..000012}.tar". Divide the file before, with data split.
"""

UNPACK_HELP = """\
SHARDS is a folder of tars, one tar, or a pattern. Of my.jsonl, the pictures come into the folder my-pictures
beside it, byte for byte. Nothing that exists is overwritten.
"""


def add_shards(own: Commands) -> argparse.ArgumentParser:
    """Describe `minivlm data shards`."""
    parser = own.add_parser(
        "shards",
        help="pack lines and their pictures into tars, as WebDataset has them",
        description="Pack lines and their pictures into tars, as WebDataset has them.",
        epilog=SHARDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=shared.path, metavar="DATA.jsonl")
    parser.add_argument("out", type=shared.path, metavar="OUT_FOLDER")
    parser.add_argument(
        "--size", type=shared.at_least_1, default=1000, metavar="N", help="pictures in a tar (default: 1000)"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--seed", type=shared.seed, default=0, metavar="S", help="of their random order (default: 0)"
    )
    order.add_argument(
        "--in-order", action="store_true", help="as in the file: training will mix only what lies close"
    )
    _add_bad_lines(parser)
    parser.set_defaults(run=run_shards)
    return parser


def add_unpack(own: Commands) -> argparse.ArgumentParser:
    """Describe `minivlm data unpack`."""
    parser = own.add_parser(
        "unpack",
        help="write shards as a file of lines and a folder of pictures",
        description="Write shards as a file of lines and a folder of pictures.",
        epilog=UNPACK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=shared.path, metavar="SHARDS")
    parser.add_argument("out", type=shared.path, metavar="OUT.jsonl")
    _add_bad_lines(parser)
    parser.set_defaults(run=run_unpack)
    return parser


def _add_bad_lines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-bad-line", choices=("refuse", "skip"), help="skip: leave bad lines out (default: refuse)"
    )


def run_shards(options: argparse.Namespace) -> None:
    """Write the tars, and say how many."""
    from minivlm.data.sharding import write_shards
    from minivlm.evaluation.waiting import Bar

    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    seed = None if options.in_order else options.seed
    watch = partial(Bar, label="tars", unit="tar")
    written = write_shards(options.file, options.out, options.size, seed, warn, watch)
    shared.say(f"{options.out}: {_told(written)}, {counted(written.tars, 'tar')}")
    shared.say(f"Look at it:\n  {command('data', 'check', options.out)}")


def run_unpack(options: argparse.Namespace) -> None:
    """Write the file and the pictures."""
    from minivlm.data.sharding import write_lines
    from minivlm.evaluation.waiting import Bar

    warn = partial(shared.show, kind="warning") if options.on_bad_line == "skip" else None
    written = write_lines(options.file, options.out, warn, partial(Bar, label="lines", unit="line"))
    shared.say(f"{options.out}: {_told(written)}, from {counted(written.tars, 'tar')}")


def _told(written: Written) -> str:
    return f"{counted(written.lines, 'line')} about {counted(written.pictures, 'picture')}"
