"""What a notebook that somebody handed in may use. Apart from progress.py, whose imports take seconds."""

from __future__ import annotations

from dataclasses import dataclass

from minivlm.errors import InputError

SECONDS = (4, 24 * 3600)  # bounds of the limit: a cell gets a quarter
MEMORY = (2, 1024)  # bounds of the limit, in GB: Python with PyTorch needs one of address space


@dataclass(frozen=True)
class Limits:
    """For each notebook. Raises InputError: a number out of bounds."""

    seconds: float = 120  # counted from the first cell
    memory: int = 4 * 2**30  # bytes of address space
    whole: bool = False  # also run what is not a definition, exercise or check

    def __post_init__(self) -> None:
        least, most = SECONDS
        if not least <= self.seconds <= most:
            raise InputError(f"{self.seconds} seconds for a notebook: give it from {least} to {most}")
        least, most = MEMORY
        if not least * 2**30 <= self.memory <= most * 2**30:
            gigabytes = self.memory // 2**30
            raise InputError(f"{gigabytes} GB of memory for a notebook: give it from {least} to {most}")
