"""The log of a run for TensorBoard, beside log.csv, which a run that is resumed reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivlm.errors import extra

FOLDER = "tensorboard"


def check_tensorboard() -> None:
    """Raises InputError: the package is not installed."""
    with extra("tensorboard"):
        import torch.utils.tensorboard  # noqa: F401


class Events:
    """Scalars in a folder that `tensorboard --logdir` opens.

    Args:
        step: from which on the run goes on. Later numbers, of steps that were lost, are hidden.

    Raises InputError: TensorBoard is not installed.
    """

    def __init__(self, out: Path, step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter
        self.writer = writer(str(out / FOLDER), purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """One line of the log: its numbers, at its step."""
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name.replace(" ", "_"), value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
