"""BERT's encoder equals that of transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_differs, assert_equal, randomize
from torch import Tensor
from transformers import BertConfig as ReferenceConfig
from transformers import BertForPreTraining

from minivlm import masks
from minivlm.checkpoints.layouts import VISUALBERT_LAYOUTS, to_ours
from minivlm.errors import InputError
from minivlm.text.bert import BertConfig, BertEncoder

TINY = BertConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=120,
    max_position_embeddings=40,
)
IDS = torch.tensor([[5, 17, 3, 99, 42, 7], [8, 9, 11, 60, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def reference() -> BertForPreTraining:
    return randomize(BertForPreTraining(ReferenceConfig(**TINY.to_dict())))


@pytest.fixture
def ours(reference: BertForPreTraining) -> BertEncoder:
    """With the reference's tensors, whose names in VisualBERT's files begin with another word."""
    encoder = BertEncoder(TINY)
    state = {}
    for name, tensor in reference.state_dict().items():
        name = to_ours(name.replace("bert.", "visual_bert.", 1), VISUALBERT_LAYOUTS["hub"]) or ""
        if name.startswith("language_model."):
            state[name.removeprefix("language_model.")] = tensor
    encoder.load_state_dict(state)
    return encoder.eval()


@torch.no_grad()
def run(encoder: BertEncoder, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = encoder(encoder.embed(ids, positions, TYPES), masks.padding(REAL)[:, None])
    return encoder.logits(hidden), encoder.pool(hidden[:, 0])


@torch.no_grad()
def expected(reference: BertForPreTraining, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": REAL, "token_type_ids": TYPES}
    return reference(**inputs).prediction_logits, reference.bert(**inputs).pooler_output


def test_both_heads_equal_the_reference(ours: BertEncoder, reference: BertForPreTraining) -> None:
    for mine, theirs in zip(run(ours), expected(reference), strict=True):
        assert_equal(mine, theirs)


def test_every_word_changes_every_score(ours: BertEncoder) -> None:
    """From both sides: the last word changes the first score, and the other way round."""
    for place in (0, 5):
        other = IDS.clone()
        other[0, place] = 77
        change = (run(ours)[0] - run(ours, other)[0])[0].abs().amax(dim=-1)
        assert float(change.min()) > 1e-3


def pre_norm(encoder: BertEncoder) -> None:
    for block in encoder.layers:

        def forward(x: Tensor, mask: Tensor, block=block) -> Tensor:
            x = x + block.self_attn(block.layer_norm1(x), mask)
            return x + block.mlp(block.layer_norm2(x))

        block.forward = forward


def tanh_gelu(encoder: BertEncoder) -> None:
    for block in encoder.layers:
        block.mlp.hidden_act = "gelu_pytorch_tanh"


def no_types(encoder: BertEncoder) -> None:
    encoder.embed_types.weight.data.zero_()


def embeddings_not_normed(encoder: BertEncoder) -> None:
    encoder.norm.forward = lambda x: x


def larger_eps(encoder: BertEncoder) -> None:
    for block in encoder.layers:
        block.layer_norm2.eps = 1e-2


def no_transform(encoder: BertEncoder) -> None:
    encoder.logits = lambda x: F.linear(x, encoder.embed_tokens.weight, encoder.bias)


def no_bias(encoder: BertEncoder) -> None:
    encoder.bias.data.zero_()


def head_not_normed(encoder: BertEncoder) -> None:
    encoder.transform_norm.forward = partial(F.layer_norm, normalized_shape=(32,))


MISTAKES = [
    pre_norm,
    tanh_gelu,
    no_types,
    embeddings_not_normed,
    larger_eps,
    no_transform,
    no_bias,
    head_not_normed,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(
    mistake: Callable[[BertEncoder], None], ours: BertEncoder, reference: BertForPreTraining
) -> None:
    mistake(ours)
    # The two forms of GELU are similar, and so is the result.
    factor = 3 if mistake is tanh_gelu else 100
    assert_differs(run(ours)[0], expected(reference)[0], factor=factor)


def test_the_file_of_the_config_says_the_same() -> None:
    assert BertConfig.from_dict(TINY.to_dict()) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"config.json has hidden_act = 'relu'; only 'gelu' is supported"),
        ({"tie_word_embeddings": False}, "config.json has tie_word_embeddings = False; only True"),
        ({"hidden_size": 30}, "hidden_size 30 is not divisible by 4 heads"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BertConfig.from_dict(TINY.to_dict() | change)
