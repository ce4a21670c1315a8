"""Answers together are those of each prompt alone: about one picture, and about many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering_folders import WRITERS
from helpers import assert_equal
from PIL import Image
from torch import Tensor

import minivlm
from minivlm import InputError, answer
from minivlm.cache import KVCache
from minivlm.cli import main
from minivlm.models import many_answers
from minivlm.models.answering import AnswerStream
from minivlm.models.cache_rows import repeated, selected
from minivlm.models.load import load
from minivlm.models.many_answers import Answer, answers_about, answers_to, batches
from minivlm.models.shared_picture import SharedPicture

SCENES = [f"figures/samples/scene_{number}.png" for number in range(1, 7)]
# Of different lengths; one begins as another, and one is asked twice.
PROMPTS = ["what is it?", "what is it? say it once more", "caption en", "what", "caption en"]
READ_APART = {"paligemma": False, "visualbert": False, "simvlm": False}  # others: True


@pytest.fixture(scope="module", params=WRITERS)
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """The name, the model and the processor of each system."""
    folder = WRITERS[request.param](tmp_path_factory.mktemp("model") / "folder")
    return (request.param, *load(folder))


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load()


def alone(model: Any, processor: Any, picture: Any, prompt: str, **choices: Any) -> Answer:
    stream = AnswerStream(model, processor, picture, prompt, **choices)
    list(stream)  # whose pieces, of random bytes that are no characters, are not always those of the whole
    ids = model.generate(**processor([picture], [prompt]), **choices)
    return Answer(processor.decode(ids)[0], stream.confidence, stream.repeats)


def noise(number: int) -> Image.Image:
    """Pictures of different sizes: of some systems, they take different numbers of tokens."""
    rng = np.random.default_rng(number)
    shape = (*rng.integers(20, 90, 2), 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def assert_alike(found: list[Answer], expected: list[Answer]) -> None:
    assert [(one.text, one.repeats) for one in found] == [(one.text, one.repeats) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


def rows_of(processor: Any, prompts: list[str]) -> dict[str, Tensor]:
    inputs = processor([SCENES[0]] * len(prompts), prompts)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def test_the_same_scores_as_each_prompt_alone(system: tuple[str, Any, Any]) -> None:
    """Of the first word, and of two that are read after it."""
    _, model, processor = system
    pixels = processor.pixels([Image.open(SCENES[0])])
    hidden, cache = SharedPicture(model, len(PROMPTS)).prefill(**rows_of(processor, PROMPTS), **pixels)
    together = [model.logits(hidden)]
    words = torch.tensor([[5] * len(PROMPTS), [7] * len(PROMPTS)])
    goes_on = torch.tensor([True, True, False, True, True])
    for word in words:
        together.append(model.logits(model.decode(word, goes_on, cache)))
    for row, prompt in enumerate(PROMPTS):
        hidden, cache = model.prefill(**processor([SCENES[0]], [prompt]))
        assert_equal(together[0][row], model.logits(hidden)[0])
        for number, word in enumerate(words) if goes_on[row] else ():
            hidden = model.decode(word[:1], torch.tensor([True]), cache)
            assert_equal(together[1 + number][row], model.logits(hidden)[0])


def test_the_same_words_as_each_prompt_alone(system: tuple[str, Any, Any]) -> None:
    _, model, processor = system
    expected = [alone(model, processor, SCENES[0], prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert_alike(answers_about(model, processor, SCENES[0], PROMPTS, max_new_tokens=6), expected)
    few = answers_about(model, processor, SCENES[0], PROMPTS, max_new_tokens=6, batch_tokens=1)
    assert_alike(few, expected)


@torch.no_grad()
def test_the_picture_is_read_once(system: tuple[str, Any, Any]) -> None:
    """By the tower; and where nothing in the row sees what comes later, by the decoder as well."""
    name, model, processor = system
    runs: list[int] = []
    hook = model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    pixels = processor.pixels([Image.open(SCENES[0])])
    alone = model.prefill(**processor([SCENES[0]], PROMPTS[:1])) and len(runs)
    inputs = rows_of(processor, PROMPTS)
    shared = SharedPicture(model, len(PROMPTS))
    runs.clear()
    shared.prefill(**inputs, **pixels)
    hook.remove()
    assert len(runs) == alone
    common = shared.common_tokens(**inputs)
    assert (common > 0) == READ_APART.get(name, True)
    if common:
        shortest = int(inputs["attention_mask"].sum(dim=1).min())
        in_view = int(model.is_picture(inputs["input_ids"][-1:]).sum())
        assert in_view <= common < shortest


def test_a_picture_after_words_that_differ(tmp_path: Path) -> None:
    """Nothing is shared but the tower."""
    model, processor = load(WRITERS["llava"](tmp_path))
    image = model.config.image_token_id
    rows = torch.tensor([[5, 6] + [image] * model.config.num_image_tokens + [8, 9]] * 2)
    rows[1, 0] = 7
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    pixels = processor.pixels([Image.open(SCENES[0])])
    shared = SharedPicture(model, 2)
    assert shared.common_tokens(**inputs) == 0
    with torch.no_grad():
        found = model.logits(shared.prefill(**inputs, **pixels)[0])
        for row in range(2):
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            assert_equal(found[row], model.logits(model.prefill(**one, **pixels)[0])[0])


def test_rows_whose_angles_are_stretched(tmp_path: Path) -> None:
    """A longer row of Qwen-VL turns all of its queries and keys otherwise, the picture's as well."""
    model, processor = load(WRITERS["qwen_vl"](tmp_path))
    inputs = rows_of(processor, PROMPTS)
    shared = SharedPicture(model, len(PROMPTS))
    assert shared.common_tokens(**inputs) > 0
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    object.__setattr__(model.config.text, "seq_length", longest - 1)
    assert shared.common_tokens(**inputs) == 0


def test_rows_of_a_cache(system: tuple[str, Any, Any]) -> None:
    """Rows that go on keep what is theirs, the picture that they look at as well."""
    _, model, processor = system
    inputs = processor([noise(0), noise(1), noise(2)], ["what is it?", "caption en", "what"])
    yes, chosen = torch.tensor([True] * 3), torch.tensor([False, True, True])
    words = torch.tensor([5, 6, 7])
    with torch.no_grad():
        _, cache = model.prefill(**inputs)
        if not isinstance(cache, KVCache):
            pytest.skip("keeps no keys and values, but reads whole rows again")
        model.decode(words, yes, cache)
        lengths, some = cache.lengths.tolist(), selected(cache, chosen)
        found = model.decode(words[chosen], yes[chosen], some)
        assert cache.lengths.tolist() == lengths
        assert_equal(found, model.decode(words, yes, cache)[chosen])
        _, one = model.prefill(**processor([noise(0)], ["what is it?"]))
        several = repeated(one, 3)
        apart = model.decode(words, yes, several)
        assert_equal(apart[:1], model.decode(words[:1], yes[:1], one))
    assert (apart[0] - apart[1]).abs().max() > 1e-4


# ---- batches -----------------------------------------------------------------------------------------------


def test_batches_are_of_about_one_length_and_bounded() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 300, 200)]
    found = batches(lengths, 2000, {"max_new_tokens": 10})
    assert sorted(number for batch in found for number in batch) == list(range(200))
    most = [max(lengths[number] for number in batch) for batch in found]
    assert most == sorted(most)
    assert all(len(batch) * (longest + 10) <= 2000 for batch, longest in zip(found, most, strict=True))
    spread = [max(batch) - min(batch) for batch in ([lengths[i] for i in one] for one in found)]
    assert max(spread) < 100 < max(lengths) - min(lengths)
    assert batches([5000, 1], 2000, {}) == [[1], [0]]  # one row always fits
    assert batches([], 2000, {}) == []


def test_rows_that_have_ended_leave(shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The caption is long, and the other answers are words."""
    model, processor = shipped
    rows: list[int] = []
    decode = type(model).decode
    monkeypatch.setattr(
        type(model), "decode", lambda self, ids, *rest: rows.append(len(ids)) or decode(self, ids, *rest)
    )
    prompts = ["what color is the triangle?"] * 7 + ["caption en"]
    found = answers_about(model, processor, SCENES[0], prompts)
    assert [one.text for one in found[:7]] == ["blue"] * 7
    assert found[7].text.startswith("a small yellow star, a medium yellow star")
    assert rows[0] == 8
    assert set(rows[1:]) == {1}


def test_an_answer_that_repeats_stops_for_its_row_alone(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = shipped
    (five,) = processor.tokenizer.encode("5")
    real = model.logits

    def logits(hidden_states: Tensor) -> Tensor:
        scores: Tensor = real(hidden_states)
        if len(scores) > 1:
            scores[0] = 0
            scores[0, five] = 9
        return scores

    monkeypatch.setattr(model, "logits", logits)
    first, second = answers_about(model, processor, SCENES[0], ["caption en", "caption en"])
    assert (first.text, first.repeats) == ("5" * 8, True)
    assert second.text.startswith("a small yellow star")
    assert not second.repeats


@pytest.mark.parametrize("choices", [{"seed": 3}, {}])
def test_sampled_answers(choices: dict[str, Any], shipped: tuple[Any, Any]) -> None:
    """From a seed, they are those of each prompt alone; without one, they differ from each other."""
    prompts = ["caption en"] * 4
    sampled = {"temperature": 30.0, "max_new_tokens": 5, **choices}
    found = [one.text for one in answers_about(*shipped, SCENES[0], prompts, **sampled)]
    if choices:
        assert found == [alone(*shipped, SCENES[0], "caption en", **sampled).text] * 4
    else:
        assert len(set(found)) == 4


def test_answers_held_against_another_picture(shipped: tuple[Any, Any]) -> None:
    """They read two pictures, so they are written one after the other."""
    picture, prompts = SCENES[0], ["caption en", "how many objects are there?"]
    found = answers_about(*shipped, picture, prompts, contrast=3.0)
    streams = [AnswerStream(*shipped, picture, prompt, contrast=3.0) for prompt in prompts]
    assert_alike(found, [Answer("".join(one), one.confidence, one.repeats) for one in streams])
    plain = answers_about(*shipped, picture, prompts)
    assert [one.confidence for one in found] != [one.confidence for one in plain]
    ((first,), _) = answers_to(*shipped, [picture] * 2, prompts[:1], contrast=3.0)
    assert_alike([first], found[:1])
    with pytest.raises(InputError, match="contrast is -1"):
        answers_about(*shipped, picture, prompts, contrast=-1)


def test_what_is_refused(shipped: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="prompt 2 is empty"):
        answer(SCENES[0], ["caption en", " "], shipped)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        list(answers_to(*shipped, SCENES, [" "]))
    with pytest.raises(InputError, match="prompt 1 is of type int"):
        answer(SCENES[0], [1], shipped)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"the prompt has .* tokens"):
        answer(SCENES[0], ["caption en", "star " * 600], shipped)
    assert answer(SCENES[0], [], shipped) == []
    assert list(answers_to(*shipped, [], ["caption en"])) == []


def test_in_one_line(shipped: tuple[Any, Any]) -> None:
    expected = [answer(SCENES[0], prompt) for prompt in PROMPTS]
    assert answer(SCENES[0], PROMPTS) == answer(SCENES[0], tuple(PROMPTS), shipped) == expected


# ---- many pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [4096, 200, 1])
def test_many_pictures_in_the_order_asked(system: tuple[str, Any, Any], batch_tokens: int) -> None:
    _, model, processor = system
    pictures = [noise(number) for number in range(9)]
    choices = {"max_new_tokens": 4}
    found = answers_to(model, processor, pictures, ["what is it?"], batch_tokens=batch_tokens, **choices)
    expected = [alone(model, processor, picture, "what is it?", **choices) for picture in pictures]
    assert_alike([one for (one,) in found], expected)


def test_pictures_beside_the_row_count(tmp_path: Path) -> None:
    """Llama 3.2 Vision's rows are short, and look at thousands of tokens."""
    model, _ = load(WRITERS["llama_vision"](tmp_path))
    tower = model.config.vision
    assert model.tokens_beside == tower.max_num_tiles * ((28 // 14) ** 2 + 1)
    for name, beside in (("cross-attention", 4), ("flamingo", 3), ("visualgpt", 12), ("clipcap", 0)):
        assert load(WRITERS[name](tmp_path / name))[0].tokens_beside == beside


def test_pictures_are_opened_when_it_is_their_turn(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window at a time, and a batch of it; so a run that is stopped has said what it knew."""
    model, processor = shipped
    asked: list[int] = []
    sizes: list[int] = []
    call: Callable[..., Any] = type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, images, *rest: sizes.append(len(images)) or call(self, images, *rest),
    )

    def pictures() -> Iterator[str]:
        for number in range(30):
            asked.append(number)
            yield SCENES[number % 6]

    monkeypatch.setattr(many_answers, "WINDOW", 2)
    found = answers_to(model, processor, pictures(), ["what color is the star?"], batch_tokens=500)
    first = next(found)
    assert len(asked) < 16
    assert max(sizes) <= 500 // 64
    words = [one.text for (one,) in (first, *found)]
    assert len(words) == 30
    assert words == 5 * words[:6]


def test_several_prompts_about_many_pictures(shipped: tuple[Any, Any]) -> None:
    prompts = ["caption en", "how many circles are there?"]
    found = list(answers_to(*shipped, SCENES[:3], prompts))
    expected = [[alone(*shipped, scene, prompt) for prompt in prompts] for scene in SCENES[:3]]
    for some, others in zip(found, expected, strict=True):
        assert_alike(some, others)


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Together or one after the other, what is printed is the same, notes included."""
    asked = ["ask", *SCENES[:3], "--prompt", "caption en", "--prompt", "detect red dog"]
    for more in ([], ["--json"]):
        assert main([*asked, *more]) == 0
        together = capsys.readouterr()
        assert main([*asked, *more, "--batch-tokens", "1"]) == 0
        assert capsys.readouterr() == together
        said = ""
        for scene in SCENES[:3]:
            for prompt in ("caption en", "detect red dog"):
                assert main(["ask", scene, "--prompt", prompt, *more]) == 0
                said += capsys.readouterr().out
        assert said == together.out
    assert together.err.count("never saw") == 3


@pytest.mark.parametrize("name", ["paligemma", "llava", "flamingo"])
def test_two_threads_at_once(name: str, tmp_path: Path) -> None:
    """On one model, several prompts in each thread: the answers of one after the other."""
    model, processor = load(WRITERS[name](tmp_path / "folder"))
    asked = [(scene, PROMPTS[number:]) for number, scene in enumerate(SCENES[:4])]

    def ask(one: tuple[str, list[str]]) -> list[Answer]:
        return answers_about(model, processor, *one, max_new_tokens=6)

    alone = [ask(one) for one in asked]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, asked)) == alone
    assert len({tuple(one) for one in alone}) > 1


def test_global_state_is_as_before(shipped: tuple[Any, Any]) -> None:
    """Flags, threads, random numbers and gradients."""

    def state() -> list[object]:
        return [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.backends.mkldnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().tolist(),
        ]

    before = state()
    answer(SCENES[0], "caption en", shipped)
    answer(SCENES[0], PROMPTS, shipped)
    answer(SCENES[0], PROMPTS, shipped, temperature=1.0, seed=1)
    list(answers_to(*shipped, SCENES[:2], ["caption en"]))
    stream = iter(AnswerStream(*shipped, SCENES[0], "caption en"))
    next(stream)
    assert torch.is_grad_enabled()
    del stream
    with pytest.raises(InputError):
        answer(SCENES[0], " ", shipped)
    minivlm.load(quantize="int8")
    assert state() == before
