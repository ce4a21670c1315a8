"""A run goes on after every kind of stop as if there had been none.

"As if" is exact: weights are compared bit for bit, the log number for number. The runs are of a few steps.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import CONFIG, EVERY, Stop, assert_same_end, files, log_of, step_of, stop_in_step

import minivlm
from minivlm.errors import InputError
from minivlm.training import kept, log, loop, state
from minivlm.training.loop import Loop
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import Run, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, CONFIG, loop=EVERY)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in the middle of step 8, and was last saved after step 6."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(8, patch, Stop)
        with pytest.raises(Stop):
            train(folder, CONFIG, loop=EVERY)
    return folder


@pytest.fixture
def copied(half: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half, tmp_path / "copied")


# Stopped and resumed


@pytest.mark.parametrize("number", [2, 3, 5, 8, 12])
def test_a_run_that_broke_off_ends_the_same(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of the three stages, soon after saving and long after it."""
    with monkeypatch.context() as patch:
        stop_in_step(number, patch, Stop)
        with pytest.raises(Stop):
            train(tmp_path, CONFIG, loop=replace(EVERY, save_every=1 if number == 2 else 2))
    train(tmp_path, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(tmp_path, whole)


def test_a_run_that_broke_off_twice_ends_the_same(
    copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in_step(4, patch, Stop)  # the fourth since 6
        with pytest.raises(Stop):
            train(copied, CONFIG, loop=replace(EVERY, resume=True))
    run = train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert run.step == CONFIG.total_steps
    assert_same_end(copied, whole)


def test_resuming_a_finished_run_changes_nothing(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "again")
    train(folder, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(folder, whole)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(whole: Path, tmp_path: Path) -> None:
    """And how often a run is saved and logged does not matter."""
    train(tmp_path / "same", CONFIG, loop=Loop(save_every=100, log_every=2, measure_every=0))
    assert_same_end(tmp_path / "same", whole)
    train(tmp_path / "other", replace(CONFIG, seed=1), loop=EVERY)
    ours, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "other", whole))
    assert not any(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_the_comparison_sees_one_step_of_difference(copied: Path, whole: Path) -> None:
    """A batch that is left out shows: otherwise the tests above would prove nothing."""
    path = copied / "state.safetensors"
    tensors = load_file(path)
    with state.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = metadata | {"step": "7"}
    state.save_file(tensors, path, changed | {"checksum": state.checksum(tensors, changed)})
    train(copied, CONFIG, loop=replace(EVERY, resume=True))
    ours, wanted = load_file(copied / "model.safetensors"), load_file(whole / "model.safetensors")
    assert not all(torch.equal(ours[key], wanted[key]) for key in wanted)


# Killed


SERVER = """
import json, os, sys, time
from pathlib import Path
import torch
from minivlm import files
from minivlm.training import state
from minivlm.training.loop import Loop
from minivlm.training.recipe import TrainingConfig
from minivlm.training.scratch import Run, train

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
        state.save_file = save_half
    train(out, TrainingConfig(**config), loop=Loop(resume=resume, save_every=1, log_every=2, measure_every=0))

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


@pytest.mark.parametrize("moment", ["rename", "write"])
def test_killed_while_saving(moment: str, server: Server, copied: Path, whole: Path) -> None:
    before = (copied / "state.safetensors").read_bytes()
    process = server.start(copied, moment=moment)
    wait_until((copied / "now").exists)
    assert server.kill(process) == -signal.SIGKILL
    assert (copied / "state.safetensors").read_bytes() == before
    left = [name for name in files(copied) if name.startswith(".state") and name.endswith(".tmp")]
    assert len(left) == 1  # it was killed while writing, and had no time to tidy up
    train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(copied, whole)
    assert not [name for name in files(copied) if name.endswith(".tmp")]


def test_killed_again_and_again(server: Server, tmp_path: Path) -> None:
    """At random moments of a run that saves after every step, and so is often killed while saving."""
    config = replace(CONFIG, tower_steps=40, packed_steps=40, prefix_steps=40, pictures=4)
    train(tmp_path / "whole", config, loop=Loop(save_every=1000, log_every=2, measure_every=0))
    folder = tmp_path / "killed"
    saved = folder / "state.safetensors"
    chance = random.Random(0)
    steps = [0]
    for _ in range(6):
        modified = saved.stat().st_mtime_ns if saved.exists() else 0
        process = server.start(folder, config)
        wait_until(lambda: saved.exists() and saved.stat().st_mtime_ns > modified)  # noqa: B023
        time.sleep(chance.uniform(0, 0.15))
        if server.kill(process) == 0:
            break  # it came to its end, on a fast machine
        steps.append(step_of(folder))
    assert len(steps) > 3
    assert sorted(set(steps)) == steps  # it went on each time
    train(folder, config, loop=Loop(resume=True, save_every=1000, log_every=2, measure_every=0))
    assert_same_end(folder, tmp_path / "whole")


# Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves(
    number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressed in the middle of an update, when an exception would leave some weights a step ahead."""
    step = torch.optim.AdamW.step
    calls = 0

    def pressed(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(number)
        return step(optimizer, *args)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", pressed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, CONFIG, loop=Loop(save_every=1000, log_every=2, measure_every=0))
    assert step_of(tmp_path) == 5
    assert signal.getsignal(number) is handler
    train(tmp_path, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(tmp_path, whole)  # the log too, though 5 is between two of its lines


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(run: Run, batch: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Run, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CONFIG, loop=EVERY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_terminal(
    number: signal.Signals, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """There it reaches the process that draws the pictures, too, as SIGTERM does at a system's shutdown."""
    config = replace(CONFIG, packed_steps=100_000)
    process = server.start(tmp_path, config)
    wait_until((tmp_path / "state.safetensors").exists)
    assert server.kill(-process, number) == 130
    assert step_of(tmp_path) > 0
    assert files(tmp_path) == {"state.safetensors", "log.csv"}
    assert capfd.readouterr().err == ""


def test_training_in_a_thread(tmp_path: Path, whole: Path) -> None:
    """Where Python allows no signal handler."""
    thread = threading.Thread(target=train, args=(tmp_path, CONFIG), kwargs={"loop": EVERY})
    thread.start()
    thread.join()
    assert_same_end(tmp_path, whole)


# Processes that prepare batches


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped(
    number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, with how to go on, and nobody stays behind for whom this process would wait at its end."""
    advance = Run.advance

    def hit(run: Run, batch: Any) -> dict[str, float]:
        if run.step == 4:
            for process in multiprocessing.active_children():
                assert process.pid is not None
                os.kill(process.pid, number)
        return advance(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", hit)
        patch.setattr(loop, "PATIENCE", 3)
        with pytest.raises(InputError, match=r"stopped delivering .*goes on from step \d, saved"):
            train(tmp_path, CONFIG, loop=replace(EVERY, workers=1))
    wait_until(lambda: not multiprocessing.active_children())
    train(tmp_path, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(tmp_path, whole)


def test_a_program_ends_that_has_not_taken_everything() -> None:
    """Its workers ignore the signal that ends the workers of others."""
    program = (
        "from minivlm.training.loop import in_order\n"
        "items = in_order([1, 2, 3, 4], range(4), workers=1)\n"
        "print(next(items))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.filterwarnings("error")  # what is raised where nobody can catch it is a warning
def test_a_worker_whose_end_is_noticed_by_an_exchange_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's handler of signals says so here, and not in whatever is done afterwards."""

    def reset(items: Iterator[Any], workers: Sequence[BaseProcess]) -> Iterator[Any]:
        yield next(items)
        for worker in workers:
            worker.kill()
        raise ConnectionResetError

    monkeypatch.setattr(loop, "_in_time", reset)
    batches = loop.in_order([1, 2, 3, 4], range(4), workers=1)
    assert next(batches) == 1
    with pytest.raises((RuntimeError, ConnectionResetError)):
        next(batches)
    for _ in range(50):
        time.sleep(0.01)


def test_a_worker_that_is_stopped_while_it_hands_over_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader waits for it without a limit of its own."""
    ended = threading.Event()

    def hand_over() -> Iterator[int]:
        yield 1
        assert ended.wait(60)  # stands for a read that only the worker's end interrupts
        raise EOFError

    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    threading.Thread(target=lambda: (worker.join(), ended.set()), daemon=True).start()
    monkeypatch.setattr(loop, "PATIENCE", 0.2)
    items = loop._in_time(hand_over(), [worker])
    assert next(items) == 1
    with pytest.raises(EOFError):
        next(items)
    assert worker.exitcode == -signal.SIGKILL


def test_an_error_of_our_own_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Run, batch: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Run, "advance", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(tmp_path, CONFIG, loop=EVERY)


# Full disks, damaged files, other folders


def test_a_full_disk_while_saving(copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses to write more than so many bytes to a file."""
    before = {name: (copied / name).read_bytes() for name in files(copied)}
    save_state = kept.save_state

    def without_space(*args: Any) -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
        try:
            save_state(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patch:
        patch.setattr(kept, "save_state", without_space)
        with pytest.raises(
            InputError, match=r"cannot write .*state.safetensors.* unchanged. Free some space"
        ):
            train(copied, CONFIG, loop=Loop(resume=True, save_every=1, log_every=100, measure_every=0))
    assert {name: (copied / name).read_bytes() for name in files(copied)} == before
    train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(copied, whole)


def test_a_full_disk_while_writing_the_log(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def writerow(self, row: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (copied / "log.csv").read_bytes()
    monkeypatch.setattr(log.csv, "writer", lambda file, **options: Full())
    with pytest.raises(InputError, match=r"cannot write .*log.csv: No space left .*goes on from step 6"):
        train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert (copied / "log.csv").read_bytes() == before


def test_leftover_temporary_files_are_removed(copied: Path, whole: Path) -> None:
    for name in ("state.safetensors", "log.csv", "model.safetensors", "config.json"):
        (copied / f".{name}.0123abcd.tmp").write_bytes(b"half of someth")
    train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(copied, whole)
    minivlm.load(copied)
    assert not [name for name in files(copied) if name.endswith(".tmp")]


def test_a_log_with_lines_too_many(copied: Path, whole: Path) -> None:
    """Killed after writing the log and before writing the state."""
    with (copied / "log.csv").open("a") as file:
        file.write("8,packed,0.5,0.5,0.1,0.1\n")
    train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert_same_end(copied, whole)


def test_a_run_is_not_overwritten(half: Path) -> None:
    before = {name: (half / name).read_bytes() for name in files(half)}
    with pytest.raises(InputError, match=r"already holds a training run: add --resume .* another folder"):
        train(half, CONFIG)
    assert {name: (half / name).read_bytes() for name in files(half)} == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training run to resume: leave out --resume"):
        train(tmp_path, CONFIG, loop=Loop(resume=True))


def test_resuming_with_another_config_names_what_differs(half: Path) -> None:
    other = replace(CONFIG, muon_lr=0.5, packed_steps=7)
    with pytest.raises(InputError, match=r"\(muon_lr 0.02 -> 0.5, packed_steps 4 -> 7\)") as caught:
        train(half, other, loop=Loop(resume=True))
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: metadata.update(step="1000"),
        lambda tensors, metadata: metadata.update(step="-1"),
        lambda tensors, metadata: metadata.update(unlogged='[{"patch": "x"}]'),
        lambda tensors, metadata: metadata.update(config="[]"),
        lambda tensors, metadata: metadata.pop("checksum"),
        lambda tensors, metadata: [tensors.pop(name) for name in list(tensors) if name.startswith("adamw.")],
        lambda tensors, metadata: tensors.update({"adamw.x": torch.ones(1)}),
        lambda tensors, metadata: tensors.update({"adamw.0.exp_avg": torch.ones(3)}),
        lambda tensors, metadata: next(iter(tensors.values())).view(-1)[:1].neg_(),  # one flipped bit
    ],
)
def test_a_state_that_was_changed_is_refused(change: Callable[..., Any], copied: Path) -> None:
    path = copied / "state.safetensors"
    tensors = load_file(path)
    with state.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    state.save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=r"cannot be read \(it was damaged or changed, .*: start a new run"):
        train(copied, CONFIG, loop=Loop(resume=True))


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_state_is_refused(content: bytes | None, copied: Path) -> None:
    path = copied / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(InputError, match=r"state.safetensors cannot be read .* another folder"):
        train(copied, CONFIG, loop=Loop(resume=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,stage,patch\n2,tower,1.5\n4,tow", "is damaged in line 3: delete the file"),
        (b"step,stage,patch\n2,tower,1.5\n\n", "is damaged in line 3"),
        (b"patch,answer\n1,2\n", "is damaged in line 2"),
        (b"step,patch\ntwo,1\n", "is damaged in line 2"),
        (b"step,patch\n2,1.5\n4,one\n", "is damaged in line 3"),  # after training, it would not be drawn
        (b"\xff\xfe", r"cannot be read .*: expected the log of a training run"),
    ],
)
def test_a_damaged_log_is_refused(copied: Path, content: bytes, message: str) -> None:
    (copied / "log.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        train(copied, CONFIG, loop=Loop(resume=True))


def test_a_run_without_its_log_goes_on(copied: Path, whole: Path) -> None:
    (copied / "log.csv").unlink()
    train(copied, CONFIG, loop=replace(EVERY, resume=True))
    assert log_of(copied) == [line for line in log_of(whole) if line["step"] > 6]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run cannot be made .Not a directory.: choose another"):
        train(tmp_path / "file" / "run", CONFIG)
