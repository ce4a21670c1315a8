"""VisualGPT gives the numbers of the authors' own program, and its usual mistakes give others.

`EXPECTED` was printed by https://github.com/Vision-CAIR/VisualGPT: VisualEncoder(3, 0, d_in=24, d_model=32,
d_k=8, d_v=8, h=4, d_ff=40) of models/transformer/encoders.py and GPT2LMHeadModel of gpt_decoder_visualGPT.py
(32 wide, 2 layers, 4 heads, 120 words; the widths that the file writes out were replaced), with the tensors
of `made_up`, REGIONS and TOKENS. For each tau: the first logarithms of probabilities at the first and at the
last token. LEVEL is what the encoder's last layer makes of the first region.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpt2 import load_gpt2
from helpers import assert_differs, assert_equal, difference, made_up, noise, randomize
from miniatures import TINY_TEXT, TINY_VISION
from miniatures import tiny as tiny_system
from torch import Tensor
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2Model

from minivlm.attention import record_attention
from minivlm.errors import InputError
from minivlm.models.miniatures.visualgpt import Shown, VisualGPT, VisualGPTBlock, VisualGPTConfig
from minivlm.text.gpt2 import GPT2Decoder

NORMS = r"(ln_|norm)\w*\.weight$"
REGIONS = noise(2, 6, 24, start=0.25)
TOKENS = torch.tensor([[5, 17, 3, 99, 42]] * 2)
IMAGE = 119  # a placeholder, which no vector of the table belongs to
LEVEL = [[-0.343479, 0.930209, -0.829009], [0.248771, -0.440587, 0.152376]]
EXPECTED = {
    0.0: (
        [[-6.613458, -5.973447, -6.799222], [-5.909923, -5.600343, -6.515528]],
        [[-6.526268, -5.537374, -6.802637, -5.314729], [-6.210908, -5.309976, -6.756389, -5.092163]],
    ),
    0.2: (
        [[-6.613458, -5.973447, -6.799222], [-5.909923, -5.600343, -6.515528]],
        [[-6.535494, -5.554885, -6.785631, -5.328855], [-6.258806, -5.307845, -6.682949, -5.088659]],
    ),
    0.4: (
        [[-6.566444, -5.955433, -6.612045], [-5.988783, -5.718234, -6.429398]],
        [[-6.503941, -5.505173, -6.74685, -5.482268], [-6.502968, -5.321339, -6.701909, -5.300669]],
    ),
}
THEIRS = {  # our names -> the original's
    r"^language_model\.layers": "decoder.transformer.h",
    r"fc_alpha\.(\d)": lambda number: f"fc_alpha{int(number[1]) + 1}",
    r"(\d)\.self_attn\.": r"\1.mhatt.attention.",
    r"attention\.([qkvo])_proj": r"attention.fc_\1",
    r"layer_norm1": "mhatt.layer_norm",
    r"(layers\.\d)\.fc": r"\1.pwff.fc",
    r"layer_norm2": "pwff.layer_norm",
}


def theirs(name: str) -> str:
    for ours, original in THEIRS.items():
        name = re.sub(ours, original, name)
    return name


@torch.no_grad()
def filled(tau: float) -> VisualGPT:
    """With the tensors that made EXPECTED."""
    model = VisualGPT(
        VisualGPTConfig(TINY_VISION, TINY_TEXT, encoder_intermediate_size=40, tau=tau, image_token_id=IMAGE)
    ).eval()
    for name, tensor in model.named_parameters():
        made = made_up(theirs(name), tensor.shape, NORMS)
        tensor.copy_(made.T if "enc_dec_attn.c_proj.weight" in name else made)
    names = ReferenceConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=120, bos_token_id=0, eos_token_id=1
    )
    gpt2 = {
        name: made_up(f"decoder.transformer.{name}", tensor.shape, NORMS)
        for name, tensor in GPT2Model(names).state_dict().items()
    }
    plain = GPT2Decoder(TINY_TEXT)
    load_gpt2(plain, gpt2)
    loaded = model.language_model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys  # GPT-2's own parts are where they were
    return model


@torch.no_grad()
def scores(model: VisualGPT, regions: Tensor = REGIONS) -> tuple[Tensor, Tensor]:
    ids = torch.cat([torch.full((2, 1), IMAGE), TOKENS], dim=1)
    hidden = model.read(ids, torch.ones_like(ids), model.encoder(regions).flatten(1, 2))
    logits = model.logits(hidden).log_softmax(dim=-1)
    return logits[:, 1, :3], logits[:, -1, :4]


def last(tau: float) -> Tensor:
    return torch.tensor(EXPECTED[tau][1])


@pytest.mark.parametrize("tau", EXPECTED)
def test_scores_equal_the_original(tau: float) -> None:
    for ours, expected in zip(scores(filled(tau)), EXPECTED[tau], strict=True):
        assert_equal(ours, torch.tensor(expected))


@torch.no_grad()
def test_levels_equal_the_original() -> None:
    assert_equal(filled(0.2).encoder(REGIONS)[:, 2, 0, :3], torch.tensor(LEVEL))


def test_the_picture_changes_the_scores() -> None:
    assert_differs(scores(filled(0.2), -REGIONS)[1], last(0.2), factor=1000)


def gates_swapped(model: VisualGPT) -> None:
    for block in model.blocks:
        for fc_alpha in block.fc_alpha:
            fc_alpha.weight.data.neg_()
            fc_alpha.bias.data.neg_()


def residual_kept(model: VisualGPT) -> None:
    for block in model.blocks:
        block.mix = lambda a, shown, block=block: a + VisualGPTBlock.mix(block, a, shown)


def divided_by_three(model: VisualGPT) -> None:
    for block in model.blocks:
        block.mix = lambda a, shown, block=block: VisualGPTBlock.mix(block, a, shown) / 3**0.5


def levels_not_normed(model: VisualGPT) -> None:
    for block in model.blocks:
        block.show = lambda levels, has_picture, block=block: Shown(
            *block.enc_dec_attn.keys_values(levels), has_picture
        )


def last_level_alone(model: VisualGPT) -> None:
    encode = model.encoder.forward
    model.encoder.forward = lambda regions: encode(regions)[:, -1:].repeat(1, 3, 1, 1)


def relu_before_the_encoder(model: VisualGPT) -> None:
    encoder = model.encoder
    kept: list[Tensor] = []
    encoder.fc.register_forward_hook(lambda _, x, y: kept.append(y))
    encoder.layer_norm.register_forward_pre_hook(lambda _, x: (F.relu(kept[-1]),))


@pytest.mark.parametrize(
    ("mistake", "least"),
    [
        (gates_swapped, 0.01),
        (residual_kept, 0.02),
        (divided_by_three, 0.02),
        (levels_not_normed, 0.01),
        (last_level_alone, 0.01),
        (relu_before_the_encoder, 0.01),
    ],
)
def test_mistakes_show(mistake: Callable[[VisualGPT], None], least: float) -> None:
    model = filled(0.2)
    mistake(model)
    assert difference(scores(model)[1], last(0.2)) > least


@pytest.mark.parametrize(("tau", "least"), [(0.2, 0.001), (0.4, 0.02)])
def test_no_threshold_shows(tau: float, least: float) -> None:
    assert difference(scores(filled(0.0))[1], last(tau)) > least


@torch.no_grad()
def test_the_placeholder_is_not_read() -> None:
    model = randomize(tiny_system("visualgpt"))
    pixels, ids = noise(1, 3, 28, 28), torch.tensor([[IMAGE, 5, 17, 3]])
    logits = model(ids, pixels).logits[:, 1:]
    model.language_model.embed_tokens.weight[0] += 1  # a placeholder's id is replaced by 0
    assert torch.equal(model(ids, pixels).logits[:, 1:, 1:], logits[..., 1:])


@torch.no_grad()
def test_a_row_without_a_picture_is_gpt2s() -> None:
    model = randomize(tiny_system("visualgpt"))
    ids, mask = torch.tensor([[5, 17, 3]]), torch.ones(3, 3).tril().bool()[None, None]
    gpt2 = model.language_model  # whose own forward knows no pictures
    plain = gpt2.logits(gpt2(gpt2.embed(ids), torch.arange(3)[None], mask))
    assert_equal(model(ids).logits, plain)


@torch.no_grad()
def test_a_row_has_one_picture_at_most() -> None:
    model = tiny_system("visualgpt")
    with pytest.raises(ValueError, match=r"\[2\] image placeholders, and there are 2 pictures"):
        model(torch.tensor([[IMAGE, IMAGE, 5]]), noise(2, 3, 28, 28))


@torch.no_grad()
def test_maps_are_sorted() -> None:
    model = randomize(tiny_system("visualgpt"))
    pixels, ids = noise(1, 3, 28, 28), torch.tensor([[IMAGE, 5, 17, 3]])
    with record_attention() as encoding:
        image = model.encode_image(pixels)
    with record_attention() as reading:
        model.read(ids, torch.ones_like(ids), image)
    tower, decoder, attention = model.sort_maps(encoding, reading)
    assert [tuple(layer.shape) for layer in tower] == [(1, 4, 4, 4)] * 2
    assert [tuple(layer.shape) for layer in decoder] == [(1, 4, 4, 4)] * 2
    assert not any(layer[..., 1:, 0].any() for layer in decoder)  # nobody looks at the placeholder
    assert attention.shape == (6, 4, 4, 4)
    assert_equal(attention.sum(dim=-1), torch.ones(6, 4, 4))
    assert torch.equal(attention[0], reading[1][0])


@pytest.mark.parametrize("tau", [-0.1, 0.5])
def test_a_threshold_that_closes_both_gates_is_refused(tau: float) -> None:
    with pytest.raises(InputError, match=f"tau is {tau}: expected 0 or more and less than 0.5"):
        VisualGPTConfig(tau=tau)
