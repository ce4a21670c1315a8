"""A real photograph, and a checkpoint of the reader's choice that is asked about it, in optional cells.

The environment variable MINIVLM_CHECKPOINT names the checkpoint: a folder, or a repo id of the Hub such as
"google/paligemma2-3b-mix-224". The course ships none of that size, so the outputs stored in the notebooks are
those without it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minivlm.errors import InputError, extra
from minivlm.models.load import Kind, kind_of, load
from minivlm.processing import load_picture, to_rgb

VARIABLE = "MINIVLM_CHECKPOINT"
DOES = {"answers": "writes answers", "matches": "matches pictures with texts", "classifies": "classifies"}


def photograph() -> Image.Image:
    """Grace Hopper in uniform, photographed for the US Navy: in the public domain, and part of Matplotlib.

    Raises InputError: Matplotlib was installed without its sample data.
    """
    with extra("notebooks"):
        from matplotlib import cbook
    path = Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    if not path.is_file():
        raise InputError(f"{path} is missing: install Matplotlib with its sample data")
    return to_rgb(load_picture(path))


def published(kind: Kind) -> tuple[Any, Any] | None:
    """Model and processor of the checkpoint that the reader named, in bf16; or None, and a line says why.

    Raises InputError: as `load`.
    """
    name = os.environ.get(VARIABLE, "")
    if not name:
        print(f"{VARIABLE} names no checkpoint: nothing is asked")
        return None
    if (found := kind_of(name)) != kind:
        print(f"{VARIABLE} names a model that {DOES[found]}; this cell asks one that {DOES[kind]}")
        return None
    return load(name, dtype=torch.bfloat16)
