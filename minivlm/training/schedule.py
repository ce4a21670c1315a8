"""The learning rate over a run, as a share of its peak.

Early on, the weights and the optimizer's averages are noise, and large steps do harm: the rate warms up. Late
in the run, small steps average out the noise of single batches: the rate falls.
"""

from __future__ import annotations

import math


def warm_up(step: int, warmup: int) -> float:
    """A straight line from 1 / warmup at step 0 to 1 at step warmup - 1; 1 from there on."""
    return min(1.0, (step + 1) / warmup)


def warm_up_then_fall(step: int, steps: int, warmup: int) -> float:
    """A short way up, then a long way down.

        1 |   ,.
          |  /  `-.
          | /      `-.
          |/          `-.
        0 +---+----------`-.
          0 warmup         steps

    Both are straight lines. The second reaches 0 at the step after the last.
    """
    return warm_up(step, warmup) * (1.0 - step / steps)


def cosine_fall(step: int, steps: int) -> float:
    """Half a wave from 1 down to 0: slow at both ends, fast in the middle."""
    return 0.5 + 0.5 * math.cos(math.pi * (step / steps))
