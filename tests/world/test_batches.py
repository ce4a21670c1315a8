"""Packed rows: whoever stands in one must not notice the others, and a batch depends on its number alone."""

from __future__ import annotations

import pickle
import re
from dataclasses import fields, replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, assert_differs, assert_equal, randomize
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from minivlm import masks
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.training.objectives import SoftTargets, answer_loss
from minivlm.training.recipe import TrainingConfig, build
from minivlm.world.batches import Batch, SceneBatches, question_mask
from minivlm.world.questions import examples
from minivlm.world.rows import PADDING, WEIGHTS, encode_answer
from minivlm.world.scenes import COLORS, Scene, make_scene

CONFIG = TrainingConfig(
    image_size=32,
    tower_width=24,
    tower_layers=2,
    tower_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    loc_sigma=0.0,
)
N = 16  # image tokens: 32 pixels in patches of 8


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[PaliGemma, Processor]:
    model, processor = build(CONFIG)
    randomize(model)
    return model, processor


@pytest.fixture(scope="module")
def model(model_and_processor: tuple[PaliGemma, Processor]) -> PaliGemma:
    return model_and_processor[0]


@pytest.fixture(scope="module")
def processor(model_and_processor: tuple[PaliGemma, Processor]) -> Processor:
    return model_and_processor[1]


def make(processor: Processor, **options: object) -> SceneBatches:
    values = {"seed": 5, "steps": 10, "pictures": 3, "questions": 4} | options
    return SceneBatches(processor, CONFIG.patch_size, **values)  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch))


def questions_of(batch: Batch, processor: Processor) -> list[list[tuple[str, str]]]:
    """For each row, prompts and answers as text."""
    tokenizer = processor.tokenizer
    rows = []
    for ids, blocks, types in zip(batch.input_ids, batch.blocks, batch.token_type_ids, strict=True):
        row = []
        for block in range(1, int(blocks.max()) + 1):
            mine = blocks == block
            prompt, answer = ids[mine & (types == 0)].tolist(), ids[mine & (types == 1)].tolist()
            assert prompt[0] == tokenizer.bos_id
            assert answer[-1] == tokenizer.eos_id
            row.append((tokenizer.decode(prompt).removesuffix("\n"), tokenizer.decode(answer)))
        rows.append(row)
    return rows


# The mask


def by_hand(blocks: list[int], types: list[int], positions: list[int]) -> Batch:
    """A batch of one row of which only the shape matters."""
    names = {field.name: torch.zeros(1, len(blocks), dtype=torch.long) for field in fields(Batch)}
    rows = {"blocks": blocks, "token_type_ids": types, "position_ids": positions}
    return Batch(**names | {name: torch.tensor([row]) for name, row in rows.items()})


TWO_QUESTIONS = by_hand([1, 1, 1, 2, 2, 2], [0, 0, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2])


def test_the_mask_is_the_drawing() -> None:
    lines = re.findall(r"^ +([01][01 |]+)$", str(question_mask.__doc__), re.MULTILINE)
    drawing = torch.tensor([[int(digit) for digit in re.findall("[01]", line)] for line in lines])
    mask, position_ids = question_mask(TWO_QUESTIONS, 2, image_sees_prompt=False)
    assert drawing.shape == (8, 8)
    assert mask.shape == (1, 1, 8, 8)
    assert torch.equal(mask[0, 0], drawing.bool())
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]  # each question right after the image


def test_one_question_that_the_image_sees_is_the_prefix_lm_mask() -> None:
    batch = by_hand([1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 2, 3, 4])
    mask, position_ids = question_mask(batch, 3, image_sees_prompt=True)
    wanted = masks.prefix_lm(position_ids, position_ids, torch.tensor([6]))
    assert position_ids.tolist() == [list(range(8))]
    assert torch.equal(mask[:, 0], wanted)
    assert not torch.equal(question_mask(batch, 3, image_sees_prompt=False)[0][:, 0], wanted)


@pytest.mark.parametrize("image_sees_prompt", [False, True])
def test_nobody_sees_padding(image_sees_prompt: bool) -> None:
    batch = by_hand([1, 1, 1, PADDING, PADDING], [0, 0, 1, 0, 0], [0, 1, 2, 0, 0])
    mask = question_mask(batch, 2, image_sees_prompt)[0][0, 0]
    assert not mask[:5, 5:].any()
    assert mask.any(dim=1).all()  # padding sees something, or its softmax would be NaN
    alone = by_hand([1, 1, 1], [0, 0, 1], [0, 1, 2])
    assert torch.equal(mask[:5, :5], question_mask(alone, 2, image_sees_prompt)[0][0, 0])


# What a row computes


def logits_of(model: PaliGemma, batch: Batch, mask: Tensor, position_ids: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.encode_image(batch.pixel_values)[batch.pictures]
        embeds = torch.cat([features, model.language_model.embed(batch.input_ids)], dim=1)
        return model.logits(model.language_model(embeds, position_ids, mask))


def test_questions_of_a_row_do_not_notice_each_other(model: PaliGemma, processor: Processor) -> None:
    batch = make(processor)[0]
    changed = replace(batch, input_ids=batch.input_ids.clone())
    second = batch.blocks == 2
    changed.input_ids[second] = 300 + torch.arange(int(second.sum()))
    mask, position_ids = question_mask(batch, N, image_sees_prompt=False)
    before = logits_of(model, batch, mask, position_ids)
    after = logits_of(model, changed, mask, position_ids)
    others = torch.cat([torch.ones(3, N, dtype=torch.bool), (batch.blocks > 0) & ~second], dim=1)
    assert_equal(after[others], before[others])  # the image's places are among them
    assert_differs(after[:, N:][second], before[:, N:][second])
    # Under an ordinary causal mask, what comes later does notice.
    causal = masks.causal(position_ids, position_ids)[:, None]
    before = logits_of(model, batch, causal, position_ids)
    after = logits_of(model, changed, causal, position_ids)
    assert_differs(after[others], before[others])


def test_the_image_notices_the_prompt_where_it_may(model: PaliGemma, processor: Processor) -> None:
    batch = make(processor, packed=False, questions=1)[0]
    changed = replace(batch, input_ids=batch.input_ids.clone())
    prompt, answer = (batch.blocks == 1) & (batch.token_type_ids == 0), batch.token_type_ids == 1
    for sees in (False, True):
        mask, position_ids = question_mask(batch, N, sees)
        before = logits_of(model, batch, mask, position_ids)[:, :N]
        changed.input_ids[prompt] = 400
        after = logits_of(model, changed, mask, position_ids)[:, :N]
        (assert_differs if sees else assert_equal)(after, before)
        changed.input_ids[prompt] = batch.input_ids[prompt]
        changed.input_ids[answer] = 400  # the answer is seen by nobody before it
        assert_equal(logits_of(model, changed, mask, position_ids)[:, :N], before)
        changed.input_ids[answer] = batch.input_ids[answer]


def loss_of(model: PaliGemma, processor: Processor, batch: Batch, image_sees_prompt: bool) -> float:
    """`answer_loss` where every token of an answer counts alike."""
    even = replace(batch, weights=torch.ones_like(batch.weights))
    with torch.no_grad():
        tokens = model.vision_tower(batch.pixel_values)
        return float(
            answer_loss(model, tokens, even, image_sees_prompt, SoftTargets(processor.tokenizer, 0.0))
        )


def test_one_question_a_row_gives_the_loss_of_the_model(model: PaliGemma, processor: Processor) -> None:
    """The same pictures, prompts and answers by the way that users have: processor and `labels`."""
    batches = make(processor, packed=False)
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, easy=True) for _ in range(4)]
    pictures = [scene.draw(CONFIG.image_size) for scene in scenes]
    chosen = [[next(examples(scene, rng))] for scene in scenes]
    batch = batches._batch(scenes, pictures, chosen)
    inputs = processor(
        pictures,
        [example.prefix for (example,) in chosen],
        [example.suffix for (example,) in chosen],
    )
    with torch.no_grad():
        wanted = float(model(**inputs).loss)
    assert loss_of(model, processor, batch, True) == pytest.approx(wanted, rel=TOLERANCE)
    assert loss_of(model, processor, batch, False) != pytest.approx(wanted, rel=10 * TOLERANCE)


def test_a_packed_row_gives_the_loss_of_its_questions_alone(model: PaliGemma, processor: Processor) -> None:
    packed, alone = make(processor)[3], make(processor, packed=False)[3]
    assert (len(packed.input_ids), len(alone.input_ids)) == (3, 12)
    together = [question for row in questions_of(packed, processor) for question in row]
    assert together == [question for (question,) in questions_of(alone, processor)]
    wanted = loss_of(model, processor, alone, False)
    assert loss_of(model, processor, packed, False) == pytest.approx(wanted, rel=TOLERANCE)
    # The same row read as one text, or with positions that go on from question to question.
    one_text = replace(packed, blocks=packed.blocks.clamp(max=1))
    assert loss_of(model, processor, one_text, False) != pytest.approx(wanted, rel=10 * TOLERANCE)
    running = replace(packed, position_ids=torch.arange(packed.input_ids.shape[1]).expand_as(packed.blocks))
    assert loss_of(model, processor, running, False) != pytest.approx(wanted, rel=10 * TOLERANCE)


def test_the_loss_is_of_the_answers_only(model: PaliGemma, processor: Processor) -> None:
    batch = make(processor)[0]
    assert torch.equal(batch.labels != -100, batch.token_type_ids == 1)
    assert torch.equal(batch.labels[batch.labels != -100], batch.input_ids[batch.labels != -100])
    assert torch.equal(batch.weights > 0, batch.labels != -100)
    assert batch.blocks[batch.labels != -100].min() > 0


def test_weights_are_those_of_the_table(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTS, "word", 0.7)  # another number than that of coordinates
    tokenizer = processor.tokenizer
    batches = make(processor, packed=False, pictures=8, questions=9)
    seen = set()
    for step in range(3):
        batch = batches[step]
        for row, ((prompt, _),) in enumerate(questions_of(batch, processor)):
            is_answer = batch.labels[row] != -100
            pairs = zip(batch.labels[row][is_answer], batch.weights[row][is_answer], strict=True)
            for token, weight in pairs:
                kind = "word" if prompt.startswith(("caption", "detect", "segment")) else "answer"
                kind = "loc" if int(token) in tokenizer.loc_ids else kind
                kind = "seg" if int(token) in tokenizer.seg_ids else kind
                kind = "eos" if int(token) == tokenizer.eos_id else kind
                assert float(weight) == pytest.approx(WEIGHTS[kind])
                seen.add(kind)
    assert seen == set(WEIGHTS)


# What is in a batch


def test_a_batch_is_a_function_of_seed_and_step(processor: Processor) -> None:
    batches = make(processor)
    assert equal(batches[2], batches[2])
    assert equal(batches[2], make(processor)[2])
    assert not equal(batches[2], batches[3])
    assert not equal(batches[2], make(processor, seed=6)[2])
    # A later stage goes on counting, and so never repeats a scene.
    assert equal(make(processor, first_step=2)[1], batches[3])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(processor: Processor, workers: int) -> None:
    batches = make(processor)
    loader = DataLoader(batches, batch_size=None, sampler=range(2, 10), num_workers=workers)
    delivered = list(loader)
    assert len(delivered) == 8
    assert all(equal(batch, batches[step]) for step, batch in enumerate(delivered, start=2))


def test_batches_travel_to_workers_that_do_not_fork(processor: Processor) -> None:
    """Where worker processes start empty, as on macOS, they get everything pickled."""
    batches = make(processor)
    assert equal(pickle.loads(pickle.dumps(batches))[2], batches[2])


def test_pictures_and_patches_belong_together(processor: Processor) -> None:
    batch = make(processor, pictures=6, questions=0)[0]
    assert batch.pixel_values.shape == (6, 3, 32, 32)
    assert batch.patch_color.shape == batch.patch_shape.shape == batch.patch_size.shape == (6, N)
    assert batch.patch_box.shape == (6, N, 4)
    assert batch.input_ids.shape == (6, 0)  # no questions in the tower's stage
    colors = torch.tensor(list(COLORS.values())) / 127.5 - 1
    checked = 0
    for picture, labels in zip(batch.pixel_values, batch.patch_color, strict=True):
        cells = picture.unfold(1, 8, 8).unfold(2, 8, 8)[..., 3:5, 3:5]  # the middle of each patch
        means = cells.mean(dim=(3, 4)).flatten(1).T  # [N, 3]
        distance, nearest = (means[:, None] - colors).abs().amax(dim=2).min(dim=1)
        sure = distance < 0.15
        checked += int(sure.sum())
        assert torch.equal(labels[sure], nearest[sure] + 1)
    assert checked > 5


def test_rows_know_their_picture(processor: Processor) -> None:
    assert make(processor)[0].pictures.tolist() == [0, 1, 2]
    batch = make(processor, packed=False, questions=2)[0]
    assert batch.pictures.tolist() == [0, 0, 1, 1, 2, 2]
    captions: dict[int, str] = {}
    batch = make(processor, packed=False, questions=40)[0]
    for picture, ((prompt, answer),) in zip(
        batch.pictures.tolist(), questions_of(batch, processor), strict=True
    ):
        if prompt == "caption en":
            assert captions.setdefault(picture, answer) == answer
    assert len(set(captions.values())) == 3


def test_a_row_of_limited_length_takes_what_fits(processor: Processor) -> None:
    for step in range(5):
        batch = make(processor, questions=8, row_tokens=60, pictures=8)[step]
        assert batch.input_ids.shape[1] <= 60
        for blocks, row in zip(batch.blocks, questions_of(batch, processor), strict=True):
            assert 1 <= len(row) <= 8
            assert int((blocks > 0).sum()) > 30  # little is left empty


def test_a_row_of_one_question_takes_those_that_are_short_enough(processor: Processor) -> None:
    """A limit of its own for each row; a scene of long answers still gives all of its questions."""
    for step in range(5):
        batch = make(processor, questions=4, row_tokens=24, pictures=8, packed=False)[step]
        assert 16 < batch.input_ids.shape[1] <= 24
        assert batch.pictures.tolist() == [number for number in range(8) for _ in range(4)]
        assert all(len(row) == 1 for row in questions_of(batch, processor))


def test_scenes_are_easy_in_the_beginning(processor: Processor) -> None:
    batches = make(processor, steps=100, easy_from=10, easy_to=50, easy_least=0.1)
    shares = [batches.easy_share(step) for step in (0, 10, 20, 30, 50, 99)]
    assert shares == pytest.approx([1, 1, 0.775, 0.55, 0.1, 0.1])
    assert make(processor).easy_share(0) == 0.1  # no range: the least from the start

    def things(step: int) -> list[int]:
        batch = make(processor, pictures=24, questions=9, packed=False, easy_from=10, easy_to=50)[step]
        rows = zip(batch.pictures.tolist(), questions_of(batch, processor), strict=True)
        captions = {picture: text for picture, ((prompt, text),) in rows if prompt == "caption en"}
        return [text.count(",") + 1 for text in captions.values()]

    assert set(things(0)) <= {1, 2}
    assert max(things(60)) > 2


def test_half_of_the_pictures_have_other_looks(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half is drawn in other ways; boxes of patches turn with their things."""
    made: list[tuple[Scene, Image.Image]] = []
    batch_of = SceneBatches._batch

    def spy(batches: SceneBatches, scenes: list[Scene], pictures: list[Image.Image], *rest: Any) -> Batch:
        made.extend(zip(scenes, pictures, strict=True))
        return batch_of(batches, scenes, pictures, *rest)

    monkeypatch.setattr(SceneBatches, "_batch", spy)
    batch = make(processor, pictures=400, questions=0)[0]
    plain = [picture.tobytes() == scene.draw(CONFIG.image_size).tobytes() for scene, picture in made]
    assert 0.45 < np.mean(plain) < 0.58
    changed = [scene.background < 165 or any(thing.angle for thing in scene.things) for scene, _ in made]
    assert np.mean(changed) > 0.25
    assert np.mean(np.logical_and(plain, changed)) < 0.03  # changed, and by chance drawn like the plain ones
    for (scene, picture), pixels, boxes in zip(made, batch.pixel_values, batch.patch_box, strict=True):
        assert torch.equal(pixels, processor.image_processor([picture])[0])
        assert np.array_equal(boxes, scene.patch_labels(CONFIG.image_size // CONFIG.patch_size)["box"])


def test_answers_in_pieces_are_the_tokens_of_the_whole(processor: Processor) -> None:
    rng = np.random.default_rng(3)
    suffixes = {example.suffix for _ in range(40) for example in islice(examples(make_scene(rng), rng), 12)}
    assert {"," in suffix for suffix in suffixes} == {True, False}
    for suffix in suffixes:
        assert encode_answer(processor.tokenizer, suffix) == processor.tokenizer.encode_suffix(suffix)


def test_to_moves_everything(processor: Processor) -> None:
    moved = make(processor)[0].to("meta")
    assert all(getattr(moved, field.name).device.type == "meta" for field in fields(Batch))
