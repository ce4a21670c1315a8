"""`minivlm progress`: how many exercises you, or the students, have solved."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from minivlm.classroom.limits import MEMORY, SECONDS, Limits
from minivlm.cli import options as shared
from minivlm.cli.program import command
from minivlm.errors import InputError, extra

if TYPE_CHECKING:
    from minivlm.classroom.progress import HandedIn
    from minivlm.cli.options import Commands

HELP = """\
Without FOLDER: your own notebooks in mine/, which `make lab` writes.

FOLDER/STUDENT/00_tour.ipynb, or deeper: several notebooks of each student.
FOLDER/STUDENT.ipynb: one notebook of each student.

Imports, definitions and exercises of each notebook are run, and judged by the checks of the installed
package. This is code of others, and it runs as you. Each notebook gets a process of its own, a copied
folder, a home of its own, and limits of time, memory and the size of files, so that accidents stay
harmless. Linux with Landlock (kernel 5.13 and later) also keeps it from changing files elsewhere, and from
6.12 on from ending other programs. It is no sandbox: code that means harm can read whatever you can, use the
network, and fake its result; without Landlock, also delete what you can. docs/teaching.md has the details.
Where that matters, use a container or a user without rights.
"""
LONGEST_REMARK = 100  # characters in a table


def add_to(commands: Commands) -> None:
    """Describe the command."""
    progress = commands.add_parser(
        "progress",
        help="count the exercises that you or your students have solved",
        description="Run your notebooks, or those of students, and print a table of the exercises that pass.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    progress.add_argument(
        "folder",
        type=shared.path,
        metavar="FOLDER",
        nargs="?",
        help="what students handed in (default: mine/)",
    )
    progress.add_argument("--yes", action="store_true", help="yes, run the code that others wrote")
    progress.add_argument(
        "--seconds",
        type=shared.at_least_1,
        default=120,
        metavar="N",
        help="for one notebook, {} to {}; a cell gets a quarter (default: 120)".format(*SECONDS),
    )
    progress.add_argument(
        "--memory",
        type=shared.at_least_1,
        default=4,
        metavar="GB",
        help="for one notebook, {} to {} (default: 4)".format(*MEMORY),
    )
    progress.add_argument(
        "--whole", action="store_true", help="run all cells of the notebooks, which takes minutes for each"
    )
    progress.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a line for each notebook when it is known."""
    from minivlm.classroom import landlock
    from minivlm.classroom.progress import find_handed_in, find_own

    if os.name != "posix":
        raise InputError("progress needs Linux or macOS: this system has no limits on processes")
    with extra("notebooks"):
        import IPython  # noqa: F401
        import nbformat  # noqa: F401
    limits = Limits(options.seconds, options.memory * 2**30, options.whole)
    if options.folder is None:
        print_table(find_own(), limits)
        return
    found = find_handed_in(options.folder)
    risk = "" if landlock.version() else " Nothing on this system keeps it from changing your files."
    risk += "" if landlock.version() >= 6 else " It could end your other programs, too."
    risk += " YOU ARE ROOT: it could change everything on this machine." if os.geteuid() == 0 else ""
    if not options.yes:
        more = command("progress", "--help")
        raise InputError(
            f"this runs code that others wrote, in {len(found)} notebooks, as you. Limits make accidents "
            f"harmless, but it is no sandbox (see {more}).{risk} If you want that, add --yes"
        )
    print(f"minivlm: running the code of {len(found)} notebooks, as you.{risk}", file=sys.stderr)
    print_table(found, limits)


def print_table(found: list[HandedIn], limits: Limits) -> None:
    """Judge the notebooks one after the other, and print the line of each."""
    from minivlm.classroom.progress import judge_handed_in

    rows = [(_plain(one.student), _plain(one.notebook)) for one in found]
    students = max(len("student"), *(len(student) for student, _ in rows))
    notebooks = max(len("notebook"), 12, *(len(notebook) for _, notebook in rows))
    print(f"{'student':<{students}}  {'notebook':<{notebooks}}  passed  remark")
    for one in found:
        result = judge_handed_in(one, limits)
        passed = f"{len(result.passed)} of {len(result.exercises)}" if result.exercises else "-"
        remark = _plain(result.remark)
        if len(remark) > LONGEST_REMARK:
            remark = remark[: LONGEST_REMARK - 3] + "..."
        name, notebook = _plain(result.student), _plain(result.notebook)
        print(f"{name:<{students}}  {notebook:<{notebooks}}  {passed:<6}  {remark}".rstrip(), flush=True)


def _plain(text: str) -> str:
    """Names and messages of others, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
