"""The table for two towers: which scenes, what an oracle reaches, own pairs, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_towers import config, make_pairs, make_towers
from torch import Tensor

import minivlm
from minivlm.cli import main
from minivlm.data.pairs import read_pairs
from minivlm.errors import InputError
from minivlm.evaluation import contrastive
from minivlm.evaluation.answers import questions_of
from minivlm.evaluation.columns import COLUMNS
from minivlm.evaluation.contrastive import (
    PAIR_COLUMNS,
    distinct_scenes,
    encode,
    evaluate_own_pairs,
    evaluate_pairs,
    retrieval_scores,
    single_things,
    zero_shot_scores,
)
from minivlm.losses import similarity
from minivlm.training.contrastive_recipe import build
from minivlm.world.scenes import HELD_OUT_PAIRS


def one_line(err: str) -> str:
    assert err.startswith("minivlm: error: ")
    assert err.count("\n") == 1
    return err


def test_scenes_are_those_of_the_other_table_without_twins() -> None:
    for name in ("held_out", "unseen_pairs", "turned"):
        shown = distinct_scenes(COLUMNS[name], 150, seed=1)
        captions = [scene.caption() for scene in shown]
        assert len(set(captions)) == 150
        asked = {question.scene.caption() for question in questions_of(COLUMNS[name], 40, 1, 16)}
        assert asked <= set(captions)
    assert any(thing.angle for scene in shown for thing in scene.things)


def test_single_things() -> None:
    seen = single_things(COLUMNS["held_out"], 60, seed=1)
    unseen = single_things(COLUMNS["unseen_pairs"], 60, seed=1)
    assert {len(scene.things) for scene in [*seen, *unseen]} == {1}
    assert not {(scene.things[0].color, scene.things[0].shape) for scene in seen} & HELD_OUT_PAIRS
    assert {(scene.things[0].color, scene.things[0].shape) for scene in unseen} == HELD_OUT_PAIRS
    assert len({scene.caption() for scene in seen}) > 25


def test_an_oracle_is_always_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vector of a text counts the words, and that of a picture those of the true caption."""
    processor = build(config())[1]
    size = processor.tokenizer.vocab_size

    def count_words(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids, size).sum(dim=1).float()

    model: Any = SimpleNamespace(encode_text=count_words, device=torch.device("cpu"))
    scenes = single_things(COLUMNS["unseen_pairs"], 30, seed=1)
    true = count_words(processor.tokenizer([scene.caption() for scene in scenes]))
    monkeypatch.setattr(contrastive, "encode", lambda *args: (true, None))
    scores = zero_shot_scores(model, processor, scenes, [])
    assert {name: (score.value, score.baseline, score.cases) for name, score in scores.items()} == {
        "zero-shot color": (1.0, 1 / 8, 30),
        "zero-shot shape": (1.0, 1 / 4, 30),
    }
    others = single_things(COLUMNS["unseen_pairs"], 30, seed=2)
    assert zero_shot_scores(model, processor, others, [])["zero-shot color"].value < 0.8
    assert zero_shot_scores(model, processor, others, [])["zero-shot shape"].value < 0.8


def test_both_directions_of_retrieval() -> None:
    """Two pictures near one text: from the texts all is found, from the pictures only half."""
    matrix = torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    scores = retrieval_scores(matrix)
    assert scores["image to text recall@1"].value == 0.5
    assert scores["text to image recall@1"].value == 1.0
    assert scores["image to text recall@1"].baseline == 0.5
    assert scores["image to text median rank"].value == 1
    assert list(scores) == [
        f"{way} {what}"
        for way in ("image to text", "text to image")
        for what in ("recall@1", "recall@5", "recall@10", "median rank")
    ]


def test_encoding_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build(config())
    shown = distinct_scenes(COLUMNS["held_out"], 7, seed=1)
    captions = [scene.caption() for scene in shown]
    pictures = [scene.draw(16) for scene in shown]
    monkeypatch.setattr(contrastive, "BATCH", 3)
    images, texts = encode(model, processor, pictures, captions)
    with torch.no_grad():
        whole = model(**processor(pictures, captions))
    assert torch.allclose(similarity(images, texts), whole.image_embeds @ whole.text_embeds.T, atol=1e-5)


def test_vectors_that_are_not_finite_are_no_evaluation() -> None:
    """NaN is not greater than anything: as ranks, it would be a bad score instead of an error."""
    model, processor = build(config())
    with torch.no_grad():
        model.text_model.final_layer_norm.weight.fill_(torch.nan)
    message = r"the weights hold NaN or infinity in text_model\.final_layer_norm\.weight"
    with pytest.raises(InputError, match=message):
        encode(model, processor, [Image.new("RGB", (8, 8))], ["a red star"])


def test_several_captions_of_a_picture(tmp_path: Path) -> None:
    """Any of them will do, and neither picture nor caption is counted twice."""
    model, processor = build(config())
    for name, gray in (("a", 20), ("b", 220)):
        Image.fromarray(np.full((8, 8, 3), gray, np.uint8)).save(tmp_path / f"{name}.png")
    lines = [("a", "red"), ("a", "blue"), ("b", "blue"), ("b", "green"), ("b", "pink")]
    written = [json.dumps({"image": f"{name}.png", "text": text}) for name, text in lines]
    (tmp_path / "pairs.jsonl").write_text("\n".join(written))
    pairs = read_pairs(tmp_path / "pairs.jsonl", [processor.tokenizer])
    scores = evaluate_own_pairs(model, processor, pairs, progress=False)
    images, texts = scores["image to text recall@1"], scores["text to image recall@1"]
    assert (images.cases, texts.cases) == (2, 4)
    assert images.baseline == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert texts.baseline == pytest.approx((0.5 + 1 + 0.5 + 0.5) / 4)  # "blue" fits both
    assert scores["image to text recall@5"].value == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("a square", "A square"), ("a square", "a square "), ("a square", "a  square"), ("\u00fc", "u\u0308")],
)
def test_captions_that_the_model_cannot_tell_apart_are_one(one: str, other: str, tmp_path: Path) -> None:
    """Otherwise each would come before the other, and neither could be found first."""
    model, processor = build(config(objective="clip"))
    lines = []
    for name, gray, text in (("a", 20, one), ("b", 220, other)):
        Image.fromarray(np.full((8, 8, 3), gray, np.uint8)).save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "text": text}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path / "pairs.jsonl", [processor.tokenizer])
    scores = evaluate_own_pairs(model, processor, pairs, progress=False)
    assert scores["text to image recall@1"].cases == 1
    assert scores["image to text recall@1"].value == 1


def test_columns_that_there_are_not() -> None:
    model, processor = build(config())
    with pytest.raises(InputError, match="no column 'text_only' for two towers: choose from held_out"):
        evaluate_pairs(model, processor, columns=["text_only"])


# The command


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_the_table_of_a_folder(objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--model", str(make_towers(tmp_path, objective)), "--scenes", "12"]
    assert main([*command, "--columns", "held_out", "unseen_pairs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | held-out scenes | unseen pairs | chance | cases |"
    assert lines[2].startswith("| image to text recall@1 | 0.")
    assert lines[2].endswith(" | 0.083 | 12 |")
    assert lines[5].endswith(" | 6 | 12 |")  # the median rank
    assert lines[-1].startswith("| zero-shot shape | ")
    assert lines[-1].endswith(" | 0.250 | 12 |")
    assert main([*command, "--columns", "held_out", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    model, processor = minivlm.load(tmp_path)
    direct = evaluate_pairs(model, processor, scenes=12, columns=["held_out"], progress=False)
    assert table["held_out"]["zero-shot color"] == {
        "value": round(direct["held_out"]["zero-shot color"].value, 4), "chance": 0.125, "cases": 12,
    }  # fmt: skip


def test_all_columns_but_text_only_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        contrastive,
        "evaluate_pairs",
        lambda model, processor, **options: asked.append(options) or {},
    )
    assert main(["eval", "--model", str(make_towers(tmp_path)), "--json"]) == 0
    assert asked == [{"scenes": 2000, "seed": 1, "columns": PAIR_COLUMNS}]
    assert set(COLUMNS) - set(PAIR_COLUMNS) == {"text_only"}


def test_own_pairs_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_pairs(tmp_path / "data", lines=3)
    folder = str(make_towers(tmp_path / "towers", max_length=60))
    assert main(["eval", "--model", folder, "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| | own pairs | chance | cases |\n")
    assert "| image to text recall@1 | " in out
    assert "zero-shot" not in out
    for options, message in ((["--model", folder, "--scenes", "5"], "--scenes is about drawn scenes"),):
        assert main(["eval", "--data", str(data), *options]) == 2
        assert message in one_line(capsys.readouterr().err)
