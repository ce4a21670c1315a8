"""Optional cells ask a checkpoint that the reader names about a photograph, or say that none is named."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from notebooks_and_sources import NOTEBOOKS, Cell, read_cells

from minivlm.classroom.photograph import VARIABLE, photograph, published
from minivlm.errors import InputError
from minivlm.models.load import SHIPPED
from minivlm.training.contrastive_recipe import ContrastiveConfig, build

CELLS = [
    cell
    for path in NOTEBOOKS
    for cell in read_cells(path)
    if cell.kind == "code" and "classroom.photograph import" in cell.source
]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    model, processor = build(ContrastiveConfig(objective="siglip"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_it_is_a_photograph():
    assert photograph().mode == "RGB"
    assert photograph().size == (512, 600)


def test_without_a_name_nothing_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert published("answers") is None
    assert capsys.readouterr().out == f"{VARIABLE} names no checkpoint: nothing is asked\n"


def test_the_kind_decides(towers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv(VARIABLE, str(SHIPPED))
    loaded = published("answers")
    assert loaded is not None
    assert {parameter.dtype for parameter in loaded[0].parameters()} == {torch.bfloat16}
    assert published("matches") is None
    assert "a model that writes answers; this cell asks one that matches pictures" in capsys.readouterr().out
    monkeypatch.setenv(VARIABLE, str(towers))
    assert published("matches") is not None
    monkeypatch.setenv(VARIABLE, "no such folder")
    with pytest.raises(InputError, match="neither a folder nor a repo id"):
        published("answers")


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_the_cells_run_alone_with_a_checkpoint(
    cell: Cell, towers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(VARIABLE, str(towers if 'published("matches")' in cell.source else SHIPPED))
    mpl.use("agg")
    exec(compile(cell.source, cell.id, "exec"), {"display": lambda shown: None})
    printed = capsys.readouterr().out
    assert printed.strip()
    assert VARIABLE not in printed


def test_notebooks_from_06_on_have_one():
    have = {cell.notebook for cell in CELLS}
    assert have >= {path.stem for path in NOTEBOOKS if path.stem >= "06"}
    assert all(cell.optional and VARIABLE in cell.printed for cell in CELLS)
