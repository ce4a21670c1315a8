"""Groups that share a prefilled prompt are what their rows would be alone, and so are their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minivlm.evaluation.answers import make_questions
from minivlm.evaluation.continued import answer_ids, extended
from minivlm.models.load import SHIPPED, load_answering
from minivlm.training.log_probs import answer_log_probs
from minivlm.training.rollouts import sample_groups

FOLDERS = {
    "paligemma": SHIPPED,
    **{
        name: SHIPPED.parent / "miniatures" / name
        for name in ("llava", "clipcap", "flamingo", "visualgpt", "qwen2_vl", "qwen2_5_vl")
    },
}
GROUP = 3


@pytest.fixture(scope="module", params=FOLDERS)
def system(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return load_answering(FOLDERS[request.param])


@pytest.fixture(scope="module")
def asked() -> tuple[list[Any], list[str]]:
    """Prompts of several lengths, whose rows are padded."""
    questions = [q for q in make_questions(3, 0, "test", 64) if q.example.task in ("caption", "count")]
    return [q.picture for q in questions], [q.example.prefix for q in questions]


def test_sampled_as_without_sharing(system: tuple[Any, Any], asked: tuple[list[Any], list[str]]) -> None:
    model, processor = system
    pictures, prompts = asked
    rollout = sample_groups(
        model, processor, pictures, prompts, GROUP, max_new_tokens=12, seed=5, temperature=2.0
    )
    repeated = [[one for one in ones for _ in range(GROUP)] for ones in (pictures, prompts)]
    wanted = model.generate(**processor(*repeated), max_new_tokens=12, seed=5, temperature=2.0)
    assert torch.equal(rollout.tokens.flatten(0, 1), wanted)
    assert [text for group in rollout.texts for text in group] == processor.decode(wanted)
    assert any(len(set(group)) > 1 for group in rollout.texts)


def test_log_probs_are_those_of_the_answers_alone(
    system: tuple[Any, Any], asked: tuple[list[Any], list[str]]
) -> None:
    model, processor = system
    pictures, prompts = asked
    rollout = sample_groups(  # of a temperature at which the answers of a group differ
        model, processor, pictures, prompts, GROUP, max_new_tokens=12, seed=6, temperature=2.0
    )
    with torch.no_grad():
        found = answer_log_probs(model, processor, pictures, prompts, rollout.tokens, rollout.real, 2.0)
        for p, g in np.ndindex(len(prompts), GROUP):
            tokens = rollout.tokens[p, g][rollout.real[p, g]]
            inputs = processor([pictures[p]], [prompts[p]])
            rows = extended(inputs, tokens[None], torch.ones(1, len(tokens), dtype=torch.bool))
            logits = model(**rows).logits[0, -len(tokens) - 1 : -1]
            alone = (logits / 2.0).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            torch.testing.assert_close(found[p, g, : len(tokens)], alone, atol=1e-4, rtol=1e-4)
            assert bool((found[p, g, len(tokens) :] == 0).all())


def test_where_answers_end(asked: tuple[list[Any], list[str]]) -> None:
    model, processor = load_answering()
    pictures, prompts = asked
    rollout = sample_groups(model, processor, pictures, prompts, GROUP, max_new_tokens=3, seed=0)
    end = processor.tokenizer.eos_id
    for p, g in np.ndindex(len(prompts), GROUP):
        ids = rollout.tokens[p, g].tolist()
        length = ids.index(end) + 1 if end in ids else 3
        assert rollout.real[p, g].tolist() == [place < length for place in range(3)]
        assert bool(rollout.ended[p, g]) == (end in ids)
        assert rollout.lengths[p, g] == length
    assert 0 < rollout.ended.float().mean() < 1  # captions are cut off, counts are not


def test_each_prompt_is_read_once(asked: tuple[list[Any], list[str]]) -> None:
    model, processor = load_answering()
    pictures, prompts = asked
    rows = []

    hook = model.vision_tower.register_forward_hook(lambda m, a, output: rows.append(len(output)))
    sample_groups(model, processor, pictures, prompts, GROUP, max_new_tokens=2, seed=0)
    hook.remove()
    assert rows == [len(prompts)]


def test_the_entropy_is_that_of_the_next_token(asked: tuple[list[Any], list[str]]) -> None:
    model, processor = load_answering()
    pictures, prompts = asked[0][:1], ["what color is it?"]
    rollout = sample_groups(model, processor, pictures, prompts, 2, max_new_tokens=1, seed=0, temperature=3.0)
    probabilities = (model(**processor(pictures, prompts)).logits[0, -1] / 3.0).softmax(-1)
    wanted = -(probabilities * probabilities.log()).sum()
    assert rollout.entropy == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_supervised_answers_have_the_loss_of_the_model(system: tuple[Any, Any]) -> None:
    """The mean over their tokens is the model's own loss."""
    model, processor = system
    questions = make_questions(2, 0, "test", 64)[:5]
    pictures = [q.picture for q in questions]
    prompts, answers = [q.example.prefix for q in questions], [q.example.suffix for q in questions]
    with torch.no_grad():
        tokens, real = answer_ids(processor, prompts, answers)
        found = answer_log_probs(model, processor, pictures, prompts, tokens, real)
        loss = model(**processor(pictures, prompts, answers)).loss
    assert -found.sum() / real.sum() == pytest.approx(float(loss), rel=1e-4)
