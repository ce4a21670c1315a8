"""Our PaliGemma equals that of transformers on rows with a picture, a prompt and an answer.

The reference gets token_type_ids in every call: without them it is bidirectional under one attention
implementation and causal under another.
"""

from collections.abc import Iterator

import pytest
import torch
from helpers import assert_differs, assert_equal, make_batch, reference_paligemma, reload
from torch import Tensor

from minivlm import PaliGemma, masks
from minivlm.models.paligemma import PaliGemmaOutput


@pytest.fixture(scope="module", params=[2, 1], ids=["grouped", "multi-query"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Ours and the reference, with the same weights."""
    reference = reference_paligemma(num_key_value_heads=request.param)
    return reload(reference, tmp_path_factory.mktemp("paligemma")), reference


def outputs(models, batch: dict[str, Tensor]) -> Iterator[PaliGemmaOutput]:
    for model in models:
        with torch.no_grad():
            yield model(**batch)


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Padding may hold anything: only real positions are compared."""
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_loss_of_a_padded_batch(models, side: str):
    batch = make_batch([3, 5, 4], [4, 2, 1], [True, True, True], side)
    assert (batch["attention_mask"] == 0).any()
    ours, expected = outputs(models, batch)
    assert_equal(real(ours.logits, batch), real(expected.logits, batch))
    assert_equal(ours.loss, expected.loss)


def test_prefix_alone(models):
    batch = make_batch([3, 3], [0, 0], [True, True])
    del batch["labels"]
    ours, expected = outputs(models, batch)
    assert_equal(ours.logits, expected.logits)
    assert ours.loss is None
    # Without masks and token types: no padding, everything is prefix.
    short = models[0](batch["input_ids"], batch["pixel_values"])
    assert_equal(short.logits, expected.logits)


def test_text_alone(models):
    batch = make_batch([3, 5], [4, 2], [False, False], "right")
    ours, expected = outputs(models, batch)
    assert_equal(real(ours.logits, batch), real(expected.logits, batch))


def test_a_row_without_a_picture(models):
    batch = make_batch([3, 5, 4], [4, 2, 1], [True, False, True])
    ours, expected = outputs(models, batch)
    assert_equal(real(ours.logits, batch), real(expected.logits, batch))


def test_gradients(models):
    """Gradients are the same, also in the image tower."""
    batch = make_batch([3, 5], [4, 2], [True, True])
    ours, reference = models
    for model in models:
        model.zero_grad()
        model(**batch).loss.backward()
    pairs = [
        (ours.language_model.embed_tokens.weight, reference.model.language_model.embed_tokens.weight),
        (ours.multi_modal_projector.weight, reference.model.multi_modal_projector.linear.weight),
        (
            ours.vision_tower.embeddings.patch_embedding.weight,
            reference.model.vision_tower.embeddings.patch_embedding.weight,
        ),
    ]
    for mine, theirs in pairs:
        assert theirs.grad.abs().max() > 1e-4
        assert_equal(mine.grad / theirs.grad.abs().max(), theirs.grad / theirs.grad.abs().max())


# Each of these is a mistake that some reimplementation has made.


@pytest.fixture
def check(models):
    """Asserts that ours is far from the reference on a whole batch."""

    def far() -> None:
        batch = make_batch([3, 5, 4], [4, 2, 1], [True, True, True])
        ours, expected = outputs(models, batch)
        assert_differs(real(ours.logits, batch), real(expected.logits, batch))

    return far


def test_causal_instead_of_prefix_mask_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks, "prefix_lm", lambda queries, keys, lengths: masks.causal(queries, keys))
    check()


def test_answers_that_see_their_future_are_noticed(check, monkeypatch: pytest.MonkeyPatch):
    right = masks.prefix_lm
    monkeypatch.setattr(masks, "prefix_lm", lambda queries, keys, lengths: right(queries, keys, lengths + 99))
    check()


def test_visible_padding_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks, "padding", lambda key_is_real: torch.ones_like(key_is_real)[:, None])
    check()


def test_scaled_image_features_are_noticed(check, monkeypatch: pytest.MonkeyPatch):
    right = PaliGemma.encode_image
    monkeypatch.setattr(PaliGemma, "encode_image", lambda self, pixels: right(self, pixels) * 32**-0.5)
    check()


def test_swapped_pictures_are_noticed(check, monkeypatch: pytest.MonkeyPatch):
    right = PaliGemma.encode_image
    monkeypatch.setattr(PaliGemma, "encode_image", lambda self, pixels: right(self, pixels.flip(0)))
    check()


def test_labels_that_are_not_shifted_are_noticed(models, monkeypatch: pytest.MonkeyPatch):
    right = PaliGemma.loss
    monkeypatch.setattr(
        PaliGemma, "loss", lambda self, logits, labels: right(self, logits, labels.roll(1, 1))
    )
    ours, expected = outputs(models, make_batch([3, 5], [4, 2], [True, True]))
    assert_differs(ours.loss, expected.loss)


# Refusals


def test_placeholders_and_pictures_must_agree(models):
    batch = make_batch([3, 3], [0, 0], [True, True])
    with pytest.raises(ValueError, match="8 image placeholders and the pictures give 4 image features"):
        models[0](batch["input_ids"], batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="8 image placeholders and the pictures give 0"):
        models[0](batch["input_ids"])


def test_labels_need_token_types(models):
    batch = make_batch([3], [2], [True])
    del batch["token_type_ids"]
    with pytest.raises(ValueError, match="labels without token_type_ids"):
        models[0](**batch)
