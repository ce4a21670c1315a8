"""Our SigLIP tower equals that of transformers: embeddings, every block, and the output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_differs, assert_equal, randomize, reference_paligemma, reload
from transformers import SiglipVisionConfig as ReferenceConfig
from transformers import SiglipVisionModel as Reference

from minivlm import SiglipVisionConfig, SiglipVisionModel, attention, layers
from minivlm.checkpoints.layouts import PALIGEMMA_LAYOUTS, to_ours


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory):
    """Ours, the reference's output with all hidden states, and the pixels they came from."""
    reference = reference_paligemma()
    ours = reload(reference, tmp_path_factory.mktemp("siglip")).vision_tower
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.model.vision_tower(pixels, output_hidden_states=True)
    return ours, expected, pixels


@torch.no_grad()
def test_every_hidden_state(towers):
    ours, expected, pixels = towers
    states = list(ours.hidden_states(pixels))
    assert len(states) == len(expected.hidden_states) == 4
    for state, reference in zip(states, expected.hidden_states, strict=True):
        assert_equal(state, reference)
    assert_equal(ours(pixels), expected.last_hidden_state)
    # The output is after the last norm, the last hidden state before it.
    assert_differs(states[-1], expected.last_hidden_state)


@torch.no_grad()
def test_another_depth_and_patch():
    """A single patch size and number of heads may hide a mistake: here, 3 x 3 patches of 9 pixels."""
    config = SiglipVisionConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=9,
    )
    reference = randomize(Reference(ReferenceConfig(**config.to_dict())))
    ours = SiglipVisionModel(config)
    renamed = {
        to_ours(f"vision_tower.{name}", PALIGEMMA_LAYOUTS["fresh"]): tensor
        for name, tensor in reference.state_dict().items()
    }
    ours.load_state_dict({name.removeprefix("vision_tower."): tensor for name, tensor in renamed.items()})
    pixels = torch.randn(2, 3, 28, 28)
    assert ours(pixels).shape == (2, 9, 12)  # the pixel beyond the last whole patch is dropped
    assert_equal(ours(pixels), reference(pixels).last_hidden_state)


@torch.no_grad()
def test_exact_gelu_is_noticed(towers, monkeypatch: pytest.MonkeyPatch):
    ours, expected, pixels = towers
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu_pytorch_tanh", F.gelu)
    # The smallest mistake of all: the two forms differ by at most 0.0005.
    assert_differs(ours(pixels), expected.last_hidden_state, factor=3)


@torch.no_grad()
def test_wrong_positions_are_noticed(towers):
    ours, expected, pixels = towers
    wrong = copy.deepcopy(ours)
    wrong.embeddings.position_ids.zero_()
    assert_differs(wrong(pixels), expected.last_hidden_state)


@torch.no_grad()
def test_attention_scaled_by_the_whole_width_is_noticed(towers, monkeypatch: pytest.MonkeyPatch):
    ours, expected, pixels = towers
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, mask, *_: right(q, k, v, mask, scale=24**-0.5))
    assert_differs(ours(pixels), expected.last_hidden_state)


def test_wrong_picture_size_is_refused(towers):
    ours, _, _ = towers
    with pytest.raises(ValueError, match=r"\[1, 3, 14, 28\], expected \[B, 3, 28, 28\]"):
        ours(torch.zeros(1, 3, 14, 28))
