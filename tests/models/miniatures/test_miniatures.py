"""What holds for every miniature: three views of one forward, folders, and the commands that take it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from answering_folders import write_miniature
from helpers import assert_equal, randomize
from miniatures import SYSTEMS, Small, tiny
from rounded import put_rounded_weights
from torch import Tensor

from minivlm.cli import main
from minivlm.errors import InputError
from minivlm.models.load import load

WORDS, ANSWERS = [3, 6, 4], [5, 2, 4]
MIXED = pytest.mark.parametrize(
    "pictures", [(True, False, True), (False, False, False)], ids=["mixed", "text"]
)


@pytest.fixture(params=SYSTEMS)
def model(request: pytest.FixtureRequest) -> Small:
    return randomize(tiny(request.param))


def rows(model: Small, pictures: tuple[bool, ...]) -> tuple[list[Tensor], list[int], Tensor | None]:
    """Three rows of placeholders and words, how many tokens come before the answer, and the pictures."""
    generator = torch.Generator().manual_seed(0)
    image = [model.config.image_token_id] * model.config.num_image_tokens
    ids = [
        torch.cat(
            [
                torch.tensor(image if picture else [], dtype=torch.long),
                torch.randint(3, 119, (words,), generator=generator),
            ]
        )
        for words, picture in zip(map(sum, zip(WORDS, ANSWERS, strict=True)), pictures, strict=True)
    ]
    starts = [len(row) - answer for row, answer in zip(ids, ANSWERS, strict=True)]
    side = getattr(model.config, "image_size", 28)
    pixels = torch.randn(sum(pictures), 3, side, side, generator=generator) if any(pictures) else None
    return ids, starts, pixels


def padded(rows: list[Tensor], side: str, types: list[Tensor] | None = None) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in names}
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        batch["input_ids"][number, place] = row
        batch["attention_mask"][number, place] = 1
        if types is not None:
            batch["token_type_ids"][number, place] = types[number]
    return batch


def of_row(pixels: Tensor | None, pictures: tuple[bool, ...], row: int) -> Tensor | None:
    return pixels[sum(pictures[:row])][None] if pixels is not None and pictures[row] else None


@torch.no_grad()
@MIXED
@pytest.mark.parametrize("side", ["left", "right"])
def test_full_cached_and_padded_are_one(model: Small, side: str, pictures: tuple[bool, ...]) -> None:
    ids, starts, pixels = rows(model, pictures)
    types = [(torch.arange(len(row)) >= start).long() for row, start in zip(ids, starts, strict=True)]
    alone = [
        model(row[None], of_row(pixels, pictures, i), token_type_ids=types[i][None]).logits[0]
        for i, row in enumerate(ids)
    ]
    whole = padded(ids, side, types)
    logits = model(**whole, pixel_values=pixels).logits
    for i in range(3):
        assert_equal(logits[i, whole["attention_mask"][i].bool()], alone[i])

    prompts = padded([row[:start] for row, start in zip(ids, starts, strict=True)], side)
    hidden, cache = model.prefill(**prompts, pixel_values=pixels)
    for step in range(max(ANSWERS) + 1):
        unfinished = torch.tensor([step < count for count in ANSWERS])
        for i in range(3):
            if step <= ANSWERS[i]:
                assert_equal(model.logits(hidden)[i], alone[i][starts[i] - 1 + step])
        if unfinished.any():
            tokens = [int(ids[i][starts[i] + step]) if unfinished[i] else 0 for i in range(3)]
            hidden = model.decode(torch.tensor(tokens), unfinished, cache)


@torch.no_grad()
def test_the_picture_changes_the_scores(model: Small) -> None:
    ids, _, pixels = rows(model, (True, False, True))
    assert pixels is not None
    first, second = (model(ids[0][None], picture).logits[0, -1] for picture in (pixels[:1], pixels[1:]))
    assert float((first - second).abs().max()) > 1e-3


# Of VisualBERT, what says whether a caption fits, which no answer needs.
OTHER_HEADS = ("seq_relationship.", "language_model.pooler.")


def test_every_weight_learns(model: Small) -> None:
    ids, _, pixels = rows(model, (True, False, True))
    labels = ids[0].masked_fill(ids[0] == model.config.image_token_id, -100)
    model(ids[0][None], None if pixels is None else pixels[:1], labels=labels[None]).loss.backward()
    still = [
        name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert not [name for name in still if not name.startswith(OTHER_HEADS)]


def test_wrong_numbers_of_placeholders_are_refused(model: Small) -> None:
    ids, _, pixels = rows(model, (True, False, True))
    with pytest.raises(ValueError, match="placeholders"):
        model(ids[0][None], pixels)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_folder_comes_back(name: str, tmp_path: Path) -> None:
    write_miniature(name, tmp_path)
    first, processor = load(tmp_path)
    assert processor.image_seq_length == first.config.num_image_tokens
    first.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    second, _ = load(tmp_path / "again")
    assert second.config == first.config
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_folder_of_another_system_is_refused(name: str, tmp_path: Path) -> None:
    write_miniature(name, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(InputError, match=r"config.json says model_type 'llava'"):
        type(tiny(name).config).from_dict(values | {"model_type": "llava"})


@pytest.mark.parametrize("name", SYSTEMS)
def test_commands_take_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_miniature(name, tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    picture = "figures/samples/scene_1.png"
    assert main(["ask", picture, "--prompt", "caption en", *model, "--max-new-tokens", "4"]) == 0
    assert main(["eval", "--scenes", "2", "--columns", "held_out", *model]) == 0
    assert main(["look", picture, "--prompt", "caption en", *model, "--out", str(tmp_path / "look")]) == 0
    lines = tmp_path / "lines.jsonl"
    sample = {"image": str(Path(picture).resolve()), "prefix": "caption en", "suffix": "a star"}
    lines.write_text(json.dumps(sample) + "\n")
    tuned = ["finetune", "--data", str(lines), *model, "--steps", "2", "--out", str(tmp_path / "tuned")]
    assert main(tuned) == 0
    assert load(tmp_path / "tuned")[0].config == load(tmp_path / "model")[0].config


@torch.no_grad()
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "visualbert"])
def test_rounded_weights(name: str, bits: str, tmp_path: Path) -> None:
    """The model is the one with rounded weights, and biases as they were."""
    write_miniature(name, tmp_path)
    (rounded, processor), (model, _) = load(tmp_path, quantize=bits), load(tmp_path)
    put_rounded_weights(rounded, model)
    inputs = processor(["figures/samples/scene_1.png"], ["caption en"])
    one, other = (each.logits(each.prefill(**inputs)[0]) for each in (rounded, model))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_encoder_is_not_rounded(tmp_path: Path) -> None:
    write_miniature("visualbert", tmp_path)
    with pytest.raises(InputError, match="BertEncoder has no head to round: leave quantize out"):
        load(tmp_path, quantize="int8")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_picture_in_fp32_is_read_in_bf16(name: str, tmp_path: Path) -> None:
    write_miniature(name, tmp_path)
    model, processor = load(tmp_path, dtype=torch.bfloat16)
    inputs = processor(["figures/samples/scene_1.png"], ["caption en"])
    assert inputs["pixel_values"].dtype == torch.float32
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
