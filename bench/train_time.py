"""How long `minivlm train` takes on this machine: some steps of each stage, timed and multiplied.

Run: python bench/train_time.py [--threads 2] [--steps 60]
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace

import torch

from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import Run


def main() -> None:
    """Print steps per second of each stage and the minutes of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each stage")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = TrainingConfig()
    warm_up = 10
    each = warm_up + options.steps
    planned = {stage: steps for stage, steps in recipe.stages.items() if steps}
    config = replace(recipe, **{f"{stage}_steps": each for stage in planned}, warmup_steps=each)
    times: dict[str, list[float]] = {name: [] for name in planned}

    run = Run(config)
    last = time.perf_counter()
    for batch in run.batches():
        stage = config.stage(run.step)
        run.advance(batch)
        now = time.perf_counter()
        times[stage].append(now - last)
        last = now
    minutes = 0.0
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    for stage, steps in planned.items():
        seconds = sum(times[stage][warm_up:]) / options.steps
        minutes += seconds * steps / 60
        print(f"{stage:<8}{1 / seconds:6.2f} steps/s, {steps} steps in {seconds * steps / 60:5.1f} minutes")
    print(f"a whole run: {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
