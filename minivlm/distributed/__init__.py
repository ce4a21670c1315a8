"""Contrastive losses for a batch spread over several processes, and a way to start such processes.

- `siglip_loss`: texts travel, in one of four exchanges (exchanges.py); pictures stay where they are.
- `clip_loss`: a softmax needs whole rows and columns, so every process gathers both.
- `run`: starts processes on this machine, even from a notebook, and returns the result of each.
- `costs`: bytes sent and bytes held, as formulas.
"""

from minivlm.distributed.clip import clip_loss
from minivlm.distributed.exchanges import EXCHANGES, bidirectional, gather, reduce, shift
from minivlm.distributed.places import ExchangeError, Place, here
from minivlm.distributed.processes import ProcessError, run
from minivlm.distributed.siglip import siglip_loss

__all__ = [
    "EXCHANGES",
    "ExchangeError",
    "Place",
    "ProcessError",
    "bidirectional",
    "clip_loss",
    "gather",
    "here",
    "reduce",
    "run",
    "shift",
    "siglip_loss",
]
