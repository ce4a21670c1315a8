"""One of four processes is killed at a random moment: do all start again, and is the end the same?

    python bench/fuzz/worker_kills.py --runs 10 --seed 0

The run of kills.py is started by torchrun. At a moment drawn from the whole life of its processes, one of
them, drawn as well, is killed (SIGKILL). torchrun ends the others and starts all again, and they go on from
the last state. Weights and optimizer state at the end have to equal those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kills import RUN, count_end

PATIENCE = 600  # seconds


def start(processes: int, out: Path) -> subprocess.Popen[str]:
    """torchrun with the run, where each process has a picture of every step."""
    launcher = ("torch.distributed.run", "--standalone", "--max-restarts", "3")
    pictures = ("--tower-pictures", str(processes), "--pictures", str(processes))
    command = [sys.executable, "-m", *launcher, "--nproc-per-node", str(processes), "-m", "minivlm", *RUN]
    return subprocess.Popen(
        [*command, *pictures, "--exchange-timeout", "60", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers_of(launcher: int) -> list[int]:
    """The processes that it has started; none before, and none when it has ended."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in children.split()]


def wait_for_workers(run: subprocess.Popen[str], processes: int) -> None:
    while run.poll() is None and len(workers_of(run.pid)) < processes:
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        whole, out = Path(name) / "whole", Path(name) / "run"
        run = start(options.processes, whole)
        wait_for_workers(run, options.processes)
        began = time.monotonic()
        said, _ = run.communicate(timeout=PATIENCE)
        length = time.monotonic() - began
        assert (whole / "model.safetensors").is_file(), said
        for _ in range(options.runs):
            run = start(options.processes, out)
            wait_for_workers(run, options.processes)
            time.sleep(rng.uniform(0, length))
            workers = workers_of(run.pid)
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
            said, _ = run.communicate(timeout=PATIENCE)
            if run.returncode:
                counts[f"exit code {run.returncode}"] += 1
                print(said[-2000:])
                shutil.rmtree(out, ignore_errors=True)
            else:
                counts["kills"] += bool(workers)
                count_end(out, whole, counts)
    print(f"{options.processes} processes, {length:.1f} s undisturbed; seed {options.seed}: {dict(counts)}")


if __name__ == "__main__":
    main()
