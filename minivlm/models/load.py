"""From a folder's name to a model and its processor."""

from __future__ import annotations

from pathlib import Path

import torch

from minivlm import weights
from minivlm.configs import PaliGemmaConfig
from minivlm.errors import InputError
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor

SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"  # the small checkpoint that comes with the package

MODELS = ("paligemma",)  # the values of model_type in config.json


def load(
    name: str | Path = SHIPPED, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PaliGemma, Processor]:
    """Open a checkpoint: a local folder, or a repo id of the Hub such as "google/paligemma-3b-mix-224".

    >>> model, processor = load("google/paligemma-3b-mix-224", dtype=torch.bfloat16)

    Args:
        name: folder or repo id; without one, the small model that comes with the package.
        dtype: what the weights are converted to; None keeps what the files have.
        device: where the model computes, such as "cpu" or "cuda".

    Raises:
        InputError: the folder cannot be found or read, holds another system than those of `MODELS`, or its
            files do not fit together.
    """
    folder = weights.find_folder(name)
    values = weights.read_config(folder)
    if values.get("model_type") not in MODELS:
        raise InputError(
            f"{folder} holds a model of type {values.get('model_type')!r}, and only {', '.join(MODELS)} can "
            "be loaded: choose another checkpoint"
        )
    config = PaliGemmaConfig.from_dict(values)
    # The processor first: a mistake in its small files shows before the large ones are read.
    processor = Processor.from_pretrained(folder, image_seq_length=config.vision.num_patches)
    _check_pair(folder, config, processor)
    return PaliGemma.from_pretrained(folder, dtype=dtype, device=device), processor


def _check_pair(folder: Path, config: PaliGemmaConfig, processor: Processor) -> None:
    pairs = {
        "the id of <image>": (config.image_token_id, processor.tokenizer.image_id, "tokenizer.json"),
        "the picture's side": (
            config.vision.image_size,
            processor.image_processor.image_size,
            "preprocessor_config.json",
        ),
    }
    for what, (expected, found, file) in pairs.items():
        if found != expected:
            raise InputError(
                f"in {folder}, {what} is {expected} by config.json and {found} by {file}: take all files "
                "from the same checkpoint"
            )
