"""SimVLM has no published code. Held here is what its objective promises: who sees whom, what is learned."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal, noise, randomize
from miniatures import TINY_STEM, TINY_TEXT, tiny
from torch import Tensor

from minivlm.errors import InputError
from minivlm.models.miniatures.simvlm import RelativeAttention, SimVLM, cut_at_random
from minivlm.vision.clip_resnet import CLIPResNet, CLIPResNetConfig
from minivlm.vision.conv_stem import ConvStem, ConvStemConfig

IMAGE, N = 119, 9
WORDS = torch.tensor([[5, 17, 3, 99, 42, 8]])
ROW = torch.cat([torch.full((1, N), IMAGE), WORDS], dim=1)
PIXELS = noise(1, 3, 28, 28)
TYPES = torch.tensor([[0] * (N + 3) + [1] * 3])  # three words of prefix, three of suffix


@pytest.fixture
def model() -> SimVLM:
    system = randomize(tiny("simvlm"))
    assert isinstance(system, SimVLM)
    return system


@torch.no_grad()
def logits(model: SimVLM, row: Tensor = ROW, types: Tensor | None = TYPES) -> Tensor:
    return model(row, PIXELS, token_type_ids=types).logits[0]


def changed(place: int) -> Tensor:
    row = ROW.clone()
    row[0, place] = 77
    return row


def test_a_change_in_the_suffix_moves_nothing_before_it(model: SimVLM) -> None:
    for place in (N + 3, N + 4, N + 5):
        moved = (logits(model) - logits(model, changed(place))).abs().amax(dim=-1)
        assert not moved[:place].any()
        assert moved[place:].min() > 1e-3


def test_a_change_in_the_prefix_moves_everything(model: SimVLM) -> None:
    for place in (N, N + 1, N + 2):
        moved = (logits(model) - logits(model, changed(place))).abs().amax(dim=-1)
        assert moved.min() > 1e-3  # the patches too


def test_without_types_all_is_prefix(model: SimVLM) -> None:
    moved = (logits(model, types=None) - logits(model, changed(N + 5), types=None)).abs().amax(dim=-1)
    assert moved.min() > 1e-3


@torch.no_grad()
def test_patches_have_positions_apart_from_the_text(model: SimVLM) -> None:
    before = logits(model)
    model.language_model.embed_positions.weight[6:] = 0  # of six words, the last is at position 5
    assert torch.equal(logits(model), before)
    model.language_model.embed_positions.weight[5].neg_()
    moved = (logits(model) - before).abs().amax(dim=-1)
    assert not moved[:-1].any()
    assert moved[-1] > 1e-3


@torch.no_grad()
def test_offsets_are_counted_in_rows_and_columns() -> None:
    relative = RelativeAttention(1, N)
    relative.table.copy_(torch.arange(25.0)[None])  # (row + 2) * 5 + column + 2
    patches = torch.tensor([[0, 5, 8, N]])
    bias = relative(patches, patches)[0, 0]
    expected = [[12, 5, 0, 0], [19, 12, 7, 0], [24, 17, 12, 0], [0, 0, 0, 0]]  # 5 is at row 1, column 2
    assert bias.tolist() == expected


@torch.no_grad()
def test_offsets_move_the_scores_of_patches_alone(model: SimVLM) -> None:
    before, text = logits(model), model(WORDS).logits
    for relative in model.relative_attention:
        relative.table.mul_(-1)
    assert (logits(model) - before).abs().max() > 1e-3
    assert torch.equal(model(WORDS).logits, text)


@torch.no_grad()
def test_a_shift_of_all_patches_keeps_their_offsets() -> None:
    table = RelativeAttention(2, 16)
    torch.nn.init.normal_(table.table)
    first, second = torch.tensor([[0, 1, 5]]), torch.tensor([[5, 6, 10]])  # a row and a column further
    assert torch.equal(table(first, first), table(second, second))


def test_placeholders_after_text_are_refused(model: SimVLM) -> None:
    with pytest.raises(ValueError, match="9 image placeholders of a row have to come before its text"):
        model(ROW.roll(1, dims=1), PIXELS)


def rows() -> tuple[Tensor, Tensor]:
    """Five words after a picture of two places; four words; six words, padded on the left."""
    ids = torch.tensor([[IMAGE, IMAGE, 3, 4, 5, 6, 7], [3, 4, 5, 6, 0, 0, 0], [0, 3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] + [1] * 6])
    return ids, mask


def test_a_text_is_cut_in_two() -> None:
    ids, mask = rows()
    generator, firsts = torch.Generator().manual_seed(0), [set(), set(), set()]
    for _ in range(200):
        types, labels = cut_at_random(ids, mask, IMAGE, generator)
        for row in range(3):
            text = (mask[row].bool() & (ids[row] != IMAGE)).nonzero()[:, 0].tolist()
            suffix = types[row].nonzero()[:, 0].tolist()
            assert suffix
            assert suffix == text[-len(suffix) :]
            assert torch.equal(labels[row], ids[row].where(types[row].bool(), -100))
            firsts[row].add(suffix[0])
    assert firsts == [{2, 3, 4, 5, 6}, {1, 2, 3}, {2, 3, 4, 5, 6}]


def test_cuts_are_reproducible() -> None:
    first, again = (cut_at_random(*rows(), IMAGE, torch.Generator().manual_seed(4))[0] for _ in range(2))
    assert torch.equal(first, again)


def test_the_loss_is_the_suffixs(model: SimVLM) -> None:
    types, labels = cut_at_random(ROW, torch.ones_like(ROW), IMAGE, torch.Generator().manual_seed(1))
    output = model(ROW, PIXELS, token_type_ids=types, labels=labels)
    first = int(types[0].nonzero()[0])
    odds = output.logits[0].log_softmax(dim=-1)
    expected = -torch.stack([odds[place - 1, ROW[0, place]] for place in range(first, ROW.shape[1])]).mean()
    assert_equal(output.loss, expected)


@torch.no_grad()
def test_the_stem_is_the_front_of_a_resnet() -> None:
    stem = randomize(ConvStem(TINY_STEM))
    whole = randomize(CLIPResNet(CLIPResNetConfig((1, 1, 1, 1), 4, 32)))
    assert isinstance(stem, ConvStem)
    for stage, source in zip(stem.stages, whole.stages, strict=False):
        stage.load_state_dict(source.state_dict())
    x = torch.relu(stem.norm(stem.embeddings.patch_embedding(PIXELS)))
    for stage in whole.stages[:3]:
        x = stage(x)
    positions = stem.embeddings.position_embedding.weight
    assert_equal(stem(PIXELS), x.flatten(2).mT + positions)
    assert stem(PIXELS).shape == (1, TINY_STEM.num_patches, TINY_STEM.hidden_size)


@torch.no_grad()
@pytest.mark.parametrize(("size", "patch"), [(64, 8), (64, 16), (30, 8), (46, 16)])
def test_the_stem_has_one_vector_for_each_patch(size: int, patch: int) -> None:
    config = ConvStemConfig(layers=(1, 1, 1), width=4, image_size=size, patch_size=patch)
    assert ConvStem(config).eval()(noise(1, 3, size, size)).shape[1] == config.num_patches


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": (1, 1)}, r"a stem of \(1, 1\) blocks"),
        ({"patch_size": 14}, "patches of 14 pixels cannot be built: expected three stages, and 8 or 16"),
        ({"image_size": 31, "patch_size": 8}, "image_size 31 is odd"),
    ],
)
def test_other_stems_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ConvStemConfig(**settings)


def test_a_trained_gpt2_fills_all_but_the_stem(model: SimVLM) -> None:
    own = {name.split(".")[0] for name in model.state_dict() if not name.startswith("language_model.")}
    assert own == {"vision_tower", "projection", "relative_attention"}
    assert model.language_model.config == TINY_TEXT
