"""What tests/distributed/test_parallel_training.py runs in real processes, and in one to compare with."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from small_run import CONFIG, Stop
from small_towers import config as towers

from minivlm.adapters import LoraConfig
from minivlm.distributed.places import here
from minivlm.errors import InputError
from minivlm.training import kept, muon, state
from minivlm.training.contrastive import ContrastiveRun, train_contrastive
from minivlm.training.finetuning import Finetuning, FinetuningConfig, finetune
from minivlm.training.loop import Loop
from minivlm.training.lora import finetune_adapter
from minivlm.training.scratch import Run, train
from minivlm.training.systems import SystemConfig, train_system
from minivlm.training.trainable import Trainable

STEPS = 20
LOOP = Loop(save_every=10, log_every=10, measure_every=0, workers=0, progress=False)
# 5 pictures in 2 to 4 processes: some have one more than others
SCRATCH = replace(
    CONFIG,
    tower_steps=5,
    packed_steps=4,
    prefix_steps=4,
    alike_steps=4,
    last_steps=3,
    tower_pictures=4,
    pictures=5,
)

SOME_TOWERS, OFTEN = towers(steps=12), replace(LOOP, save_every=5, log_every=3)

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc

Losses = list[dict[str, float]]


@contextmanager
def recorded(kind: type[Trainable]) -> Iterator[Losses]:
    """The losses of each step, and the norm of its gradient, which AdamW does not let one see in them."""
    losses: Losses = []
    norms: list[float] = []
    advance, check_finite = kind.advance, kind.check_finite

    def noting(run: Any, batch: Any) -> dict[str, float]:
        found = advance(run, batch)
        losses.append({**found, "gradient": norms[-1]})
        return found

    def noting_norm(run: Any, what: str, value: float) -> None:
        if what == "the gradient":
            norms.append(value)
        check_finite(run, what, value)

    with patch.object(kind, "advance", noting), patch.object(kind, "check_finite", noting_norm):
        yield losses


def tuning(start: Path, **changes: Any) -> FinetuningConfig:
    """Seven lines in batches of 4, so that the last of 20 steps has one row."""
    fixed: dict[str, Any] = {"model": str(start), "epochs": 11, "batch_size": 4, "lr": 1e-3, "bf16": False}
    return FinetuningConfig(**fixed | changes)


def all_cases(
    start: Path, data: Path, pairs: Path, teacher: Path, out: Path, names: Sequence[str]
) -> dict[str, Losses]:
    """The losses of twenty steps of every kind of run, by name, in fp32.

    Muon as well: where the processor has instructions for bf16, it would round its steps to them.
    """
    torch.set_num_threads(1)
    runs: dict[str, tuple[type[Trainable], Callable[[Path], object]]] = {
        "scratch": (Run, lambda to: train(to, SCRATCH, loop=LOOP)),
        "finetune": (Finetuning, lambda to: finetune(to, tuning(start), data, loop=LOOP)),
        "accumulated": (
            Finetuning,
            lambda to: finetune(
                to, tuning(start, batch_size=3, accumulate=2, epochs=17, freeze=("tower",)), data, loop=LOOP
            ),
        ),
        "sharded": (
            Finetuning,
            lambda to: finetune(
                to,
                tuning(start, batch_size=3, accumulate=2, epochs=17, freeze=("tower",)),
                data,
                loop=replace(LOOP, checkpointing=True, shard=here() is not None),
            ),
        ),
        "adapter": (
            Finetuning,
            lambda to: finetune_adapter(to, tuning(start), LoraConfig(r=2), data, loop=LOOP),
        ),
    }
    for objective in ("siglip", "clip", "lit", "distill"):
        settings = towers(
            objective, steps=STEPS, batch_size=12, teacher=str(teacher) if objective == "distill" else None
        )
        file = pairs if objective in ("siglip", "clip") else None
        runs[objective] = (
            ContrastiveRun,
            partial(train_contrastive, config=settings, data=file, loop=LOOP),
        )
    found = {}
    for name in names:
        kind, run = runs[name]
        with recorded(kind) as losses, patch.object(muon, "bf16_pays", lambda device: False):
            run(out / name)
        found[name] = losses
    return found


def refusals(start: Path, data: Path, out: Path) -> dict[str, str]:
    """What each process is told, by name."""
    rank = dist.get_rank()
    other = data.with_name("validation.jsonl")
    runs: dict[str, Callable[[], object]] = {
        "data": lambda: finetune(out / "data", tuning(start), other if rank == 1 else data, loop=LOOP),
        "settings": lambda: train(out / "settings", replace(SCRATCH, seed=rank), loop=LOOP),
        "batch": lambda: train_contrastive(out / "batch", towers(batch_size=7), loop=LOOP),
        "pictures": lambda: train(out / "pictures", replace(SCRATCH, pictures=1), loop=LOOP),
        "one process": lambda: train_system(
            out / "system", SystemConfig("llava", text_steps=1, steps=1, text_rows=1, rows=1), loop=LOOP
        ),
        "folder": lambda: finetune(data, tuning(start), data, loop=LOOP),  # a file stands in its place
    }
    found = {}
    for name, run in runs.items():
        try:
            run()
        except InputError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def interrupted(start: Path, data: Path, out: Path, resume: bool) -> Losses:
    """Divided weights, a run that ends in step 13, and that goes on with as many processes as there are."""
    torch.set_num_threads(1)
    advance: Any = Finetuning.advance

    def step(run: Any, batch: Any) -> dict[str, float]:
        if run.step == 12 and not resume:
            raise Stop
        found: dict[str, float] = advance(run, batch)
        return found

    with patch.object(Finetuning, "advance", step), recorded(Finetuning) as losses, suppress(Stop):
        settings = tuning(start, batch_size=3, accumulate=2, epochs=17, freeze=("tower",))
        finetune(out, settings, data, loop=replace(LOOP, shard=True, resume=resume))
    return losses


def within_a_limit(start: Path, data: Path, out: Path, megabytes: int, shard: bool) -> str:
    """What becomes of a run in a process that may have so much more address space than it has before."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)  # a heap that gives back what is free, so that what is counted is what is needed
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.mallopt(M_ARENA_MAX, 1)
    for module in ("minivlm.distributed.sharded", "torch._refs", "matplotlib.figure"):
        importlib.import_module(module)  # what is not the model's
    _, limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, limit))
    try:
        finetune(
            out, tuning(start, epochs=None, steps=1, batch_size=2), data, loop=replace(LOOP, shard=shard)
        )
    except InputError as error:
        return str(error)
    return "done"


def stops(out: Path, how: str, resume: bool) -> str:
    """Two towers, of whose processes the last one is stopped in step 7, or the first one's disk is full."""
    torch.set_num_threads(1)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    advance, save = ContrastiveRun.advance, state.save_state

    def step(run: Any, batch: Any) -> dict[str, float]:
        if run.step == 6 and how in ("SIGSTOP", "SIGKILL") and rank == last:
            os.kill(os.getpid(), getattr(signal, how))
        return advance(run, batch)

    def full(*args: Any) -> None:
        if how == "full disk" and args[1] == 10:
            raise InputError("cannot write state.safetensors: No space left on device")
        save(*args)

    with patch.object(ContrastiveRun, "advance", step), patch.object(kept, "save_state", full):
        try:
            train_contrastive(out, SOME_TOWERS, loop=replace(OFTEN, resume=resume))
        except InputError as error:
            if how != "full disk":  # a process that has failed is waited for only for a moment
                raise
            return f"{type(error).__name__}: {error}"
    return "done"
