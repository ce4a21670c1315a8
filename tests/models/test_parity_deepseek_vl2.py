"""DeepSeek-VL2 gives the numbers of its own program, with both kinds of attention; mistakes give others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from deepseek_vl2 import (
    FORMS,
    GRIDS,
    IDS,
    IMAGE_ID,
    INPUTS,
    LAYOUT,
    LENGTH,
    SIDE,
    VIEWS,
    VOCABULARY,
    model_of,
)
from helpers import assert_differs, assert_equal, difference
from torch import Tensor

from minivlm.attention import record_attention
from minivlm.checkpoints.layouts import as_in_file
from minivlm.errors import InputError
from minivlm.models import deepseek_vl2
from minivlm.models.deepseek_vl2 import DeepseekVL2
from minivlm.processing.deepseek_vl2_tiles import arrange_views
from minivlm.text.mla import LatentCache
from minivlm.text.moe import balancing_loss, record_routing
from minivlm.vision.deepseek_vl2 import DownsampleProjector

ORIGINAL = {
    "tower": "-0.7352567 1.104962 -0.2302466 -1.17641 0.14105 -0.05856379 -0.7264178 0.4327172 1.885929 "
    "-0.6906353 -0.5038966 0.1101477",
    "projected": "0.8541151 -0.4160123 -0.685206 -0.6555216 0.4044075 0.01584114 0.2926285 0.1802242 "
    "0.1557335 -0.05041305 -0.3545786 0.08288868",
    "embeddings": "0.06922578 0.1079849 -0.3903677 -0.1670493 0.08624869 -0.3189632 -0.04706768 -0.2234229 "
    "-0.1400793 -0.07715154 -0.1502866 -0.02442042",
    "latent": "0.3874094 0.2102254 0.1299448 0.5171879 1.565729 0.1355253 -1.506736 2.156746 1.482007 "
    "-0.1521273 -0.02259655 0.6426598",
    "heads": "0.2794631 -1.48098 0.5027115 -0.628499 -0.5330777 -0.4009611 0.2317345 -0.07576532 -0.2295167 "
    "-0.7695142 -1.057811 -0.4391716",
}

forms = pytest.mark.parametrize("form", FORMS)


def original(name: str) -> Tensor:
    return torch.tensor([float(number) for number in ORIGINAL[name].split()])


def some_of(values: Tensor) -> Tensor:
    """As many numbers as are stored, from all over a tensor."""
    return values.detach().flatten()[:: values.numel() // 12 + 1]


def logits(model: DeepseekVL2, ids: Tensor = IDS, **changes: Tensor) -> Tensor:
    return model(ids, **INPUTS | changes).logits


@torch.no_grad()
@forms
def test_equal_to_the_original(form: str) -> None:
    """The tower, the projector, the layout with its marks, and the decoder."""
    model = model_of(form)
    patches = model.vision_tower(VIEWS)
    assert_equal(some_of(patches), original("tower"))
    assert_equal(some_of(model.projector(patches.unflatten(1, (7, 7)))), original("projected"))
    features = model.encode_image(**INPUTS)
    assert features.shape == (57 + 41 + 61, 32)
    assert_equal(some_of(model.merge(IDS, features)), original("embeddings"))
    assert_equal(some_of(logits(model)), original(form))


@torch.no_grad()
@forms
def test_the_picture_counts(form: str) -> None:
    """Every view of every picture of its row, and no other row."""
    model = model_of(form)
    right = logits(model)
    for view, row in enumerate([0] * 5 + [1] * 3):
        changed = VIEWS.clone()
        changed[view] = changed[view].flip(-1)
        rows = logits(model, pixel_values=changed)
        assert_differs(rows[row, -1], right[row, -1])
        others = [other for other in range(3) if other != row]
        assert_equal(rows[others], right[others])


@torch.no_grad()
def test_the_layout() -> None:
    """Where a token comes from, told by views of one color each and by marks."""
    model = model_of("heads")
    model.image_newline.fill_(1000.0)
    model.view_separator.fill_(2000.0)
    model.projector = Numbered()  # type: ignore[assignment]
    features = model.encode_image(VIEWS[:3], GRIDS[:1])[:, 0].round().long().tolist()
    whole = [[4 * row + column for column in range(4)] + [1000] for row in range(4)]
    tiles = [
        [100 + 4 * row + column for column in range(4)]
        + [200 + 4 * row + column for column in range(4)]
        + [1000]
        for row in range(4)
    ]
    assert features == [*chain(*whole), 2000, *chain(*tiles)]
    features = model.encode_image(VIEWS[5:], GRIDS[2:])[:, 0].round().long().tolist()
    below = [[100 * tile + 4 * row + n for n in range(4)] + [1000] for tile in (1, 2) for row in range(4)]
    assert features == [*chain(*whole), 2000, *chain(*below)]


class Numbered(torch.nn.Module):
    """In place of a projector: each token is 100 times the number of its view, plus its place there."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(16).view(1, 4, 4, 1) + 100 * torch.arange(len(x)).view(-1, 1, 1, 1)
        return numbers.float().expand(-1, -1, -1, 32)


@torch.no_grad()
@forms
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(form: str, side: str) -> None:
    model = model_of(form)
    pad = torch.zeros(3, 4, dtype=torch.long)
    ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], dim=1)
    real = (ids != 0).long()
    found = model(ids, attention_mask=real, **INPUTS).logits[real.bool()]
    assert_equal(found.view(3, LENGTH, -1), logits(model))


@torch.no_grad()
@forms
def test_full_cached_and_padded_agree(form: str) -> None:
    model = model_of(form)
    full, start, pad = logits(model), LENGTH - 4, torch.zeros(3, 2, dtype=torch.long)
    for ids in (IDS[:, :start], torch.cat([pad, IDS[:, :start]], 1), torch.cat([IDS[:, :start], pad], 1)):
        hidden, cache = model.prefill(ids, (ids != 0).long(), **INPUTS)
        assert (type(cache) is LatentCache) == (form == "latent")
        assert_equal(model.logits(hidden), full[:, start - 1])
        for place in range(start, LENGTH):
            hidden = model.decode(IDS[:, place], torch.ones(3, dtype=torch.bool), cache)
            assert_equal(model.logits(hidden), full[:, place])


@torch.no_grad()
def test_generation_without_a_cache_writes_the_same() -> None:
    model = model_of("latent")
    model.config = replace(model.config, eos_token_id=VOCABULARY + 1)
    written = model.generate(IDS, 5, attention_mask=torch.ones_like(IDS), **INPUTS)
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        assert IMAGE_ID not in ids[:, LENGTH:]
    assert torch.equal(written, ids[:, LENGTH:])


@forms
def test_the_loss_and_its_balance(form: str) -> None:
    """The value is that of the words; in training, gates also feel how unevenly they share out."""
    model = model_of(form)
    labels = IDS.masked_fill(IDS == IMAGE_ID, -100)
    plain = model(IDS, labels=labels, **INPUTS).loss
    expected = F.cross_entropy(
        logits(model)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_equal(plain, expected)
    gate = model.language_model.get_parameter("layers.1.mlp.gate.weight")
    (without,) = torch.autograd.grad(plain, gate)
    model.train()
    loss = model(IDS, labels=labels, **INPUTS).loss
    assert_equal(loss, plain)
    (with_balance,) = torch.autograd.grad(loss, gate)
    with record_routing() as routings:
        logits(model)
    balance = 0.001 * sum(balancing_loss(routing) for routing in routings)
    assert isinstance(balance, Tensor)
    (alone,) = torch.autograd.grad(balance, gate)
    assert alone.abs().max() > 0
    torch.testing.assert_close(with_balance, without + alone, atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_maps() -> None:
    """Every attention is recorded: of each view in the tower, and in the decoder."""
    model = model_of("latent")
    with record_attention() as maps:
        logits(model)
    assert [layer.shape for layer in maps] == [(8, 4, 49, 49)] * 2 + [(3, 4, LENGTH, LENGTH)] * 3


@torch.no_grad()
def test_bf16() -> None:
    model = model_of("heads")
    exact = logits(model)
    found = logits(model.bfloat16()).float()
    assert (found - exact).abs().median() < 0.05


def test_every_tensor_has_a_name_of_its_own() -> None:
    for form in FORMS:
        state = model_of(form).state_dict()
        named = as_in_file(state, LAYOUT)
        qkv = sum(3 - 1 for name in named if ".qkv." in name)
        assert len(named) + qkv == len(state)
        assert "view_seperator" in named  # so spelled in published files
        assert "language.model.layers.1.mlp.experts.7.down_proj.weight" in named
        assert "vision.blocks.1.attn.qkv.bias" in named


# Mistakes


def patch_by_patch(self: DownsampleProjector, x: Tensor) -> Tensor:
    x = F.pad(x, (0, 0, 0, 1, 0, 1)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return self.linear2(F.gelu(self.linear1(x.transpose(2, 3).flatten(3))))


def padded_above(self: DownsampleProjector, x: Tensor) -> Tensor:
    x = F.pad(x, (0, 0, 1, 0, 1, 0)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return self.linear2(F.gelu(self.linear1(x.permute(0, 1, 3, 5, 2, 4).flatten(3))))


def tanh_gelu(self: DownsampleProjector, x: Tensor) -> Tensor:
    x = F.pad(x, (0, 0, 0, 1, 0, 1)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    hidden = self.linear1(x.permute(0, 1, 3, 5, 2, 4).flatten(3))
    return self.linear2(F.gelu(hidden, approximate="tanh"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("forward", "least"), [(patch_by_patch, 0.3), (padded_above, 0.3), (tanh_gelu, 1e-4)]
)
def test_another_projector_differs(
    forward: Callable[..., Tensor], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DownsampleProjector, "forward", forward)
    model = model_of("heads")
    found = model.projector(model.vision_tower(VIEWS).unflatten(1, (7, 7)))
    assert difference(some_of(found), original("projected")) > least


def tiles_first(features: Tensor, newline: Tensor, separator: Tensor, grid: tuple[int, int]) -> Tensor:
    tokens = arrange(features, newline, separator, grid)
    whole = 4 * 5
    return torch.cat([tokens[whole + 1 :], tokens[whole : whole + 1], tokens[:whole]])


def tile_by_tile(features: Tensor, newline: Tensor, separator: Tensor, grid: tuple[int, int]) -> Tensor:
    tokens = arrange(features, newline, separator, grid)
    tiles = features[1:].flatten(0, 2)
    ends = newline.expand(len(tokens) - 21 - len(tiles), -1)
    return torch.cat([tokens[:21], tiles, ends])


def marks_changed(features: Tensor, newline: Tensor, separator: Tensor, grid: tuple[int, int]) -> Tensor:
    return arrange(features, separator, newline, grid)


def rows_for_columns(features: Tensor, newline: Tensor, separator: Tensor, grid: tuple[int, int]) -> Tensor:
    tokens = arrange(features, newline, separator, grid[::-1])
    tokens = F.pad(tokens, (0, 0, 0, 8))
    return tokens[: len(arrange(features, newline, separator, grid))]


arrange = arrange_views


@torch.no_grad()
@pytest.mark.parametrize("layout", [tiles_first, tile_by_tile, marks_changed, rows_for_columns])
def test_another_layout_differs(layout: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek_vl2, "arrange_views", layout)
    assert difference(some_of(logits(model_of("heads"))), original("heads")) > 0.1


# What does not fit


@torch.no_grad()
def test_inputs_that_do_not_fit() -> None:
    model = model_of("heads")
    with pytest.raises(InputError, match=r"there are 7 views, and grids of .*\(1, 2\)\] tiles .* need 8"):
        logits(model, pixel_values=VIEWS[:7])
    with pytest.raises(InputError, match="need 9, one for the whole"):
        logits(model, images_spatial_crop=torch.tensor([[2, 1], [1, 2], [1, 2]]))
    with pytest.raises(InputError, match="let the processor build both"):
        model.encode_image(VIEWS[:1], torch.tensor([[0, 1]]))
    with pytest.raises(InputError, match="159 image placeholders and the pictures give 98 image tokens"):
        logits(model, pixel_values=VIEWS[:5], images_spatial_crop=GRIDS[:2])
    with pytest.raises(InputError, match="pictures need pixel_values and images_spatial_crop"):
        model(IDS, pixel_values=VIEWS)
    with pytest.raises(InputError, match="159 image placeholders and the pictures give 0"):
        model(IDS)
    with pytest.raises(ValueError, match="attention_mask has a hole"):
        model(IDS, attention_mask=(IDS != 7).long().index_fill(1, torch.tensor([5]), 0), **INPUTS)
    assert SIDE == 28
