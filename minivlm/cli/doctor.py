"""`minivlm doctor`: is this machine ready for the course, and if not, what to do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivlm.cli.options import Commands


def add_to(commands: Commands) -> None:
    """Describe the command."""
    doctor = commands.add_parser(
        "doctor",
        help="check that this machine is ready for the course",
        description="Check Python, packages, the notebooks' kernel, threads, memory and the shipped model. "
        "The exit code is 1 when anything is wrong.",
    )
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """A line for each finding, and what to do about those that are wrong."""
    from minivlm.classroom.doctor import examine
    from minivlm.cli.program import command

    wrong = 0
    for finding in examine():
        print(f"{'OK  ' if finding.ok else 'FAIL'}  {finding.name:<8}  {finding.found}", flush=True)
        if not finding.ok:
            print(f"      what to do: {finding.advice}", flush=True)
        wrong += not finding.ok
    print(f"{wrong} to fix, then run {command('doctor')} again." if wrong else "This machine is ready.")
    return int(wrong > 0)
