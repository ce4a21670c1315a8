"""Gradient checkpointing: blocks keep their input alone, and compute the rest once more in the backward pass.

The backward pass needs what every layer computed. Kept, that is most of the memory of training with long
rows (T. Chen et al., 2016, https://arxiv.org/abs/1604.06174). Computed again, it costs one more forward pass,
and gradients are the same. It is put on from outside after loading, as everything in this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCKS = ("layers", "global_layers")  # what lists of blocks are called, in towers and decoders


def checkpoint_blocks(model: nn.Module) -> int:
    """Make the blocks of all towers and decoders forget. Returns how many there are.

    Names and weights stay as they are. Where no gradient is wanted, as in generation, nothing is different.
    """
    count = 0
    for block in blocks_of(model):
        # On the instance: `copy.deepcopy` would keep a tie to this very block, so copy first.
        block.forward = _checkpointed(block.forward)
        count += 1
    return count


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, in its own order."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in BLOCKS:
            yield from module


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
