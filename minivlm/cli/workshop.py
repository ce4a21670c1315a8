"""`minivlm workshop`: the course's notebooks with blanks for the solutions of the exercises."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from minivlm.cli import options as shared

if TYPE_CHECKING:
    from minivlm.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Describe the command."""
    workshop = commands.add_parser(
        "workshop",
        help="write the notebooks for students, without solutions",
        description="Write the course's notebooks with blanks for solutions, and the pictures they show.",
    )
    workshop.add_argument("out", type=shared.path, metavar="OUT", help="the folder to write")
    workshop.add_argument(
        "--notebooks",
        type=shared.path,
        metavar="FOLDER",
        help="where they are (default: notebooks/ of the clone)",
    )
    workshop.add_argument("--solutions", action="store_true", help="fold each solution below its hints")
    present = workshop.add_mutually_exclusive_group()
    present.add_argument(
        "--overwrite", action="store_true", help="replace files in OUT, with the answers that they hold"
    )
    present.add_argument(
        "--keep", action="store_true", help="leave notebooks that are in OUT, with the answers that they hold"
    )
    workshop.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write them, and say what to do with them."""
    from minivlm.classroom.workshop import find_notebooks, write_workshop

    source = options.notebooks or find_notebooks()
    written = write_workshop(source, options.out, options.overwrite, options.keep, options.solutions)
    if options.keep:
        kept = len(list((options.out / "notebooks").glob("*.ipynb"))) - len(written)
        print(f"{options.out}: {len(written)} notebooks written, {kept} kept as they are")
        return
    print(f"{len(written)} notebooks, and the pictures that they show: {options.out}")
    print("They need an installed minivlm and nothing else: hand out the folder as it is.")
