"""Training in several processes: losses of a batch that is spread over them, and gradients that are averaged.

- `joined`: be one of the processes that `torchrun` has started.
- `parallel`: each process computes its share of a step, and PyTorch averages the gradients.
- `siglip_loss`: texts travel, in one of four exchanges (exchanges.py); pictures stay where they are.
- `clip_loss`, `distillation_loss`: a softmax needs whole rows and columns, so every process gathers both.
- `run`: starts processes on this machine, even from a notebook, and returns the result of each.
- `costs`: bytes sent and bytes held, as formulas.
"""

from minivlm.distributed.clip import clip_loss
from minivlm.distributed.distillation import distillation_loss
from minivlm.distributed.exchanges import EXCHANGES, bidirectional, gather, reduce, shift
from minivlm.distributed.places import ExchangeError, Place, here
from minivlm.distributed.processes import ProcessError, run
from minivlm.distributed.siglip import siglip_loss
from minivlm.distributed.torchrun import joined

__all__ = [
    "EXCHANGES",
    "ExchangeError",
    "Place",
    "ProcessError",
    "bidirectional",
    "clip_loss",
    "distillation_loss",
    "gather",
    "here",
    "joined",
    "reduce",
    "run",
    "shift",
    "siglip_loss",
]
