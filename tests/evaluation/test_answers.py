"""Answers come in the order asked, and a box's score is what the model gives for its four words."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randomize
from PIL import Image

from minivlm.errors import InputError
from minivlm.evaluation import make_questions
from minivlm.evaluation.answers import LONGEST_ANSWER, answer_all, box_scores, drawn_side
from minivlm.models.paligemma import PaliGemma, PaliGemmaOutput
from minivlm.processing import ImageProcessor, Processor, Qwen2VLImageProcessor, text_to_boxes
from minivlm.training.recipe import TrainingConfig, build
from minivlm.world.questions import segmentation_text
from minivlm.world.scenes import COLORS, Thing

# Answers


class Echo:
    """Stands in for a model: the answer is the number of the picture and the prompt, as it got them."""

    device = torch.device("cpu")

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.rows: list[list[str]] = []

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        prompts = [tokenizer.decode(ids.tolist()).strip() for ids in input_ids]
        self.rows.append(prompts)
        answers = []
        for prompt, pixels in zip(prompts, pixel_values, strict=True):
            gray = round((float(pixels.mean()) + 1) * 127.5)
            answers.append([*tokenizer.encode(f"{gray} {prompt}"), tokenizer.eos_id])
        width = max(map(len, answers))
        return torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in answers])


@pytest.fixture(scope="module")
def untrained() -> tuple[PaliGemma, Processor]:
    config = replace(TrainingConfig(), image_size=16, tower_layers=1, text_layers=1)
    model, processor = build(config)
    randomize(model)  # larger weights, for answers that differ
    return model, processor


@pytest.fixture(scope="module")
def processor(untrained: tuple[PaliGemma, Processor]) -> Processor:
    return untrained[1]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("expected", [None, [str(number) * (number % 5) for number in range(12)]])
def test_answers_come_in_the_order_asked(
    processor: Processor, expected: list[str] | None, batch_size: int
) -> None:
    echo: Any = Echo(processor)
    prompts = ["detect red circle", "caption en", "what color is the star?", "caption en"] * 3
    pictures = [Image.new("RGB", (4, 4), (10 * number,) * 3) for number in range(12)]
    answers = answer_all(echo, processor, pictures, prompts, batch_size, progress=False, expected=expected)
    assert answers == [f"{10 * number} {prompt}" for number, prompt in enumerate(prompts)]
    assert sum(map(len, echo.rows)) == 12
    assert max(map(len, echo.rows)) <= batch_size


def test_scenes_are_as_large_as_the_model_reads_within_reason() -> None:
    assert drawn_side(ImageProcessor(image_size=896)) == 896
    assert drawn_side(Qwen2VLImageProcessor(max_pixels=12_845_056)) == 448  # and not 3,584
    assert drawn_side(Qwen2VLImageProcessor(max_pixels=64 * 28 * 28)) == 224


def test_a_batch_holds_answers_of_about_equal_length(processor: Processor) -> None:
    echo: Any = Echo(processor)
    prompts = [f"detect {color} circle" for color in COLORS]
    pictures = [Image.new("RGB", (4, 4))] * 8
    expected = ["long answer", "no"] * 4
    answer_all(echo, processor, pictures, prompts, batch_size=4, progress=False, expected=expected)
    assert [sorted(prompts.index(prompt) % 2 for prompt in rows) for rows in echo.rows] == [[1] * 4, [0] * 4]


def test_answers_in_a_batch_equal_those_one_by_one(untrained: tuple[PaliGemma, Processor]) -> None:
    model, processor = untrained
    asked = make_questions(3, 1, "test", 16)
    pictures, prompts = [q.picture for q in asked], [q.example.prefix for q in asked]
    together = answer_all(model, processor, pictures, prompts, batch_size=7, progress=False)
    alone = [
        processor.decode(model.generate(**processor([picture], [prompt]), max_new_tokens=LONGEST_ANSWER))[0]
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    assert together == alone
    assert len(set(alone)) > 1


def test_no_questions_no_answers(untrained: tuple[PaliGemma, Processor]) -> None:
    assert answer_all(*untrained, [], [], progress=False) == []
    assert box_scores(*untrained, [], [], []) == []


def test_scores_that_are_not_finite_are_no_scores(untrained: tuple[PaliGemma, Processor]) -> None:
    """NaN has no place in the order from the surest box to the least sure."""
    broken = copy.deepcopy(untrained[0])
    with torch.no_grad():
        broken.language_model.norm.weight.fill_(torch.nan)
    picture, answer = Image.new("RGB", (16, 16)), "<loc0000><loc0000><loc0512><loc0512> red circle"
    with pytest.raises(InputError, match=r"the weights hold NaN or infinity in language_model\.norm\.weight"):
        box_scores(broken, untrained[1], [picture], ["detect red circle"], [answer])


def test_the_longest_true_answer_has_room(processor: Processor) -> None:
    thing = Thing("star", "purple", "small", 20, 20, 7, COLORS["purple"], 20)
    assert len(processor.tokenizer.encode_suffix(segmentation_text([thing] * 3))) <= LONGEST_ANSWER


# Scores of boxes


class Sure:
    """Stands in for a model: each word has a known probability, and the second time in a row half of it."""

    device = torch.device("cpu")

    def __init__(self, processor: Processor, probabilities: dict[str, float]) -> None:
        tokenizer = processor.tokenizer
        self.size = tokenizer.vocab_size
        self.probabilities = {tokenizer.encode(word)[0]: p for word, p in probabilities.items()}
        self.rows: list[int] = []

    def __call__(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> PaliGemmaOutput:
        self.rows.append(len(input_ids))
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, ids in enumerate(input_ids.tolist()):
            for place, following in enumerate(ids[1:]):
                p = self.probabilities.get(following, 0.5) / (2 if following in ids[: place + 1] else 1)
                logits[row, place] = math.log((1 - p) / (self.size - 1))
                logits[row, place, following] = math.log(p)
        return PaliGemmaOutput(logits)


SURE = {"<loc0010>": 0.9, "<loc0020>": 0.8, "<loc0300>": 0.7, "<loc0400>": 0.6}
SURE |= {"<loc0015>": 0.95, "<loc0025>": 0.05, "<loc0500>": 0.5, "<loc0600>": 0.1}
FIRST, SECOND = "<loc0010><loc0020><loc0300><loc0400>", "<loc0015><loc0025><loc0500><loc0600>"
SCORES = [(0.9 * 0.8 * 0.7 * 0.6) ** 0.25, (0.95 * 0.05 * 0.5 * 0.1) ** 0.25]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_score_is_the_geometric_mean_of_four_probabilities(processor: Processor, batch_size: int) -> None:
    answers = {
        f"{FIRST} red circle": SCORES[:1],
        f"{SECOND} red circle ; {FIRST} blue star": SCORES[::-1],
        f"{FIRST} red circle ; {FIRST} red circle": [SCORES[0], SCORES[0] / 2],
        "none": [],
        "": [],
        # Three words, and a box upside down, are no boxes; their words do not count for the next one.
        f"<loc0015><loc0025><loc0500> red circle ; {FIRST} red circle": SCORES[:1],
        f"<loc0500><loc0600><loc0015><loc0025> red circle ; {FIRST} red circle": SCORES[:1],
        f"{FIRST}{'<seg001>' * 16} red circle": SCORES[:1],
    }
    sure: Any = Sure(processor, SURE)
    rows = len(answers)
    pictures = [Image.new("RGB", (16, 16))] * rows
    scores = box_scores(sure, processor, pictures, ["detect red circle"] * rows, list(answers), batch_size)
    for found, wanted in zip(scores, answers.values(), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert sum(sure.rows) == rows - 2  # answers without boxes cost nothing
    assert max(sure.rows) <= batch_size


@torch.inference_mode()
def test_scores_are_those_of_decoding(untrained: tuple[PaliGemma, Processor]) -> None:
    """The same probabilities come out one word at a time, as the model would have generated the answer."""
    model, processor = untrained
    asked = [q for q in make_questions(6, 1, "test", 16) if q.example.task == "detect" and q.example.things]
    pictures, prompts = [q.picture for q in asked], [q.example.prefix for q in asked]
    answers = [q.example.suffix for q in asked]
    scores = box_scores(model, processor, pictures, prompts, answers, batch_size=4)
    for picture, prompt, answer, found in zip(pictures, prompts, answers, scores, strict=True):
        inputs = processor([picture], [prompt])
        hidden, cache = model.prefill(
            inputs["input_ids"], inputs["attention_mask"], pixel_values=inputs["pixel_values"]
        )
        of_words = []
        for word in processor.tokenizer.encode(answer):
            of_words.append(float(model.logits(hidden).log_softmax(-1)[0, word]))
            hidden = model.decode(torch.tensor([word]), torch.tensor([True]), cache)
        boxes = text_to_boxes(answer, 1, 1)
        # Four coordinates, two words of a name, and " ;" before the next box.
        wanted = [math.exp(sum(of_words[7 * n : 7 * n + 4]) / 4) for n in range(len(boxes))]
        assert found == pytest.approx(wanted, rel=1e-4)
