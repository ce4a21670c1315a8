"""What torchrun starts in a test: `minivlm` with the given arguments, of which one process dies in step 7."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest.mock import patch

from minivlm import cli
from minivlm.training.contrastive import ContrastiveRun

advance = ContrastiveRun.advance


def dying(run: ContrastiveRun, batch: Any) -> dict[str, float]:
    """The step; the second process does not live to see the seventh, unless it was started again."""
    if run.step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(run, batch)


if __name__ == "__main__":
    with patch.object(ContrastiveRun, "advance", dying):
        sys.exit(cli.main())
