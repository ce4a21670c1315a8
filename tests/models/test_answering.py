"""From a picture to words in one line, and the names that the package opens with."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import minivlm
from minivlm.errors import InputError
from minivlm.models.answering import MOST_REPEATS, AnswerStream
from minivlm.models.contrastive_decoding import Contrastive, distorted
from minivlm.models.load import SHIPPED

SCENE = Path("figures/samples/scene_1.png")


@pytest.mark.parametrize("picture", [SCENE, str(SCENE), Image.open(SCENE)], ids=["path", "text", "picture"])
def test_from_a_picture_to_words(picture: Image.Image | str | Path) -> None:
    model, processor = minivlm.load()
    ids = model.generate(**processor([SCENE], ["caption en"]))
    wanted = processor.decode(ids)[0]
    assert wanted.startswith("a small yellow star")
    assert minivlm.answer(picture, "caption en") == wanted
    assert minivlm.answer(picture, "caption en", (model, processor), max_new_tokens=3) == "a small yellow"
    assert processor.batch_decode(ids, skip_special_tokens=True) == [wanted]


def test_an_answer_against_a_distorted_picture() -> None:
    """As `Contrastive` writes it, and without a weight as ever."""
    model, processor = minivlm.load()
    inputs = processor([SCENE], ["detect yellow star"])
    wanted = Contrastive(model, distorted(inputs), 40.0, beta=0.1).generate(**inputs)
    found = minivlm.answer(SCENE, "detect yellow star", contrast=40.0)
    assert found == processor.decode(wanted)[0] != minivlm.answer(SCENE, "detect yellow star")
    assert minivlm.answer(SCENE, "detect yellow star", contrast=0.0) == minivlm.answer(
        SCENE, "detect yellow star"
    )


@pytest.mark.parametrize("contrast", [-1.0, float("inf"), float("nan")])
def test_contrasts_that_are_refused(contrast: float) -> None:
    with pytest.raises(InputError, match="choose 0 for none"):
        minivlm.answer(SCENE, "caption en", contrast=contrast)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="no such file"):
        minivlm.answer("missing.png", "caption en")
    with pytest.raises(InputError, match="prompt 1 is empty"):
        minivlm.answer(SCENE, " ")


def test_a_model_serves_two_threads_at_once() -> None:
    """Nothing is changed in it, also when nobody listens to the end."""
    loaded = minivlm.load()
    before = dict(vars(loaded[0]))
    prompts = ["caption en", "detect yellow star", "what color is the triangle?"] * 2

    def ask(prompt: str) -> tuple[str, float | None]:
        stream = AnswerStream(*loaded, SCENE, prompt)
        return "".join(stream), stream.confidence

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, prompts)) == alone
    assert all(0 < (sure or 0) <= 1 for _, sure in alone)
    pieces = iter(AnswerStream(*loaded, SCENE, "caption en"))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert vars(loaded[0]) == before


@pytest.mark.parametrize(("token", "stopped"), [("5", True), ("<seg005>", False)])
def test_an_answer_that_repeats_one_token_is_stopped(
    token: str, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for shape codes, which masks may repeat."""
    model, processor = minivlm.load()
    scores = torch.zeros(1, processor.tokenizer.vocab_size)
    scores[0, processor.tokenizer.encode(token)] = 9.0
    monkeypatch.setattr(model, "logits", lambda hidden_states: scores)
    stream = AnswerStream(model, processor, SCENE, "caption en", max_new_tokens=20)
    assert "".join(stream) == token * (MOST_REPEATS if stopped else 20)
    assert stream.repeats is stopped
    assert len(model.generate(**processor([SCENE], ["caption en"]), max_new_tokens=20)[0]) == 20


def test_numbers_that_overflow_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = minivlm.load()
    with torch.no_grad():
        loaded[0].language_model.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"weights hold NaN or infinity in language_model\.norm\.weight"):
        minivlm.answer(SCENE, "caption en", loaded)


@pytest.mark.parametrize("skip", [True, False])
def test_batch_decode_as_in_transformers(skip: bool) -> None:
    theirs = AutoProcessor.from_pretrained(SHIPPED)
    ours = minivlm.Processor.from_pretrained(SHIPPED)
    ids = torch.randint(0, ours.tokenizer.vocab_size - 1, (20, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 6:] = torch.tensor([ours.tokenizer.eos_id, ours.tokenizer.pad_id, ours.tokenizer.image_id])
    wanted = theirs.batch_decode(ids, skip_special_tokens=skip)
    assert ours.batch_decode(ids, skip_special_tokens=skip) == wanted
    assert ours.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=skip) == wanted
    assert ours.batch_decode(ids) == theirs.batch_decode(ids)


def test_help_opens_with_what_a_user_needs() -> None:
    shown = pydoc.plain(pydoc.render_doc(minivlm))
    opening = shown[: shown.index("PACKAGE CONTENTS")]
    assert all(name in opening for name in ("load ", "answer ", "InputError", "minivlm.answer("))
    assert "_HOMES" not in shown
    assert "import_module" not in shown


def test_names_are_there_when_they_are_asked_for() -> None:
    """Also folders of the package, without an import of their own; nothing before."""
    code = "import sys, minivlm; assert 'torch' not in sys.modules; minivlm.processing.load_picture; "
    code += "[getattr(minivlm, name) for name in minivlm.__all__]; "
    code += "from minivlm import *; load, answer, PaliGemma; assert not hasattr(minivlm, 'nothing')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sorted(name for names in minivlm._HOMES.values() for name in names.split()) == minivlm.__all__
