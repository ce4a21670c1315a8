"""The smallest training that the package has, alone or in several processes, for notebook 21."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from minivlm.distributed.torchrun import joined
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig
from minivlm.training.folder import holds_state
from minivlm.training.loop import Loop

TOWERS = ContrastiveConfig(
    "siglip", image_size=16, tower_width=16, tower_layers=1, tower_heads=2, text_width=16, text_layers=1,
    text_heads=2, max_length=28, steps=60, batch_size=8, warmup_steps=5, lr=2e-3, bf16=False,
)  # fmt: skip
OFTEN = Loop(save_every=10, log_every=2, measure_every=0, workers=0, progress=False)


def train_towers(out: Path) -> None:
    """Two towers with SigLIP's loss, from the start or from what was saved, alone or with other processes."""
    torch.set_num_threads(1)
    with joined():
        train_contrastive(out, TOWERS, loop=replace(OFTEN, resume=holds_state(out)))


def train_quietly(out: Path) -> None:
    """The same in a process whose warnings would stand in a notebook: DDP says that all weights are used."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train_towers(out)
