"""Measures of a model's internals: against naive loops, and in cases with known results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minivlm.looking import measures
from minivlm.looking.inspection import Inspection, inspect_answer
from minivlm.models.load import load
from minivlm.processing import load_picture

# Filters and positions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_components_rebuild_the_filters() -> None:
    filters = random(20, 3, 2, 2)
    components, shares = measures.filter_components(filters)
    assert components.shape == (12, 3, 2, 2)
    flat = components.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(12), atol=1e-5, rtol=0)
    centered = filters.flatten(1) - filters.flatten(1).mean(dim=0)
    torch.testing.assert_close(centered @ flat.T @ flat, centered, atol=1e-5, rtol=0)
    assert shares.sum().item() == pytest.approx(1)
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)
    variances = (centered @ flat.T).square().sum(dim=0)
    torch.testing.assert_close(shares, variances / variances.sum())


def test_filters_of_one_kind_have_one_component() -> None:
    """The mean of all filters is not a component: only differences from it are."""
    pattern, offset = random(1, 3, 4, 4), 5 * random(1, 3, 4, 4, seed=1)
    components, shares = measures.filter_components(offset + random(10, 1, 1, 1, seed=2) * pattern)
    assert shares[0].item() == pytest.approx(1)
    alike = (components[0].flatten() @ pattern.flatten()) / pattern.norm()
    assert abs(alike.item()) == pytest.approx(1, abs=1e-5)


def test_position_similarity() -> None:
    table = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    expected = [[1, 0, -1, half], [0, 1, 0, half], [-1, 0, 1, -half], [half, half, -half, 1]]
    torch.testing.assert_close(measures.position_similarity(table), torch.tensor(expected))


# Attention maps


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).softmax(dim=-1)


def naive_distance(weights: Tensor, side: int) -> list[float]:
    pictures, heads, patches, _ = weights.shape
    result = []
    for head in range(heads):
        total = 0.0
        for picture in range(pictures):
            for i in range(patches):
                for j in range(patches):
                    far = math.dist(divmod(i, side), divmod(j, side))
                    total += float(weights[picture, head, i, j]) * far
        result.append(total / pictures / patches)
    return result


def test_attention_distance_equals_loops() -> None:
    weights = random_maps(2, 3, 9, 9)
    assert measures.attention_distance(weights).tolist() == pytest.approx(
        naive_distance(weights, 3), rel=1e-5
    )


def test_attention_distance_of_known_heads() -> None:
    itself = torch.eye(16)
    to_the_right = torch.eye(16).roll(1, dims=1)  # the last of a row looks at the first of the next
    weights = torch.stack([itself, to_the_right, torch.full((16, 16), 1 / 16)])[None]
    own, right, evenly = measures.attention_distance(weights).tolist()
    assert own == 0
    turns = [math.dist((0, 3), (1, 0))] * 3 + [math.dist((3, 3), (0, 0))]
    assert right == pytest.approx((12 * 1 + sum(turns)) / 16)
    assert evenly == pytest.approx(measures.patch_distances(16).mean().item())


def test_distances_need_a_square_grid() -> None:
    with pytest.raises(ValueError, match="65 patches do not form a square grid"):
        measures.patch_distances(65)


def test_attention_entropy() -> None:
    weights = random_maps(2, 3, 4, 7)
    naive = [
        -sum(float(p) * math.log(float(p)) for p in weights[:, head].flatten()) / (2 * 4) for head in range(3)
    ]
    assert measures.attention_entropy(weights).tolist() == pytest.approx(naive, rel=1e-5)
    known = torch.stack([torch.eye(8), torch.full((8, 8), 1 / 8)])[None]  # zeros give no NaN
    assert measures.attention_entropy(known).tolist() == pytest.approx([0, math.log(8)], abs=1e-6)


def naive_rollout(maps: list[Tensor]) -> Tensor:
    pictures, heads, size, _ = maps[0].shape
    result = torch.zeros(pictures, size, size)
    for picture in range(pictures):
        flow = [[float(i == j) for j in range(size)] for i in range(size)]
        for layer in maps:
            step = [
                [
                    0.5 * sum(float(layer[picture, h, i, j]) for h in range(heads)) / heads + 0.5 * (i == j)
                    for j in range(size)
                ]
                for i in range(size)
            ]
            flow = [
                [sum(step[i][m] * flow[m][j] for m in range(size)) for j in range(size)] for i in range(size)
            ]
        result[picture] = torch.tensor(flow)
    return result


def test_rollout_equals_loops() -> None:
    maps = [random_maps(2, 3, 4, 4, seed=layer) for layer in range(3)]
    rolled = measures.attention_rollout(maps)
    torch.testing.assert_close(rolled, naive_rollout(maps), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rolled.sum(dim=-1), torch.ones(2, 4))


def test_rollout_goes_from_the_first_layer_to_the_last() -> None:
    """Token 1 reads token 0 in the first layer, token 2 reads token 1 in the second: a path from 0 to 2."""
    first, second = torch.eye(3), torch.eye(3)
    first[1], second[2] = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    there = measures.attention_rollout([first[None, None], second[None, None]])[0]
    assert there[2].tolist() == [0.25, 0.25, 0.5]
    other_way = measures.attention_rollout([second[None, None], first[None, None]])[0]
    assert other_way[2].tolist() == [0, 0.5, 0.5]


# Image tokens


def test_nearest_words() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 9.0], [1.0, 1.0], [0.0, 0.0]])  # a row of zeros gives no NaN
    cosines, ids = measures.nearest_words(torch.tensor([[5.0, 1.0], [-0.1, 3.0]]), table, k=2)
    assert ids.tolist() == [[0, 2], [1, 2]]
    expected = [[5 / math.sqrt(26), 6 / math.sqrt(52)], [3 / math.sqrt(9.01), 2.9 / math.sqrt(18.02)]]
    torch.testing.assert_close(cosines, torch.tensor(expected))


def test_a_word_is_nearest_to_itself_however_long_it_is() -> None:
    table = random(30, 8) * torch.linspace(0.1, 10, 30)[:, None]
    cosines, ids = measures.nearest_words(3 * table, table)
    assert ids[:, 0].tolist() == list(range(30))
    torch.testing.assert_close(cosines[:, 0], torch.ones(30))


# Occlusion


def test_hidden_patches_get_the_color_of_the_ground() -> None:
    picture = torch.full((2, 6, 6), 0.25)
    picture[1] = -0.5
    picture[:, 2:4, 4:6] = 1.0  # patch 5 of a grid of 3 x 3
    hidden = measures.hide_patches(picture, [5], patch_size=2)
    assert picture[0, 2, 4] == 1  # a copy
    assert (hidden[0] == 0.25).all()
    assert (hidden[1] == -0.5).all()
    assert torch.equal(measures.hide_patches(picture, torch.tensor([0, 4]), 2), picture)


@pytest.mark.parametrize(("reach", "expected"), [(0, {5}), (1, {1, 2, 4, 5, 7, 8})])
def test_occlusion_finds_what_the_score_reads(reach: int, expected: set[int]) -> None:
    picture = torch.zeros(3, 6, 6)
    picture[:, 2:4, 4:6] = 1.0
    sizes = []

    def score(pictures: Tensor) -> Tensor:
        sizes.append(len(pictures))
        return pictures.sum(dim=(1, 2, 3))

    drops = measures.occlusion(score, picture, patch_size=2, reach=reach, batch=4)
    assert {i for i, drop in enumerate(drops.tolist()) if drop > 0} == expected
    assert set(drops.tolist()) == {0.0, 12.0}
    assert max(sizes) == 4
    assert sum(sizes) == 10


def test_occlusion_is_negative_where_hiding_helps() -> None:
    picture = torch.zeros(1, 4, 4)
    picture[:, :2, :2] = 1.0
    assert measures.occlusion(lambda p: -p.sum(dim=(1, 2, 3)), picture, 2).tolist() == [-4, 0, 0, 0]


def test_log_odds() -> None:
    logits = random(2, 3, 11)
    ids = torch.tensor([[0, 5, 10], [3, 3, 1]])
    p = logits.double().softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(
        measures.log_odds(logits, ids).double(), (p / (1 - p)).log(), atol=1e-5, rtol=0
    )
    sure = torch.tensor([[60.0, 0.0]])  # the probability is 1 in fp32, but the log-odds are finite
    assert measures.log_odds(sure, torch.tensor([0])).tolist() == [60]


# What is recorded while a model answers


@pytest.fixture(scope="module")
def seen() -> Inspection:
    model, processor = load()
    return inspect_answer(
        model, processor, load_picture("figures/samples/scene_6.png"), "detect cyan triangle"
    )


def test_the_inspected_answer_is_the_usual_one(seen: Inspection) -> None:
    model, processor = load()
    inputs = processor(["figures/samples/scene_6.png"], ["detect cyan triangle"])
    assert seen.answer == processor.decode(model.generate(**inputs))[0]
    assert seen.words[:4] == [f"<loc{digits}>" for digits in ("0681", "0216", "0915", "0482")]
    assert seen.words[4:] == ["cyan", "triangle"]
    torch.testing.assert_close(seen.image_tokens, model.encode_image(inputs["pixel_values"])[0])


def test_shapes_and_sums(seen: Inspection) -> None:
    assert seen.tower.shape == (3, 3, 64, 64)
    assert seen.attention.shape == (6, 4, 4, 64)
    assert seen.rollout.shape == (6, 64)
    torch.testing.assert_close(seen.tower.sum(dim=-1), torch.ones(3, 3, 64))
    for shares in (seen.attention.sum(dim=-1), seen.rollout.sum(dim=-1)):  # the rest looks at words
        assert (shares > 0).all()
        assert (shares <= 1.00001).all()
    assert (seen.attention.sum(dim=-1) < 0.9).any()


def test_sureness_is_that_of_the_full_forward_pass(seen: Inspection) -> None:
    """And the attention rows are those of the positions that write the words."""
    from minivlm.attention import record_attention

    model, processor = load()
    inputs = processor(["figures/samples/scene_6.png"], ["detect cyan triangle"], [seen.answer])
    with torch.no_grad(), record_attention() as maps:
        logits = model(**inputs).logits[0, :-1]
    writers = (inputs["labels"][0, 1:] != -100).nonzero()[:-1, 0]  # without that of <eos>
    written = inputs["labels"][0, 1:][writers]
    expected = measures.log_odds(logits[writers], written).sum()
    torch.testing.assert_close(
        seen.sureness(inputs["pixel_values"])[0], expected, atol=1e-3, rtol=1e-4, check_stride=False
    )
    for layer in range(4):
        torch.testing.assert_close(
            seen.attention[:, layer].transpose(0, 1), maps[3 + layer][0, :, writers, :64], atol=1e-5, rtol=0
        )
    through = measures.attention_rollout(maps[3:])[0, writers, :64] @ measures.attention_rollout(maps[:3])[0]
    torch.testing.assert_close(seen.rollout, through, atol=1e-5, rtol=0)


def test_an_empty_answer_is_inspected_as_the_word_that_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivlm.models.paligemma import PaliGemma

    model, processor = load()
    eos = torch.tensor([[model.config.eos_token_id]])
    monkeypatch.setattr(PaliGemma, "generate", lambda *args, **options: eos)
    nothing = inspect_answer(model, processor, load_picture("figures/samples/scene_6.png"), "caption en")
    assert nothing.answer == ""
    assert nothing.words == ["<eos>"]
    assert nothing.attention.shape[0] == 1
