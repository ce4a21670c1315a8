"""Evaluation, commands and fine-tuning take any model of a kind: here two that are none of the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minivlm import generate
from minivlm.attention import attend
from minivlm.cli import main
from minivlm.evaluation import answer_all, evaluate
from minivlm.evaluation.contrastive import PAIR_COLUMNS, evaluate_pairs
from minivlm.looking.inspection import inspect_answer, inspect_match
from minivlm.models import load as loading
from minivlm.models.zero_shot import class_embeddings, classify
from minivlm.processing import PairProcessor, Processor
from minivlm.training import contrastive_recipe, finetuning
from minivlm.training.recipe import TrainingConfig, build

SIDE, PATCH, PATCHES, WIDTH = 16, 8, 4, 12


class Tower(nn.Module):
    """Patches that look at each other once."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.config = SimpleNamespace(patch_size=PATCH)
        self.embeddings.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.embeddings.position_embedding = nn.Embedding(PATCHES, WIDTH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixel_values).flatten(2).mT  # [B, N, D]
        x = x + self.embeddings.position_embedding.weight
        return x + look(x, x)


def look(queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one head without any weights."""
    return attend(queries[:, None], tokens[:, None], tokens[:, None], mask, WIDTH**-0.5)[:, 0]


class Answering(nn.Module):
    """Causal from the first patch to the last word, and without a cache: everything is read anew."""

    def __init__(self, vocabulary: int, eos: int) -> None:
        super().__init__()
        self.eos = eos
        self.vision_tower = Tower()
        self.language_model = nn.Module()
        self.language_model.embed_tokens = nn.Embedding(vocabulary, WIDTH)
        self.language_model.config = SimpleNamespace(max_position_embeddings=512)
        self.device = torch.device("cpu")
        self.saved: list[Path] = []

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return self.vision_tower(pixel_values)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.language_model.embed_tokens(input_ids)
        first = attention_mask.argmax(dim=1)  # a row begins with its patches
        places = first[:, None] + torch.arange(PATCHES)
        x = x.scatter(1, places[..., None].expand(-1, -1, WIDTH), self.encode_image(pixel_values))
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = causal & attention_mask.bool()[:, None] | torch.eye(len(causal), dtype=torch.bool)
        return x + look(x, x, seen[:, None])

    def logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.language_model.embed_tokens.weight.T

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SimpleNamespace:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.logits(self.hidden(input_ids, mask, pixel_values))
        loss = (
            None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return SimpleNamespace(logits=logits, loss=loss)

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **types: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        read = [input_ids, attention_mask, pixel_values]
        return self.hidden(*read)[:, -1], read

    def decode(self, token_ids: Tensor, unfinished: Tensor, read: list[Tensor]) -> Tensor:
        read[0] = torch.cat([read[0], token_ids[:, None]], dim=1)
        read[1] = torch.cat([read[1], unfinished[:, None].long()], dim=1)
        return self.hidden(*read)[:, -1]

    def generate(self, input_ids: Tensor, max_new_tokens: int = 64, **inputs: Any) -> Tensor:
        return torch.stack(list(self.stream(input_ids, max_new_tokens, **inputs)), dim=1)

    def stream(self, input_ids: Tensor, max_new_tokens: int = 64, **inputs: Any) -> Iterator[Tensor]:
        limits: dict[str, Any] = {"max_new_tokens": min(max_new_tokens, 5), "eos_token_id": self.eos}
        return generate.stream(self, input_ids, **limits, **inputs)

    def save_pretrained(self, folder: Path) -> None:
        self.saved.append(folder)


class Matching(nn.Module):
    """Patches on one side, a bag of words on the other."""

    has_class_token = False

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision_model = Tower()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.device = torch.device("cpu")

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return look(self.probe.expand(len(pixel_values), -1, -1), self.vision_model(pixel_values))[:, 0]

    def encode_text(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids).mean(dim=1)

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return F.normalize(image_embeds, dim=1) @ F.normalize(text_embeds, dim=1).T

    def probabilities(self, logits_per_image: Tensor) -> Tensor:
        return logits_per_image.sigmoid()


@pytest.fixture
def answering() -> tuple[Answering, Processor]:
    processor = build(TrainingConfig(image_size=SIDE, patch_size=PATCH))[1]
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    return Answering(tokenizer.vocab_size, tokenizer.eos_id), processor


@pytest.fixture
def matching() -> tuple[Matching, PairProcessor]:
    processor = contrastive_recipe.build(contrastive_recipe.ContrastiveConfig(image_size=SIDE))[1]
    torch.manual_seed(0)
    return Matching(processor.tokenizer.vocab_size), processor


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.linear_gradient("L").save(tmp_path / "gradient.png")
    return tmp_path / "gradient.png"


def put_on(monkeypatch: pytest.MonkeyPatch, kind: str, opened: tuple[nn.Module, Any]) -> None:
    """Let the commands find this model."""
    monkeypatch.setattr(loading, "kind_of", lambda *name: kind)
    monkeypatch.setattr(loading, "load", lambda *name, **options: opened)


# A model that answers


def test_answers_of_any_model(answering: tuple[Answering, Processor], picture: Path) -> None:
    model, processor = answering
    prompts = ["caption en", "what color is the star?"]
    pictures = [Image.open(picture), Image.new("RGB", (9, 9), "red")]
    alone = [
        processor.decode(model.generate(**processor([picture], [prompt])))[0]
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    assert answer_all(model, processor, pictures, prompts, progress=False) == alone
    table = evaluate(model, processor, scenes=2, columns=("held_out", "jpeg"), progress=False)
    assert table["held_out"]["exact caption"].cases == 2
    assert table["held_out"].keys() == table["jpeg"].keys()


def test_commands_with_any_model_that_answers(
    answering: tuple[Answering, Processor],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, processor = answering
    put_on(monkeypatch, "answers", answering)
    answer = processor.decode(model.generate(**processor([str(picture)], ["caption en"])))[0]
    assert main(["ask", str(picture), "--prompt", "caption en"]) == 0
    assert capsys.readouterr().out == f"{picture} | caption en\n{answer}\n"
    assert main(["eval", "--scenes", "1", "--columns", "held_out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out"]["exact caption"].keys() >= {"value", "majority"}
    assert main(["look", str(picture), "--out", str(tmp_path / "look")]) == 0
    assert capsys.readouterr().out.startswith(f"{picture} | caption en\n{answer}\n")
    assert len(list((tmp_path / "look").iterdir())) == 9


def test_the_inside_of_any_model_that_answers(
    answering: tuple[Answering, Processor], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own mask decides what its words see. Pictures are read a few at a time, which changes nothing."""
    model, processor = answering
    seen = inspect_answer(model, processor, Image.open(picture), "caption en")
    words = len(seen.words)
    assert seen.tower.shape == (1, 1, PATCHES, PATCHES)
    assert seen.attention.shape == (words, 1, 1, PATCHES)
    assert seen.rollout.shape == (words, PATCHES)
    several = torch.randn(5, 3, SIDE, SIDE)
    together = seen.sureness(several)
    monkeypatch.setattr("minivlm.looking.inspection.MOST_LOGITS", 1)
    alone = inspect_answer(model, processor, Image.open(picture), "caption en").sureness(several)
    torch.testing.assert_close(together, alone)
    assert together.std() > 0


def test_finetuning_of_any_model(
    answering: tuple[Answering, Processor], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = answering
    line = {"image": picture.name, "prefix": "what is it?", "suffix": "a gradient"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr(finetuning, "load_answering", lambda *name, **options: answering)
    before = model.language_model.embed_tokens.weight.clone()
    data, out = tmp_path / "data.jsonl", tmp_path / "tuned"
    arguments = ["--data", str(data), "--validation", str(data), "--out", str(out), "--steps", "2"]
    assert main(["finetune", *arguments, "--no-bf16", "--workers", "0"]) == 0
    assert not torch.equal(model.language_model.embed_tokens.weight, before)
    assert model.saved


# A model that matches


def test_retrieval_and_classes_of_any_model(matching: tuple[Matching, PairProcessor]) -> None:
    model, processor = matching
    table = evaluate_pairs(model, processor, scenes=3, columns=PAIR_COLUMNS[:2], progress=False)
    assert table["held_out"]["image to text recall@5"].value == 1
    assert table["held_out"]["zero-shot color"].cases == 3
    classes = class_embeddings(model, processor.tokenizer, ["star", "circle"], ["a red {}"])
    pixels = processor(images=[Image.new("RGB", (8, 8))])["pixel_values"]
    assert classify(model, pixels, classes).shape == (1, 2)


def test_commands_with_any_model_that_matches(
    matching: tuple[Matching, PairProcessor],
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_on(monkeypatch, "matches", matching)
    assert main(["eval", "--scenes", "2", "--columns", "held_out"]) == 0
    assert capsys.readouterr().out.startswith("| | held-out scenes | chance | cases |\n")
    assert main(["look", str(picture), "--prompt", "a star", "--out", str(tmp_path / "look")]) == 0
    assert "\ncosine " in capsys.readouterr().out
    assert len(list((tmp_path / "look").iterdir())) == 5


@pytest.mark.parametrize("has_class_token", [False, True])
def test_the_inside_of_any_model_that_matches(
    has_class_token: bool, matching: tuple[Matching, PairProcessor], picture: Path
) -> None:
    """The model says what its vector is made from: the query of a head, or the first token of the tower."""
    model, processor = matching
    if has_class_token:
        model.has_class_token = True
        model.encode_image = lambda pixel_values: model.vision_model(pixel_values)[:, 0]
    seen = inspect_match(model, processor, Image.open(picture), "a star")
    patches = PATCHES - has_class_token  # here the first patch stands in for a class token
    assert seen.tower.shape == (1, 1, patches, patches)
    assert seen.pooling.shape == (1, patches)
    assert seen.rollout.shape == (patches,)
    assert (float(seen.pooling.sum()) == pytest.approx(1)) == (not has_class_token)
