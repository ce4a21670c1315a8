"""The numbers with which something can be trained, the same in every recipe.

Outside of them a run would learn nothing, fail after an hour, or take the machine's memory until the system
kills something.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from minivlm.checkpoints.devices import require_memory
from minivlm.errors import InputError

MOST_AT_ONCE = max(8, 4 * (os.cpu_count() or 1))  # threads, or processes: more only wait for each other

FROM_0 = (
    "seed", "tower_steps", "packed_steps", "review_steps", "prefix_steps", "alike_steps", "last_steps",
    "alike_pairs", "last_pairs", "text_steps", "supervised_steps", "rewarded_steps", "rehearsal",
)  # fmt: skip
LEAST = {
    "row_tokens": 16,  # a short question with its answer
    "prefix_row_tokens": 16,
    "clip": 1e-3,  # well below, gradients vanish beside the epsilon of AdamW
    "lr": 1e-9,  # below, steps are lost in the rounding of the weights
    "muon_lr": 1e-9,
    "adamw_lr": 1e-9,
    "review_lr_factor": 1e-3,
    "alike_lr_factor": 1e-3,
}
MOST = {
    "image_size": 4096,
    "patch_size": 4096,
    "tower_width": 8192,
    "tower_layers": 256,
    "tower_heads": 256,
    "text_width": 8192,
    "text_layers": 256,
    "text_heads": 256,
    "tower_pictures": 2**12,
    "pictures": 2**12,
    "batch_size": 2**16,
    "accumulate": 2**16,
    "questions": 1000,
    "prefix_questions": 1000,
    "relations": 1000,
    "review_relations": 1000,
    "alike_share": 1.0,
    "last_share": 1.0,
    "alike_pairs": 1000,
    "last_pairs": 1000,
    "row_tokens": 512,
    "prefix_row_tokens": 512,
    "loc_sigma": 1024.0,
}


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raises InputError: a number of a recipe is outside its limits. None stands for a default."""
    for name, value in config.items():
        if type(value) not in (int, float):  # a bool is an int, too
            continue
        least = LEAST.get(name, 0 if isinstance(value, float) or name in FROM_0 else 1)
        most = MOST.get(name, 2**32 - 1)
        if not least <= value <= most:  # NaN neither
            raise InputError(f"{name} is {value}: choose a number from {least:g} to {most}")


def check_warmup(warmup_steps: int, steps: int) -> None:
    """Raises InputError: the learning rate would hardly leave 0. A hundred steps, the default, are fine."""
    if warmup_steps > max(steps, 100):
        raise InputError(
            f"warmup_steps is {warmup_steps}, and the run has {steps} steps: the learning rate would never "
            "reach its peak. Choose fewer"
        )


def require_room(parameters: int, pictures: int, image_size: int, device: torch.device | str) -> None:
    """Check that the device holds a model four times in fp32, and the pictures of a batch.

    That is the least: weights, gradients and two moments of AdamW. What is computed in between comes on top.

    Raises InputError: it does not.
    """
    needed = 16 * parameters + 12 * pictures * image_size**2
    what = f"{parameters / 1e6:,.0f} million weights in training and {pictures} pictures at once"
    require_memory(needed, device, what, "choose a smaller model, smaller pictures, or fewer at once")
