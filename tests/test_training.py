"""Training goes on after every kind of stop as if there had been none, and teaches something.

"As if" is exact: weights are compared bit for bit, the log number for number. The runs are of a few steps, of
a model far too small to learn anything.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import minivlm
from minivlm import checkpoints, training
from minivlm.errors import InputError
from minivlm.layers import EncoderBlock
from minivlm.objectives import PatchHead, SoftTargets, answer_loss
from minivlm.processing.boxes import NUM_BINS
from minivlm.recipe import TrainingConfig, build
from minivlm.training import Run, train

CONFIG = TrainingConfig(
    image_size=32,
    tower_width=24,
    tower_layers=1,
    tower_heads=2,
    text_width=32,
    text_layers=1,
    text_heads=2,
    tower_steps=4,
    packed_steps=4,
    prefix_steps=4,
    tower_pictures=2,
    pictures=2,
    questions=2,
    prefix_questions=2,
    warmup_steps=2,
    bf16=False,
)
EVERY: dict[str, Any] = {"save_every": 3, "log_every": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums may come out otherwise with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stop(Exception):
    """Ends a run at once, as a power cut would."""


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_end(folder: Path, whole: Path) -> None:
    """Weights, the state of the optimizers, and the log."""
    for name in ("model.safetensors", "state.safetensors"):
        ours, wanted = load_file(folder / name), load_file(whole / name)
        assert ours.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(ours[key], wanted[key])] == []
    assert log_of(folder) == log_of(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, CONFIG, **EVERY)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in the middle of step 8, and was last saved after step 6."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(8, patch, Stop)
        with pytest.raises(Stop):
            train(folder, CONFIG, **EVERY)
    return folder


@pytest.fixture
def copied(half: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half, tmp_path / "copied")


def stop_in_step(number: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Raise in the middle of the update of a step (from 1), when some weights have changed."""
    step = torch.optim.Muon.step
    calls = 0

    def stopping(optimizer: torch.optim.Muon, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(optimizer, *args)
        if calls == number:
            raise error
        return result

    monkeypatch.setattr(torch.optim.Muon, "step", stopping)


# Stopped and resumed


@pytest.mark.parametrize("number", [2, 3, 5, 8, 12])
def test_a_run_that_broke_off_ends_the_same(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of the three stages, soon after saving and long after it."""
    with monkeypatch.context() as patch:
        stop_in_step(number, patch, Stop)
        with pytest.raises(Stop):
            train(tmp_path, CONFIG, save_every=1 if number == 2 else 2, log_every=2)
    train(tmp_path, CONFIG, resume=True, **EVERY)
    assert_same_end(tmp_path, whole)


def test_a_run_that_broke_off_twice_ends_the_same(
    copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in_step(4, patch, Stop)  # the fourth since 6
        with pytest.raises(Stop):
            train(copied, CONFIG, resume=True, **EVERY)
    run = train(copied, CONFIG, resume=True, **EVERY)
    assert run.step == CONFIG.total_steps
    assert_same_end(copied, whole)


def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "again")
    train(folder, CONFIG, resume=True, **EVERY)
    assert_same_end(folder, whole)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(whole: Path, tmp_path: Path) -> None:
    """And how often a run is saved and logged does not matter."""
    train(tmp_path / "same", CONFIG, save_every=100, log_every=2)
    assert_same_end(tmp_path / "same", whole)
    train(tmp_path / "other", replace(CONFIG, seed=1), **EVERY)
    ours, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "other", whole))
    assert not any(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_the_comparison_sees_one_step_of_difference(copied: Path, whole: Path) -> None:
    """A batch that is left out shows: otherwise the tests above would prove nothing."""
    state = load_file(copied / "state.safetensors")
    with checkpoints.safe_open(copied / "state.safetensors", framework="pt") as file:
        metadata = file.metadata()
    checkpoints.save_file(state, copied / "state.safetensors", metadata | {"step": "7"})
    train(copied, CONFIG, resume=True, **EVERY)
    ours, wanted = load_file(copied / "model.safetensors"), load_file(whole / "model.safetensors")
    assert not all(torch.equal(ours[key], wanted[key]) for key in wanted)


# Killed


SERVER = """
import json, os, sys, time
from pathlib import Path
import torch
from minivlm import checkpoints, files
from minivlm.recipe import TrainingConfig
from minivlm.training import Run, train

torch.set_num_threads(1)
Run(TrainingConfig())  # imports what is imported late

def work(out, config, moment):
    os.setpgid(0, 0)
    out = Path(out)
    resume = (out / "state.safetensors").exists()

    def hang(*args):
        (out / "now").touch()
        time.sleep(600)

    def rename(source, target):
        (hang if "state" in str(target) else os.rename)(source, target)

    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        hang()

    if moment == "rename":
        files.os.replace = rename
    if moment == "write":
        checkpoints.save_file = save_half
    train(out, TrainingConfig(**config), resume=resume, save_every=1, log_every=2)

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        try:
            work(*json.loads(line))
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Server:
    """Starts processes that train, one at a time. They come ready: PyTorch is imported only once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(minivlm.__file__).parents[1])},
        )

    def start(self, folder: Path, config: TrainingConfig = CONFIG, moment: str = "any") -> int:
        """Train in a folder, resuming if there is something to resume, and save after each step.

        "rename" and "write" hang at that moment of the first save, and make a file `now`. Returns the id of
        the process, which is that of its group, too.
        """
        assert self.process.stdin is not None
        print(json.dumps([str(folder), asdict(config), moment]), file=self.process.stdin, flush=True)
        return int(self._read())

    def kill(self, process: int, number: int = signal.SIGKILL) -> int:
        """Returns the exit code, which is negative where the signal ended the process."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process, number)
        return int(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server ended"
        return line


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate(timeout=60)  # closes its input, and so ends it


def wait_until(happened: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if happened():
            return
        time.sleep(0.001)
    raise AssertionError("it never happened")


def step_of(folder: Path) -> int:
    with checkpoints.safe_open(folder / "state.safetensors", framework="pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.parametrize("moment", ["rename", "write"])
def test_killed_while_saving(moment: str, server: Server, copied: Path, whole: Path) -> None:
    before = (copied / "state.safetensors").read_bytes()
    process = server.start(copied, moment=moment)
    wait_until((copied / "now").exists)
    assert server.kill(process) == -signal.SIGKILL
    assert (copied / "state.safetensors").read_bytes() == before
    left = [name for name in files(copied) if name.startswith(".state") and name.endswith(".tmp")]
    assert len(left) == 1  # it was killed while writing, and had no time to tidy up
    train(copied, CONFIG, resume=True, **EVERY)
    assert_same_end(copied, whole)


def test_killed_again_and_again(server: Server, tmp_path: Path) -> None:
    """At random moments of a run that saves after every step, and so is often killed while saving."""
    config = replace(CONFIG, tower_steps=40, packed_steps=40, prefix_steps=40)
    train(tmp_path / "whole", config, save_every=1000, log_every=2)
    folder = tmp_path / "killed"
    state = folder / "state.safetensors"
    chance = random.Random(0)
    steps = [0]
    for _ in range(6):
        modified = state.stat().st_mtime_ns if state.exists() else 0
        process = server.start(folder, config)
        wait_until(lambda: state.exists() and state.stat().st_mtime_ns > modified)  # noqa: B023
        time.sleep(chance.uniform(0, 0.15))
        if server.kill(process) == 0:
            break  # it came to its end, on a fast machine
        steps.append(step_of(folder))
    assert len(steps) > 3
    assert sorted(set(steps)) == steps  # it went on each time
    train(folder, config, resume=True, save_every=1000, log_every=2)
    assert_same_end(folder, tmp_path / "whole")


# Ctrl-C


def test_ctrl_c_finishes_the_step_and_saves(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressed in the middle of an update, when an exception would leave some weights a step ahead."""
    step = torch.optim.AdamW.step
    calls = 0

    def pressed(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        return step(optimizer, *args)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", pressed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, CONFIG, save_every=1000, log_every=2)
    assert step_of(tmp_path) == 5
    assert signal.getsignal(signal.SIGINT) is handler
    train(tmp_path, CONFIG, resume=True, **EVERY)
    assert_same_end(tmp_path, whole)  # the log too, though 5 is between two of its lines


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(run: Run, batch: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Run, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CONFIG, **EVERY)


def test_ctrl_c_in_a_terminal(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """There it reaches the process that draws the pictures, too."""
    config = replace(CONFIG, packed_steps=100_000)
    process = server.start(tmp_path, config)
    wait_until((tmp_path / "state.safetensors").exists)
    assert server.kill(-process, signal.SIGINT) == 130
    assert step_of(tmp_path) > 0
    assert files(tmp_path) == {"state.safetensors", "log.jsonl"}
    assert capfd.readouterr().err == ""


def test_training_in_a_thread(tmp_path: Path, whole: Path) -> None:
    """Where Python allows no signal handler."""
    thread = threading.Thread(target=train, args=(tmp_path, CONFIG), kwargs=EVERY)
    thread.start()
    thread.join()
    assert_same_end(tmp_path, whole)


# Full disks, damaged files, other folders


def test_a_full_disk_while_saving(copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses to write more than so many bytes to a file."""
    before = {name: (copied / name).read_bytes() for name in files(copied)}
    save_state = training.save_state

    def without_space(*args: Any) -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
        try:
            save_state(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", without_space)
        with pytest.raises(
            InputError, match=r"cannot write .*state.safetensors.* unchanged. Free some space"
        ):
            train(copied, CONFIG, resume=True, save_every=1, log_every=100)
    assert {name: (copied / name).read_bytes() for name in files(copied)} == before
    train(copied, CONFIG, resume=True, **EVERY)
    assert_same_end(copied, whole)


def test_a_full_disk_while_writing_the_log(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (copied / "log.jsonl").read_bytes()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*log.jsonl: No space left on device"):
        train(copied, CONFIG, resume=True, **EVERY)
    assert (copied / "log.jsonl").read_bytes() == before


def test_leftover_temporary_files_do_no_harm(copied: Path, whole: Path) -> None:
    for name in ("state.safetensors", "log.jsonl", "model.safetensors", "config.json"):
        (copied / f".{name}.0123abcd.tmp").write_bytes(b"half of someth")
    train(copied, CONFIG, resume=True, **EVERY)
    assert_same_end(copied, whole)
    minivlm.load(copied)


def test_a_log_with_lines_too_many(copied: Path, whole: Path) -> None:
    """Killed after writing the log and before writing the state."""
    with (copied / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "stage": "packed", "patch": 0.0, "answer": 0.0}) + "\n")
    train(copied, CONFIG, resume=True, **EVERY)
    assert_same_end(copied, whole)


def test_a_run_is_not_overwritten(half: Path) -> None:
    before = {name: (half / name).read_bytes() for name in files(half)}
    with pytest.raises(InputError, match=r"holds a training run already: add --resume .* another folder"):
        train(half, CONFIG)
    assert {name: (half / name).read_bytes() for name in files(half)} == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training run to resume: leave out --resume"):
        train(tmp_path, CONFIG, resume=True)


def test_resuming_with_another_config_names_what_differs(half: Path) -> None:
    other = replace(CONFIG, muon_lr=0.5, packed_steps=7)
    with pytest.raises(InputError, match=r"\(muon_lr 0.02 -> 0.5, packed_steps 4 -> 7\)") as caught:
        train(half, other, resume=True)
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_state_is_refused(content: bytes | None, copied: Path) -> None:
    path = copied / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(InputError, match=r"state.safetensors cannot be read .* another folder"):
        train(copied, CONFIG, resume=True)


def test_a_damaged_log_is_refused(copied: Path) -> None:
    (copied / "log.jsonl").write_text('{"step": 2, "st')
    with pytest.raises(InputError, match=r"log.jsonl cannot be read .*: delete it"):
        train(copied, CONFIG, resume=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run cannot be made .Not a directory.: choose another"):
        train(tmp_path / "file" / "run", CONFIG)


def test_a_learning_rate_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a number at step \d+: try a lower .*--adamw-lr 2e\+09"):
        train(tmp_path, replace(CONFIG, muon_lr=4e9, adamw_lr=4e9), **EVERY)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"pictures": 0}, "pictures is 0: choose a number from 1"),
        ({"questions": 0}, "questions is 0"),
        ({"tower_layers": 0}, "tower_layers is 0"),
        ({"packed_steps": -1}, "packed_steps is -1: choose a number from 0"),
        ({"warmup_steps": 0}, "warmup_steps is 0"),
        ({"row_tokens": 5}, "row_tokens is 5: choose a number from 16"),
        ({"muon_lr": float("nan")}, "muon_lr is nan"),
        ({"adamw_lr": -0.1}, "adamw_lr is -0.1"),
        ({"tower_steps": 0, "packed_steps": 0, "prefix_steps": 0}, "no stage has any steps"),
        ({"patch_size": 7}, "image_size 32 does not divide into patches of 7"),
        ({"image_size": 256}, "leave no room for words"),
        ({"tower_width": 30}, "tower_width is 30: .* multiple of 4"),
        ({"tower_heads": 5}, "tower_width is 24: .* multiple of 20"),
        ({"text_heads": 3}, "text_width is 32: .* multiple of 6"),
    ],
)
def test_numbers_that_no_model_can_be_trained_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "steps", [(3, 0, 0), (0, 3, 0), (0, 0, 3), (0, 2, 1)], ids=lambda steps: "-".join(map(str, steps))
)
def test_stages_may_be_left_out(steps: tuple[int, int, int], tmp_path: Path) -> None:
    names = ("tower_steps", "packed_steps", "prefix_steps")
    run = train(tmp_path, replace(CONFIG, **dict(zip(names, steps, strict=True))), log_every=1)
    assert [line["stage"] for line in log_of(tmp_path)] == ["tower"] * steps[0] + ["packed"] * steps[1] + [
        "prefix"
    ] * steps[2]
    assert run.step == 3


# What a step does


@pytest.fixture
def run() -> Run:
    return Run(CONFIG)


def test_muon_gets_exactly_the_matrices_of_blocks(run: Run) -> None:
    blocks = [m for m in run.model.vision_tower.modules() if isinstance(m, EncoderBlock)]
    blocks += list(run.model.language_model.layers)
    assert len(blocks) == CONFIG.tower_layers + CONFIG.text_layers
    matrices = {m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    assert len(matrices) == 6 * CONFIG.tower_layers + 7 * CONFIG.text_layers
    held = {
        name: [p for group in optimizer.param_groups for p in group["params"]]
        for name, optimizer in run.optimizers.items()
    }
    assert set(held["muon"]) == matrices
    assert set(held["adamw"]) == set(run.masters.parameters()) - matrices
    assert len(held["muon"]) + len(held["adamw"]) == len(list(run.masters.parameters()))  # none twice
    assert run.model.language_model.embed_tokens.weight in set(held["adamw"])


def factors(config: TrainingConfig) -> list[float]:
    run = Run(config)
    values = []
    for run.step in range(config.total_steps):
        values.append(run._schedule())
    return values


def test_the_schedule_rises_once_for_the_tower_and_once_for_all(run: Run) -> None:
    config = replace(CONFIG, tower_steps=20, packed_steps=30, prefix_steps=10, warmup_steps=5)
    values = factors(config)
    for part in (values[:20], values[20:]):
        peak = part.index(max(part))
        assert peak == 4  # the last step of the warm-up
        assert part[0] == pytest.approx(1 / 5)
        assert part[:5] == sorted(part[:5])
        assert part[peak:] == sorted(part[peak:], reverse=True)
        falls = [a - b for a, b in pairwise(part[5:])]
        assert falls == pytest.approx([1 / len(part)] * len(falls))  # straight, also where stages meet
        assert part[-1] == pytest.approx(1 / len(part))  # one step before zero


def test_the_tower_learns_more_slowly_after_its_own_stage(run: Run) -> None:
    batches = run.batches()
    for stage in ("tower", "packed", "prefix"):
        while CONFIG.stage(run.step) != stage:
            run.advance(next(batches))
        factor = run._schedule()
        run.advance(next(batches))
        for name, peak in (("muon", CONFIG.muon_lr), ("adamw", CONFIG.adamw_lr)):
            for group in run.optimizers[name].param_groups:
                in_tower = any(p is q for p in group["params"] for q in run.model.vision_tower.parameters())
                slower = CONFIG.tower_lr_factor if in_tower and stage != "tower" else 1.0
                assert group["lr"] == pytest.approx(peak * factor * slower)


def test_each_stage_trains_its_part(run: Run) -> None:
    """First the tower and its head alone, then everything; the working copy follows the masters."""
    batches = run.batches()

    def changed() -> set[str]:
        before = {name: p.clone() for name, p in run.masters.named_parameters()}
        losses = run.advance(next(batches))
        assert set(losses) == ({"patch"} if run.step <= CONFIG.tower_steps else {"patch", "answer"})
        for a, b in zip(run.masters.parameters(), run.working.parameters(), strict=True):
            assert a is not b
            assert torch.equal(a, b)
        return {name for name, p in run.masters.named_parameters() if not torch.equal(p, before[name])}

    everything = {name for name, _ in run.masters.named_parameters()}
    tower = {name for name in everything if name.startswith(("model.vision_tower", "head."))}
    assert changed() == tower
    while run.step < CONFIG.tower_steps:
        changed()
    assert changed() == everything


def test_no_two_batches_of_a_run_are_alike(run: Run) -> None:
    pictures = [picture.numpy().tobytes() for batch in run.batches() for picture in batch.pixel_values]
    assert len(pictures) == 2 * CONFIG.total_steps
    assert len(set(pictures)) == len(pictures)


def test_only_the_last_stage_has_the_true_mask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, each question has a row of its own, and the picture sees it."""
    sees = []

    def spy(*args: Any) -> Tensor:
        sees.append(args[3])
        return answer_loss(*args)

    monkeypatch.setattr(training, "answer_loss", spy)
    rows = []
    for batch in run.batches():
        run.advance(batch)
        rows.append(int(batch.blocks.max()) if batch.blocks.numel() else 0)
    assert sees == [False] * CONFIG.packed_steps + [True] * CONFIG.prefix_steps
    assert rows[: CONFIG.tower_steps] == [0] * CONFIG.tower_steps
    assert min(rows[CONFIG.tower_steps : -CONFIG.prefix_steps]) > 1
    assert rows[-CONFIG.prefix_steps :] == [1] * CONFIG.prefix_steps


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(replace(CONFIG, clip=0.01))
    norms = []
    step = torch.optim.Muon.step

    def spy(optimizer: torch.optim.Muon) -> Any:
        gradients = [p.grad.flatten() for p in run.masters.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Muon, "step", spy)
    for batch in run.batches():
        run.advance(batch)
    assert norms == pytest.approx([0.01] * CONFIG.total_steps, rel=1e-3)


def test_bf16_computes_with_a_copy_and_keeps_fp32(tmp_path: Path) -> None:
    config = replace(CONFIG, tower_steps=1, packed_steps=1, prefix_steps=1, bf16=True)
    run = train(tmp_path, config)
    assert {p.dtype for p in run.working.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.masters.parameters()} == {torch.float32}
    for master, copied in zip(run.masters.parameters(), run.working.parameters(), strict=True):
        assert torch.equal(copied, master.bfloat16())
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_the_log_holds_means_of_each_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    advance = Run.advance

    def spy(run: Run, batch: Any) -> dict[str, float]:
        seen.append(advance(run, batch))
        return seen[-1]

    monkeypatch.setattr(Run, "advance", spy)
    train(tmp_path, CONFIG, log_every=3)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["stage"] for line in lines] == ["tower", "packed", "prefix", "prefix"]
    for number, line in enumerate(lines):
        steps = seen[3 * number : 3 * number + 3]
        assert line["patch"] == pytest.approx(sum(step["patch"] for step in steps) / 3)
        answers = [step["answer"] for step in steps if "answer" in step]  # 0, then 2, then 3 of the 3 steps
        assert ("answer" in line) == bool(answers)
        if answers:
            assert line["answer"] == pytest.approx(sum(answers) / len(answers))


def test_a_small_run_learns(run: Run) -> None:
    """The same batch again and again: the answers to it can be learned by heart."""
    config = replace(CONFIG, tower_steps=1, packed_steps=200, prefix_steps=1, warmup_steps=5)
    run = Run(config)
    batches = run.batches()
    next(batches)
    run.step = 1
    batch = next(batches)
    losses = [run.advance(batch) for _ in range(100)]
    assert losses[-1]["answer"] < 0.3 * losses[0]["answer"]
    assert losses[-1]["patch"] < 0.7 * losses[0]["patch"]


# Losses


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build(CONFIG)[1].tokenizer


def test_targets_without_width_are_plain_cross_entropy(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, tokenizer.vocab_size, generator=generator)
    labels = torch.randint(tokenizer.vocab_size, (40,), generator=generator)
    is_loc = torch.isin(labels, torch.tensor(tokenizer.loc_ids))
    assert 5 < is_loc.sum() < 35
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(SoftTargets(tokenizer, 0.0).cross_entropy(logits, labels), wanted)
    soft = SoftTargets(tokenizer, 6.0).cross_entropy(logits, labels)
    torch.testing.assert_close(soft[~is_loc], wanted[~is_loc])
    assert (soft[is_loc] - wanted[is_loc]).abs().min() > 1e-3


def test_soft_targets_are_bells(tokenizer: Any) -> None:
    bells = SoftTargets(tokenizer, 6.0).bells
    assert bells.shape == (NUM_BINS, NUM_BINS)
    torch.testing.assert_close(bells.sum(dim=1), torch.ones(NUM_BINS))
    assert torch.equal(bells.argmax(dim=1), torch.arange(NUM_BINS))
    assert float(bells[500, 506] / bells[500, 500]) == pytest.approx(0.6065, abs=1e-3)  # one sigma beside
    # The loss is that of a distribution over the whole vocabulary.
    label = torch.tensor([tokenizer.loc_ids[3]])
    logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(1, tokenizer.vocab_size)
    target[0, tokenizer.loc_ids] = bells[3]
    wanted = F.cross_entropy(logits, target)
    torch.testing.assert_close(SoftTargets(tokenizer, 6.0).cross_entropy(logits, label)[0], wanted)


def test_soft_targets_forgive_what_is_nearly_right(tokenizer: Any) -> None:
    def loss(guess: int, sigma: float) -> float:
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, tokenizer.loc_ids[guess]] = 8.0
        return float(
            SoftTargets(tokenizer, sigma).cross_entropy(logits, torch.tensor([tokenizer.loc_ids[300]]))
        )

    assert loss(300, 6) < loss(303, 6) < loss(310, 6) < loss(900, 6)
    assert loss(303, 0) == pytest.approx(loss(900, 0))


def test_the_loss_of_patches() -> None:
    """Right answers cost nothing, and the box counts on things only."""
    run = Run(CONFIG)
    batch = next(run.batches())
    head = PatchHead(CONFIG.tower_width)

    def loss(box_error: float, on_ground: float = 0.0) -> float:
        parts = [
            F.one_hot(labels, size).float() * 50
            for labels, size in zip(
                (batch.patch_color, batch.patch_shape, batch.patch_size), PatchHead.sizes[:3], strict=True
            )
        ]
        ground = (batch.patch_color == 0)[..., None]
        box = batch.patch_box / 16 + torch.where(ground, on_ground, box_error)
        output: Tensor = torch.cat([*parts, box], dim=-1)
        with torch.no_grad():
            head.forward = lambda tokens: output  # type: ignore[method-assign]
            return float(head.loss(torch.zeros(1), batch))

    assert loss(0.0) == pytest.approx(0, abs=1e-5)
    assert loss(0.0, on_ground=5.0) == pytest.approx(0, abs=1e-5)
    assert loss(0.5) == pytest.approx(0.5 - 0.05)  # smooth L1: the distance less half of beta


# What is left behind


def test_the_folder_is_a_checkpoint(whole: Path) -> None:
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
    assert files(whole) == wanted | {"tokenizer_config.json", "state.safetensors", "log.jsonl"}
    model, processor = minivlm.load(whole)
    state = load_file(whole / "state.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"weights.model.{name}"])
    built, _ = build(CONFIG)
    assert model.config == built.config
    picture = torch.zeros(1, 3, 32, 32)
    inputs = processor(None, "caption en")
    inputs["input_ids"] = torch.cat(
        [torch.full((1, 16), processor.tokenizer.image_id), inputs["input_ids"]], dim=1
    )
    assert model.generate(inputs["input_ids"], pixel_values=picture, max_new_tokens=2).shape == (1, 2)


def test_an_untrained_model_is_a_function_of_the_seed() -> None:
    (first, _), (again, _), (other, _) = build(CONFIG), build(CONFIG), build(replace(CONFIG, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.multi_modal_projector.weight, other.multi_modal_projector.weight)


def test_neighbors_are_alike_from_the_start() -> None:
    """Positions of patches, and the words for coordinates."""
    model, processor = build(TrainingConfig())
    locs = model.language_model.embed_tokens.weight.detach()[processor.tokenizer.loc_ids]
    patches = model.vision_tower.embeddings.position_embedding.weight.detach().view(8, 8, -1)

    def alike(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2)).mean())

    assert alike(locs[:-1], locs[1:]) > 0.95
    assert alike(locs[:-100], locs[100:]) < 0.9
    assert alike(patches[:-1], patches[1:]) == pytest.approx(alike(patches[:, :-1], patches[:, 1:]))
    assert alike(patches[:-1], patches[1:]) > 0.8
    assert alike(patches[:-1], patches[1:]) > alike(patches[:-3], patches[3:]) + 0.1
