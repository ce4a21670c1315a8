"""Flamingo gives the numbers of OpenFlamingo, and its usual mistakes give others.

`BLOCK` and `EXPECTED` were printed by src/helpers.py and src/flamingo.py of
https://github.com/mlfoundations/open_flamingo (655f693): GatedCrossAttentionBlock(dim=32, dim_visual=24,
dim_head=8, heads=4) on WORDS and LATENTS, and Flamingo over transformers' GPT-2 (32 wide, 2 layers, 4 heads,
120 words; FlamingoLayer handing on what GPT-2 passes by position) with such blocks and the resampler of
test_resampler.py, on IDS and PATCHES, with the tensors of `made_up` and gates of 0.8 and -0.6. The first
numbers of a word before the first picture of its row, of one after it, and of the last.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpt2 import load_gpt2
from helpers import assert_differs, assert_equal, made_up, noise, randomize
from miniatures import TINY_FLAMINGO, TINY_TEXT, TINY_VISION
from torch import Tensor, nn
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2Model, IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from minivlm import masks
from minivlm.attention import additive, record_attention
from minivlm.errors import InputError
from minivlm.models.miniatures.flamingo import (
    Flamingo,
    FlamingoCache,
    FlamingoConfig,
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
)
from minivlm.models.views import place
from minivlm.vision.resampler import PerceiverAttention

NORMS = r"(norm\w*|ln_\w+|ff\.0|\d\.1\.0)\.weight$"
IMAGE = 118
IDS = torch.tensor([[5, 17, IMAGE, 99, 42, IMAGE, 7, 64], [IMAGE, 23, 9, 31, 11, 8, 77, 2]])
PATCHES = noise(3, 5, 24, start=0.75)  # of two pictures in the first row and one in the second
LATENTS, WORDS = noise(2, 2, 3, 24, start=0.5), noise(2, 8, 32, start=1.5)
BLOCK = [  # at places 0, 3 and 7
    [[0.895579, 0.644036, 0.028319], [0.3356, -0.044636, 0.084886]],
    [[0.513471, 0.18316, 1.016886], [-0.142183, -1.008884, 0.035077]],
    [[0.542263, -0.599795, -0.202356], [-0.343934, -1.212003, -0.858289]],
]
EXPECTED = {  # every n layers; at places 1, 4 and 7
    1: [
        [[-0.805879, 0.441661, 0.25886], [-1.222577, -0.361853, 0.73336]],
        [[-0.505199, -0.277949, 0.806056], [-0.362222, -0.247122, 0.452532]],
        [[-0.871167, 0.351371, -0.103607], [-0.980863, -0.224528, 1.190089]],
    ],
    2: [
        [[-0.925555, 0.514837, 0.224286], [-0.981794, 0.047465, 0.580859]],
        [[-0.666724, 0.361857, 0.388772], [0.492957, 0.50118, -1.134556]],
        [[-0.699264, 0.812515, 0.511436], [-0.911139, 0.94798, 0.378721]],
    ],
}


def tiny(**settings: Any) -> Flamingo:
    own = {"vision": TINY_VISION, "text": TINY_TEXT, "image_token_id": IMAGE} | TINY_FLAMINGO | settings
    return Flamingo(FlamingoConfig(**own)).eval()


def theirs(name: str) -> str:
    """The original's name of a tensor that is not GPT-2's."""
    if name.startswith("gated"):
        return "lang_encoder." + name
    return re.sub(r"(layers\.\d)\.ff", r"\1.1", re.sub(r"(layers\.\d)\.attn", r"\1.0", name))


@torch.no_grad()
def fill(module: nn.Module, prefix: str = "") -> None:
    """The tensors that made the numbers."""
    for name, tensor in module.named_parameters():
        if name.endswith("gate"):
            tensor.fill_(0.8 if name.endswith("attn_gate") else -0.6)
        else:
            tensor.copy_(made_up(theirs(prefix + name), tensor.shape, NORMS))


def filled(every: int = 1) -> Flamingo:
    model = tiny(cross_attn_every_n_layers=every)
    names = ReferenceConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=120, bos_token_id=0, eos_token_id=1
    )
    gpt2 = {
        name: made_up(f"lang_encoder.transformer.{name}", tensor.shape, NORMS)
        for name, tensor in GPT2Model(names).state_dict().items()
    }
    load_gpt2(model.language_model, gpt2)
    fill(model.perceiver, "perceiver.")
    fill(model.gated_cross_attn_layers, "gated_cross_attn_layers.")
    return model


@torch.no_grad()
def scores(model: Flamingo, patches: Tensor = PATCHES) -> Tensor:
    """At all places, of pictures that the tower has seen."""
    latents = model.perceiver(patches[:, None])
    return model.logits(model.read(IDS, torch.ones_like(IDS), latents))


def parts(x: Tensor, *places: int) -> Tensor:
    return torch.stack([x[:, at, :3] for at in places])


# The original.


@torch.no_grad()
def test_the_block_equals_the_original() -> None:
    block = GatedCrossAttentionBlock(32, 24, 4, 8)
    fill(block, "gated_cross_attn_layers.0.")
    picture_of_word = (IDS == IMAGE).cumsum(dim=1)
    mask = masks.block_diagonal(picture_of_word, torch.tensor([[1, 1, 1, 2, 2, 2]]))
    assert_equal(parts(block(WORDS, LATENTS.flatten(1, 2), mask), 0, 3, 7), torch.tensor(BLOCK))


@pytest.mark.parametrize("every", EXPECTED)
def test_scores_equal_the_original(every: int) -> None:
    assert_equal(parts(scores(filled(every)), 1, 4, 7), torch.tensor(EXPECTED[every]))


def test_a_word_sees_the_last_picture_before_it() -> None:
    model = filled()
    for changed, rows, first in ((0, 0, 2), (1, 0, 5), (2, 1, 0)):
        patches = PATCHES.clone()
        patches[changed] *= -1
        moved = (scores(model, patches) - scores(model)).abs().amax(dim=-1)  # [B, T]
        assert moved[1 - rows].max() == 0
        assert (moved[rows, :first] == 0).all()
        assert (moved[rows, first:] > 1e-3).all()  # the `<image>` token, too, and what reads it


@torch.no_grad()
def test_a_block_shows_one_picture_only() -> None:
    """Later words know of the first picture by the words about it alone."""
    block = randomize(GatedCrossAttentionBlock(32, 24, 4, 8))
    picture_of_word = (IDS[:1] == IMAGE).cumsum(dim=1)
    mask = masks.block_diagonal(picture_of_word, torch.tensor([[1, 1, 1, 2, 2, 2]]))
    media, x = LATENTS[:1].flatten(1, 2), WORDS[:1]
    other = torch.cat([-media[:, :3], media[:, 3:]], dim=1)
    moved = (block(x, media, mask) - block(x, other, mask)).abs().amax(dim=-1)[0]
    assert torch.equal(moved > 0, picture_of_word[0] == 1)


# Idefics.


@torch.no_grad()
def test_idefics_has_the_same_gates_and_zeros() -> None:
    """With the norms and the MLP of Flamingo in place of its own."""
    config = IdeficsConfig(
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        qk_layer_norms=False,
        vision_config={"embed_dim": 24},
    )
    config._attn_implementation = "eager"
    ours = randomize(GatedCrossAttentionBlock(32, 24, 4, 8))
    reference = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    reference.input_layernorm, reference.post_attention_layernorm = ours.attn.norm, ours.ff[0]
    reference.mlp = ours.ff[1:]
    k, v = ours.attn.to_kv.weight.chunk(2)
    weights = {"q_proj": ours.attn.to_q.weight, "k_proj": k, "v_proj": v, "o_proj": ours.attn.to_out.weight}
    for name, weight in weights.items():
        getattr(reference.cross_attn, name).weight.copy_(weight)
    reference.alpha_cross_attn.copy_(ours.attn_gate.expand_as(reference.alpha_cross_attn))
    reference.alpha_dense.copy_(ours.ff_gate.expand_as(reference.alpha_dense))

    mask = masks.block_diagonal((IDS == IMAGE).cumsum(dim=1), torch.tensor([[1, 1, 1, 2, 2, 2]]))
    media = LATENTS.flatten(1, 2)
    expected = reference(
        WORDS,
        image_hidden_states=media,
        image_attention_mask=additive(mask[:, None], torch.float32),
        cross_attention_gate=mask.any(dim=-1).float(),
    )
    assert_equal(ours(WORDS, media, mask), expected)


# Mistakes.


def no_zeros(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    def forward(self: MaskedCrossAttention, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        return self.look(self.norm(x), media, additive(mask[:, None], x.dtype))

    patch.setattr(MaskedCrossAttention, "forward", forward)


def image_sees_the_one_before(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    right = masks.block_diagonal
    patch.setattr(masks, "block_diagonal", lambda q, k: right(q - (IDS == IMAGE).long(), k))


def all_pictures_so_far(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "block_diagonal", lambda q, k: q[:, :, None] >= k[:, None])


def keys_without_latents(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    def forward(self: PerceiverAttention, x: Tensor, latents: Tensor) -> Tensor:
        return self.look(self.norm_latents(latents), self.norm_media(x))

    patch.setattr(PerceiverAttention, "forward", forward)


def relu(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    for layer in (*model.perceiver.layers, *model.gated_cross_attn_layers.values()):
        layer.ff[2] = nn.ReLU()


def no_tanh(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "tanh", lambda x: x)


def gates_swapped(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    for block in model.gated_cross_attn_layers.values():
        block.attn_gate, block.ff_gate = block.ff_gate, block.attn_gate


def latents_normed_again(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    right = MaskedCrossAttention.look
    patch.setattr(
        MaskedCrossAttention,
        "look",
        lambda self, q, k, mask: right(self, q, nn.functional.layer_norm(k, (24,)), mask),
    )


def no_mlp_before_pictures(model: Flamingo, patch: pytest.MonkeyPatch) -> None:
    """As Llama 3.2 does it."""

    def forward(self: GatedCrossAttentionBlock, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn_gate.tanh() * self.attn(x, media, mask)
        return x + (self.ff_gate.tanh() * self.ff(x)) * mask.any(dim=-1, keepdim=True)

    patch.setattr(GatedCrossAttentionBlock, "forward", forward)


MISTAKES = {
    no_zeros: 0.6,
    image_sees_the_one_before: 0.5,
    all_pictures_so_far: 0.3,
    keys_without_latents: 0.4,
    relu: 0.3,
    no_tanh: 0.05,
    gates_swapped: 0.8,
    latents_normed_again: 0.03,
    no_mlp_before_pictures: 0.3,
}


@pytest.mark.parametrize(("mistake", "least"), MISTAKES.items())
def test_mistakes_show(
    mistake: Callable[[Flamingo, pytest.MonkeyPatch], None], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled()
    right = scores(model)
    mistake(model, monkeypatch)
    assert_differs(scores(model), right, factor=least / 1e-5)


def test_the_layers_of_idefics_show() -> None:
    """Before layers 0, n, 2n, ..."""
    model = filled(2)
    layers = model.gated_cross_attn_layers
    model.gated_cross_attn_layers = nn.ModuleDict({"0": layers["1"]})
    assert_differs(scores(model), scores(filled(2)), factor=50_000)


# The language model.


@torch.no_grad()
def plain(model: Flamingo, ids: Tensor, mask: Tensor) -> Tensor:
    """The scores of GPT-2 without anything else."""
    decoder = model.language_model
    return decoder.logits(decoder(decoder.embed(ids), *place(mask, None)))


PIXELS = noise(3, 3, 28, 28, start=0.25)


@torch.no_grad()
def test_training_starts_from_the_language_model() -> None:
    model = tiny()
    randomize(model.language_model)
    assert torch.equal(model(IDS, PIXELS).logits, plain(model, IDS, torch.ones_like(IDS)))


@pytest.mark.parametrize("every", [1, 2])
def test_rows_without_a_picture_stay_the_language_models(every: int) -> None:
    torch.manual_seed(0)
    model = tiny(cross_attn_every_n_layers=every)
    randomize(model.language_model)
    new = [*model.perceiver.parameters(), *model.gated_cross_attn_layers.parameters()]
    optimizer = torch.optim.AdamW(new, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, PIXELS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(gate != 0 for name, gate in model.named_parameters() if name.endswith("gate"))
    check_text_rows(model)


@torch.no_grad()
def check_text_rows(model: Flamingo) -> None:
    text = IDS.masked_fill(IDS == IMAGE, 50)
    mask = torch.ones_like(text)
    assert torch.equal(model(text).logits, plain(model, text, mask))

    mixed = torch.cat([text[:1], IDS, text[1:]])  # beside rows with pictures
    mask = torch.ones_like(mixed)
    mask[0, :3] = 0
    logits, expected = model(mixed, PIXELS, mask).logits, plain(model, mixed, mask)
    for row in (0, 3):
        assert torch.equal(logits[row, mask[row].bool()], expected[row, mask[row].bool()])
    assert_differs(logits[1:3], expected[1:3], factor=1000)


# Three views of interleaved rows.


ROWS = [
    [5, 17, IMAGE, 99, IMAGE, 7, 64, 8, 3],
    [IMAGE, 23, 9, 31],
    [12, 13, 14, 15, 16],
    [IMAGE, IMAGE, 40, IMAGE, 41, 42, 43, 44],
]
STARTS = [6, 2, 3, 4]  # what comes later is decoded
PICTURES = [2, 1, 0, 3]
SIX = noise(6, 3, 28, 28, start=0.4)


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    batch = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        batch[:, number, place] = torch.tensor([row, [1] * len(row)])
    return batch[0], batch[1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings", [{}, {"cross_attn_every_n_layers": 2}, {"max_num_media": 3, "max_num_frames": 2}]
)
def test_full_cached_and_padded_are_one(settings: dict[str, int], side: str) -> None:
    model = randomize(tiny(**settings))
    pixels = list(SIX.split(PICTURES))
    alone = [
        model(torch.tensor([row]), own if len(own) else None).logits[0]
        for row, own in zip(ROWS, pixels, strict=True)
    ]
    ids, mask = padded(ROWS, side)
    logits = model(ids, SIX, mask).logits
    for number, expected in enumerate(alone):
        assert_equal(logits[number, mask[number].bool()], expected)

    ids, mask = padded([row[:start] for row, start in zip(ROWS, STARTS, strict=True)], side)
    hidden, cache = model.prefill(ids, mask, SIX)
    for step in range(5):
        left = [start + step < len(row) for row, start in zip(ROWS, STARTS, strict=True)]
        for number, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
            if start + step <= len(row):
                assert_equal(model.logits(hidden)[number], alone[number][start + step - 1])
        tokens = [
            row[start + step] if more else 0 for row, start, more in zip(ROWS, STARTS, left, strict=True)
        ]
        if any(left):
            hidden = model.decode(torch.tensor(tokens), torch.tensor(left), cache)


@torch.no_grad()
def test_a_tag_that_the_model_writes_is_a_word() -> None:
    """No picture comes with it: it sees the last one, as every word that is written."""
    model = randomize(tiny())
    _, cache = model.prefill(IDS[:1], torch.ones_like(IDS[:1]), SIX[:2])
    written = model.decode(torch.tensor([IMAGE]), torch.tensor([True]), cache)
    table = model.language_model.embed_tokens.weight
    table[3] = table[IMAGE]
    _, cache = model.prefill(IDS[:1], torch.ones_like(IDS[:1]), SIX[:2])
    assert_equal(written, model.decode(torch.tensor([3]), torch.tensor([True]), cache))


@torch.no_grad()
def test_a_cache_can_be_used_again() -> None:
    model = randomize(tiny())
    _, cache = model.prefill(IDS, torch.ones_like(IDS), PIXELS)
    assert isinstance(cache, FlamingoCache)
    assert cache.pictures is not None
    assert cache.pictures.tolist() == [2, 1]
    cache.reset()
    text = IDS.masked_fill(IDS == IMAGE, 50)
    again = model.read(text, torch.ones_like(text), None, cache)
    assert_equal(again, model.read(text, torch.ones_like(text), None))


# Pictures.


@torch.no_grad()
def test_a_video_is_read_frame_by_frame() -> None:
    model = randomize(tiny(max_num_frames=3))
    videos = noise(2, 3, 3, 28, 28)
    patches = torch.stack([model.vision_tower(video) for video in videos])  # [M, F, N, D]
    assert_equal(model.encode_image(videos), model.perceiver(patches))
    assert_equal(model.encode_image(videos[:, 0]), model.perceiver(patches[:, :1]))


@torch.no_grad()
def test_a_picture_knows_its_place_in_its_row() -> None:
    model = randomize(tiny(max_num_media=2))
    latents = model.encode_images(IDS, PIXELS)
    assert latents is not None
    assert_equal(latents, model.encode_image(PIXELS, torch.tensor([0, 1, 0])))
    assert_differs(latents[1], model.encode_image(PIXELS)[1])


@torch.no_grad()
def test_where_words_look_goes_through_the_latents() -> None:
    model = randomize(tiny(cross_attn_every_n_layers=2))
    ids = torch.tensor([[IMAGE, 5, 6, 7]])
    with record_attention() as encoding:
        latents = model.encode_image(PIXELS[:1])
    with record_attention() as reading:
        model.read(ids, torch.ones_like(ids), latents)
    tower, decoder, places = model.sort_maps(encoding, reading)
    assert [len(tower), len(decoder)] == [2, 2]
    assert all(layer.shape == (1, 4, 4, 4) for layer in (*tower, *decoder))
    to_patches = encoding[-1][0].mean(dim=0)[:, :4]  # of 3 latents; 3 of the 7 keys are latents
    assert encoding[-1].shape == (1, 2, 3, 7)
    cross = reading[1]  # before the second layer
    assert cross.shape == (1, 4, 4, 3)
    assert_equal(places, torch.einsum("htl, ln -> htn", cross[0], to_patches)[None])
    assert torch.equal(decoder[1], reading[2])


# What is refused.


@pytest.mark.parametrize(
    ("ids", "pictures", "message"),
    [
        (IDS, 2, "hold 3 image placeholders and there are 2 pictures"),
        (IDS, 4, "hold 3 image placeholders and there are 4 pictures"),
        (IDS, 0, "hold 3 image placeholders and there are 0 pictures"),
        (IDS.masked_fill(IDS == IMAGE, 50), 1, "hold 0 image placeholders and there are 1 pictures"),
    ],
)
def test_pictures_without_a_place_and_places_without_a_picture(
    ids: Tensor, pictures: int, message: str
) -> None:
    model, mask = tiny(), torch.ones_like(ids)
    pixels = SIX[:pictures] if pictures else None
    with pytest.raises(ValueError, match=message):
        model(ids, pixels)
    with pytest.raises(ValueError, match=message):
        model.prefill(ids, mask, pixels)
    with pytest.raises(ValueError, match=message):
        model.read(ids, mask, None if pixels is None else LATENTS.flatten(0, 1)[:1].expand(pictures, 3, 24))


def test_configs_that_make_no_sense() -> None:
    config = partial(FlamingoConfig, vision=TINY_VISION, text=TINY_TEXT, image_token_id=IMAGE)
    with pytest.raises(InputError, match="cross_attn_every_n_layers is 3, and the decoder has only 2 layers"):
        config(cross_attn_every_n_layers=3)
    with pytest.raises(InputError, match="image_token_id is 120, and the decoder has 120 words"):
        config(image_token_id=120)
    with pytest.raises(InputError, match="max_num_media is -1"):
        config(max_num_media=-1)
    with pytest.raises(InputError, match="num_latents is 0"):
        config(num_latents=0)
    values = config(max_num_frames=2)
    assert FlamingoConfig.from_dict(values.to_dict()) == values
    assert replace(values, max_num_frames=0).max_num_frames == 0
