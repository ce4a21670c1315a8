"""The folder of a run: what it may hold before, who may work in it, and what is tidied up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import CONFIG, EVERY, Stop, files, stop_in_step

import minivlm
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED
from minivlm.training.contrastive import train_contrastive
from minivlm.training.contrastive_recipe import ContrastiveConfig
from minivlm.training.finetuning import FinetuningConfig, finetune
from minivlm.training.folder import run_folder
from minivlm.training.scratch import Run, train

NAMES = (
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "loss.png", "log.csv",
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_holds_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(InputError, match=rf"already holds {name}, which training replaces: choose another"):
        train(tmp_path, CONFIG, loop=EVERY)
    assert contents(tmp_path) == {name: b"somebody's"}


def test_every_kind_of_run_refuses_a_checkpoint(tmp_path: Path) -> None:
    out = shutil.copytree(SHIPPED, tmp_path / "model")
    before = contents(out)
    nothing = tmp_path / "none.jsonl"  # the folder comes first
    for start in (
        lambda: train(out, CONFIG),
        lambda: finetune(out, FinetuningConfig(), nothing),
        lambda: train_contrastive(out, ContrastiveConfig()),
    ):
        with pytest.raises(InputError, match="which training replaces: choose another folder"):
            start()
    assert contents(out) == before


def test_a_finished_run_without_its_state_is_a_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, replace(CONFIG, packed_steps=0, prefix_steps=0), loop=EVERY)
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(InputError, match=r"already holds config.json"):
        train(tmp_path, CONFIG, loop=EVERY)


def test_other_files_are_none_of_its_business(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / ".notes.tmp").write_text("mine")
    train(tmp_path, CONFIG, loop=EVERY)
    assert (tmp_path / "train.jsonl").read_text() == "{}"
    assert (tmp_path / ".notes.tmp").read_text() == "mine"


def test_a_run_that_ended_before_its_first_save_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in_step(3, patch, Stop)
        with pytest.raises(Stop):
            train(tmp_path, CONFIG, loop=EVERY)
    assert files(tmp_path) == {"log.csv"}
    train(tmp_path, CONFIG, loop=EVERY)


def test_where_nothing_can_be_written_it_says_so_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "__init__", lambda *args: pytest.fail("it began"))
    (tmp_path / "run" / ".lock").mkdir(parents=True)  # as a folder without permission; root has every one
    with pytest.raises(InputError, match=r"run cannot be written to \(Is a directory\): check its perm"):
        train(tmp_path / "run", CONFIG)


def test_the_second_run_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process and in another one; both go on where the first has ended."""
    inside, refused = threading.Event(), threading.Event()
    advance = Run.advance

    def wait(run: Run, batch: object) -> dict[str, float]:
        inside.set()
        assert refused.wait(60)
        return advance(run, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "advance", wait)
    first = threading.Thread(
        target=train, args=(tmp_path, CONFIG), kwargs={"loop": replace(EVERY, workers=0)}
    )
    first.start()
    assert inside.wait(60)
    try:
        with pytest.raises(InputError, match=r"another run works in .*: wait until it ends, or choose"):
            train(tmp_path, CONFIG, loop=EVERY)
        assert "another run works in" in _enter(tmp_path)
    finally:
        refused.set()
        first.join()
    assert "already holds a training run" in _enter(tmp_path)
    with run_folder(tmp_path, resume=True):
        assert ".lock" in files(tmp_path)
    assert ".lock" not in files(tmp_path)


def _enter(folder: Path) -> str:
    """What another process is told."""
    code = (
        "import sys; from pathlib import Path; from minivlm.training.folder import run_folder\n"
        "with run_folder(Path(sys.argv[1]), False): pass"
    )
    env = os.environ | {"PYTHONPATH": str(Path(minivlm.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=env, check=False
    )
    return done.stderr


def test_the_lock_of_a_process_that_was_killed_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with run_folder(tmp_path, resume=False):
        pass
    assert files(tmp_path) == set()


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    """Written by a process that ends in the middle, so that the names are those of the real ones."""
    code = (
        "import os, sys; from pathlib import Path; from minivlm.files import write_aside\n"
        "with write_aside(Path(sys.argv[1]) / 'state.safetensors') as temporary:\n"
        "    temporary.write_text('half'); os._exit(9)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(minivlm.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=False)
    assert len(files(tmp_path)) == 1
    with run_folder(tmp_path, resume=False):
        assert files(tmp_path) == {".lock"}
