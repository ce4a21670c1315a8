"""Runs that are killed at random moments: is the folder always whole, the resumed run the same to the bit?

    python bench/fuzz/kills.py --kills 100 --seed 0

A tiny run is started in a process of its own and killed (SIGKILL) at a moment drawn from its whole length,
again and again, with `--resume` from then on, until it ends. Then the next run begins. After each kill, a
checkpoint in the folder has to open; at the end, weights and optimizer state have to equal those of a run
that nobody disturbed, and no temporary file may be left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from children import start
from safetensors.torch import load_file

from minivlm import InputError, load

RUN = (
    "train", "--image-size", "32", "--tower-width", "24", "--tower-layers", "1", "--tower-heads", "2",
    "--text-width", "32",
    "--text-layers", "1", "--text-heads", "2", "--tower-steps", "6", "--packed-steps", "6",
    "--review-steps", "0",
    "--prefix-steps", "6", "--alike-steps", "3", "--last-steps", "3",
    "--tower-pictures", "2", "--pictures", "2", "--questions", "2",
    "--prefix-questions", "2",
    "--warmup-steps", "2", "--measure-every", "0", "--save-every", "2", "--workers", "0", "--threads", "1",
)  # fmt: skip


def train(out: Path, resume: bool) -> int:
    """The run in a child process; its number."""
    return start([*RUN, "--out", str(out), *["--resume"] * resume], out.with_suffix(".txt"))


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child that ends by itself in time; None if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def same(folder: Path, whole: Path) -> list[str]:
    """Names of the files that differ from those of the undisturbed run."""
    wrong = sorted({path.name for path in folder.iterdir()} ^ {path.name for path in whole.iterdir()})
    for name in ("model.safetensors", "state.safetensors"):
        ours, wanted = load_file(folder / name), load_file(whole / name)
        if ours.keys() != wanted.keys() or any(not torch.equal(ours[key], wanted[key]) for key in wanted):
            wrong.append(name)
    return wrong


def count_end(out: Path, whole: Path, counts: Counter[str]) -> None:
    """Compare a run that has ended with the undisturbed one, say what differs, and remove it."""
    wrong = same(out, whole)
    counts["runs that DIFFER" if wrong else "runs equal to the bit"] += 1
    if wrong:
        print(f"differs: {', '.join(wrong)}")
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        whole, out = Path(name) / "whole", Path(name) / "run"
        began = time.monotonic()
        code = wait(train(whole, False), 300)
        length = time.monotonic() - began
        assert code == 0, whole.with_suffix(".txt").read_text()
        while counts["kills"] < options.kills:
            code = wait(train(out, resume=(out / "state.safetensors").exists()), rng.uniform(0, length))
            if code is None:
                counts["kills"] += 1
                if (out / "model.safetensors").exists():
                    with contextlib.suppress(InputError):
                        load(out)
                        counts["folders that open"] += 1
                        continue
                    counts["folders that do NOT open"] += 1
                else:
                    counts["folders without a model yet"] += 1
            elif code != 0:
                counts[f"exit code {code}"] += 1
                print(out.with_suffix(".txt").read_text()[-2000:])
                shutil.rmtree(out, ignore_errors=True)
            else:
                count_end(out, whole, counts)
    print(f"a run takes {length:.1f} s; seed {options.seed}: {dict(counts)}")


if __name__ == "__main__":
    main()
