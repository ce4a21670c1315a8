"""Whether what a run learns from is still the same when it is resumed: a few digits that change with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.processing.images import open_file


def digest_of_lines(lines: Sequence[object], pictures: Iterable[Path]) -> str:
    """Changes with any text of the lines, and with any byte of a picture. JSON has to hold the lines."""
    total = hashlib.sha256(json.dumps(lines).encode())
    for path in dict.fromkeys(pictures):
        # One that is gone since it was checked: its batch will say so.
        with suppress(InputError, OSError), open_file(path, "picture") as file:
            total.update(hashlib.sha256(file.read()).digest())
    return total.hexdigest()[:8]


def digest_of_weights(model: nn.Module) -> str:
    """Changes with any weight."""
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        total.update(name.encode())
        total.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:8]
