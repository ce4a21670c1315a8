"""Checks for 03_attention: heads, a mask, who reaches whom, a pooling head, a broken tower, the cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.attention import Attention, attend, attend_plain
from minivlm.checks import NotYet, call, expect, expect_tensor, right, same
from minivlm.layers import MLP, EncoderBlock
from minivlm.models.load import load
from minivlm.vision.siglip import SiglipVisionModel

Layer = Callable[[Tensor], Tensor]


class solutions:
    """The reference solutions, which the notebook's catch-up cells use."""

    @staticmethod
    def multi_head(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """q, k, v [B, N, D] -> [B, N, D], all heads at once."""
        q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    @staticmethod
    def window_mask(grid: int, radius: int) -> Tensor:
        """Patches of a grid x grid picture see those at most `radius` rows and columns away: [N, N]."""
        number = torch.arange(grid * grid)
        row, column = number // grid, number % grid
        near_rows = (row[:, None] - row[None, :]).abs() <= radius
        near_columns = (column[:, None] - column[None, :]).abs() <= radius
        return near_rows & near_columns

    @staticmethod
    def reach() -> dict[str, int]:
        """How many of 16 outputs move when token 8 is pushed."""
        return {
            "LayerNorm": 1,
            "BatchNorm, in training": 16,
            "MLP": 1,
            "attention": 16,
            "attention, causal": 8,
            "attention, window": 6,
            "two attentions, window": 12,
        }

    @staticmethod
    def pooling_head(tokens: Tensor, probe: Tensor, attention: Attention, norm: Layer, mlp: Layer) -> Tensor:
        """tokens [B, N, D], probe [1, 1, D] -> [B, D]."""
        q, k, v = attention.q_proj(probe), attention.k_proj(tokens), attention.v_proj(tokens)
        q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT / attention.head_dim**0.5).softmax(dim=-1)  # [B, H, 1, N]
        x = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))  # [B, 1, D]
        return (x + mlp(norm(x)))[:, 0]

    @staticmethod
    def find_the_bug(
        patient: SiglipVisionModel, tower: SiglipVisionModel, pixel_values: Tensor
    ) -> tuple[int, str]:
        """The first block whose output differs, and the mistake that makes the same difference."""
        right_states, states = list(tower.hidden_states(pixel_values)), patient.hidden_states(pixel_values)
        pairs = zip(states, right_states, strict=True)
        block = [same(ours, theirs, 1e-3) for ours, theirs in pairs].index(False)
        x = right_states[block - 1]
        for name, block_class in BROKEN.items():
            suspect = copy.deepcopy(tower.layers[block - 1])
            suspect.__class__ = block_class
            if same(suspect(x), patient.layers[block - 1](x), 1e-3):
                return block, name
        raise LookupError("none of the four mistakes")

    @staticmethod
    def block_operations(num_tokens: int, hidden_size: int, intermediate_size: int) -> int:
        """Multiplications and additions of one encoder block for one picture."""
        projections = 4 * num_tokens * hidden_size**2
        scores_and_sum = 2 * num_tokens**2 * hidden_size
        mlp = 2 * num_tokens * hidden_size * intermediate_size
        return 2 * (projections + scores_and_sum + mlp)


def multi_head(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Exercise 1: all heads at once."""
    q, k, v = torch.randn(3, 2, 5, 12, generator=_seeded()).unbind()
    with _Calls() as few:
        result = call(answer, q.clone(), k.clone(), v.clone(), 3)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, 4)).transpose(1, 2)

    def merged(out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)

    def weighted(split: Layer, scale: float = 4**-0.5, dim: int = -1) -> Tensor:
        return (split(q) @ split(k).mT * scale).softmax(dim=dim) @ split(v)

    across = (
        "the softmax runs over the wrong axis: each row of scores, all keys of one query, is the last axis"
    )
    cut_across = (
        "a plain reshape to [B, H, N, Dh] cuts across tokens, so that a head gets pieces of several: split "
        "the last axis into [H, Dh] first, then swap the token and head axes"
    )
    strided = "each head takes every third number: head h should take the slice h * Dh : (h + 1) * Dh"
    viewed = weighted(lambda x: x.reshape(2, 3, 5, 4))
    thirds = weighted(lambda x: x.unflatten(-1, (4, 3)).permute(0, 3, 1, 2))
    for wrong, hint in (
        (
            merged(weighted(heads, scale=12**-0.5)),
            "the scores are divided by the square root of D, the width of the model: each dot product has "
            "only Dh = D / num_heads terms",
        ),
        (merged(weighted(heads, 1.0)), "the scores are not divided by the square root of the head width"),
        (merged(weighted(heads, 1 / 4)), "the scores are divided by Dh: divide by its square root"),
        (merged(weighted(heads, 2.0)), "the scores are multiplied by the square root of Dh: divide by it"),
        (
            merged(weighted(heads, 3**-0.5)),
            "the scores are divided by the root of the number of heads: a dot product has Dh terms",
        ),
        (merged(weighted(heads, dim=-2)), across),
        (merged(weighted(heads, dim=1)), across),
        (merged(heads(q) @ heads(k).mT / 2 @ heads(v)), "the softmax is missing: scores are not weights yet"),
        (
            weighted(heads).reshape(2, 5, 12),
            "the heads are right, but merged without swapping back: move the head axis after the token axis "
            "before you flatten",
        ),
        (
            weighted(lambda x: x.unflatten(-1, (3, 4))).flatten(2),
            "here the heads of one token attend to each other: the last two axes of q, k and v have to be "
            "tokens and Dh, so swap the token and head axes after you cut",
        ),
        (viewed.reshape(2, 5, 12), cut_across),
        (merged(viewed), cut_across),
        (merged(thirds), strided),
        (thirds.permute(0, 2, 3, 1).flatten(2), strided),
        (
            weighted(lambda x: x[:, None], scale=12**-0.5)[:, 0],
            "this is one head of the full width: `num_heads` is not used",
        ),
    ):
        expect(not same(result, wrong), hint)
    expect_tensor(result, solutions.multi_head(q, k, v, 3))
    with _Calls() as many:
        with_six = call(answer, q.clone(), k.clone(), v.clone(), 6)
    expect_tensor(with_six, solutions.multi_head(q, k, v, 6), "the result with six heads")
    expect(
        not {"scaled_dot_product_attention", "multi_head_attention_forward"} & set(few.names),
        "right, but PyTorch's own attention did the work: write the two products and the softmax yourself",
    )
    expect(
        len(many.names) <= len(few.names),
        f"right, but with a loop: three heads take {len(few.names)} calls of PyTorch, six take "
        f"{len(many.names)}. Make the heads an axis, and one product does all of them",
    )
    right("all heads at once equal a loop over heads: two reshapes and a swap of axes replace the loop.")


def window_mask(answer: Callable[[int, int], Tensor]) -> None:
    """Exercise 2: a mask on the grid."""
    grid, radius = 5, 1
    result = call(answer, grid, radius)
    expected = solutions.window_mask(grid, radius)
    expect(isinstance(result, Tensor), f"the mask should be a tensor, but it is a {type(result).__name__}")
    expect(
        result.dtype == torch.bool,
        f"the mask should be boolean, but it is {result.dtype}: a mask of numbers would be added to the "
        "scores",
    )
    expect(
        tuple(result.shape) == tuple(expected.shape),
        f"the mask has shape {list(result.shape)}, expected [N, N] = {list(expected.shape)}: one row for "
        "each patch that looks, one column for each patch it may see",
    )
    number = torch.arange(grid * grid)
    rows = (number[:, None] // grid - number // grid).abs()
    columns = (number[:, None] % grid - number % grid).abs()
    for wrong, hint in (
        (~expected, "the mask is inverted: True means that a patch may look"),
        (
            (number[:, None] - number).abs() <= radius,
            "these are neighbors in the sequence: the patch below is `grid` positions away, and the end of "
            "a row is not next to the start of the next. Compare rows and columns",
        ),
        (
            (rows < radius) & (columns < radius),
            "a patch that is exactly `radius` away is left out: use <= instead of <",
        ),
        (
            (rows <= radius) | (columns <= radius),
            "this is a cross as wide as the picture: both the row *and* the column have to be near",
        ),
        (
            rows + columns <= radius,
            "the diagonal neighbors are missing: limit rows and columns separately, not their sum",
        ),
        (rows <= radius, "the columns are not compared: these are whole rows of the picture"),
        (columns <= radius, "the rows are not compared: these are whole columns of the picture"),
    ):
        expect(not torch.equal(result, wrong), hint)
    different = (result != expected).nonzero()
    first = different[0].tolist() if len(different) else []
    expect(
        not first,
        f"{len(different)} entries are wrong, the first at query and key {first}: write down row and column "
        "of both patches and compare each with the radius",
    )
    expect(
        same(call(answer, 4, 2), solutions.window_mask(4, 2)),
        "the mask is right for 5 x 5 patches and radius 1, and wrong for 4 x 4 and radius 2: use the two "
        "arguments, and no numbers of your own",
    )
    right("a patch in the middle sees 9 patches, a corner 4, and the mask is symmetric.")


def reach(answer: Callable[[], dict[str, int]]) -> None:
    """Exercise 3: who moves when token 8 is pushed, predicted, then measured."""
    predicted, measured = call(answer), _measured_reach()
    expect(isinstance(predicted, dict), "return a dict: the name of each part, and a number of outputs")
    missing = [name for name in measured if name not in predicted]
    expect(not missing, f"there is no prediction for {', '.join(missing)}")
    wrong = []
    for name, moved in measured.items():
        said = predicted[name]
        if said != moved:
            why = WHY.get((name, said if isinstance(said, int) else None), WHY[name, None])
            wrong.append(f"{name}: you say {said}, measured {moved}. {why}")
    expect(not wrong, f"{len(wrong)} of {len(measured)} differ from the measurement.\n" + "\n".join(wrong))
    right(
        "attention and BatchNorm carry news from token to token; LayerNorm and the MLP keep it where it is."
    )


_STAYS = "It reads the numbers of one token and nothing else"
# What a prediction gets wrong; None stands for any other number.
WHY: dict[tuple[str, int | None], str] = {
    ("LayerNorm", None): f"{_STAYS}: mean and variance are taken over the features of each token",
    (
        "BatchNorm, in training",
        1,
    ): "That is LayerNorm. BatchNorm's mean and variance of a feature run over all "
    "tokens: one of them moves, and every token is shifted and scaled differently",
    (
        "BatchNorm, in training",
        None,
    ): "A feature's mean and variance run over all 16 tokens, so all of them move",
    ("MLP", None): f"{_STAYS}: the same two layers are applied to each token alone",
    ("attention", 1): "Token 8 also changes its key and its value, and every query looks at all keys",
    ("attention", 15): "Token 8 itself moves as well: its query has changed, and its value",
    ("attention", None): "Every query looks at every key, and one of the keys has changed",
    ("attention, causal", 9): "9 tokens (0 to 8) are what token 8 can *see*. Asked is who sees token 8",
    ("attention, causal", 7): "You left out token 8: a token sees itself, too",
    ("attention, causal", 16): "The mask hides token 8 from the tokens before it",
    ("attention, causal", None): "Token i sees j <= i, so token 8 is seen by the tokens 8 to 15",
    (
        "attention, window",
        9,
    ): "A window has 9 patches in the middle of the picture. Token 8 is row 2, column 0, at the left edge",
    ("attention, window", 3): "Rows count as well: patches of rows 1, 2 and 3 see token 8",
    ("attention, window", None): "Token 8 is row 2, column 0. Rows 1 to 3 and columns 0 to 1 are near it",
    (
        "two attentions, window",
        6,
    ): "The second attention passes on what the first has brought: a neighbor of a neighbor moves, too",
    (
        "two attentions, window",
        16,
    ): "Two windows of radius 1 reach two columns far, and column 3 is three away",
    (
        "two attentions, window",
        36,
    ): "There are 16 tokens. Two windows reach two rows and two columns far, and "
    "the edges of the picture cut off the rest",
    (
        "two attentions, window",
        None,
    ): "Two windows of radius 1 reach as far as one of radius 2: rows 0 to 3 and columns 0 to 2",
}


def _measured_reach() -> dict[str, int]:
    generator = _seeded()
    attention, mlp, norm = Attention(24, 3, bias=True), MLP(24, 96), nn.BatchNorm1d(24)
    for module in (attention, mlp):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator).requires_grad_(False)
    tokens = torch.randn(1, 16, 24, generator=generator)
    causal, window = torch.ones(16, 16, dtype=torch.bool).tril(), solutions.window_mask(4, 1)
    parts: tuple[Layer, ...] = (
        nn.LayerNorm(24),
        lambda x: norm(x.flatten(0, 1)).view_as(x),
        mlp,
        attention,
        lambda x: attention(x, causal),
        lambda x: attention(x, window),
        lambda x: attention(attention(x, window), window),
    )
    pushed = tokens.clone()
    pushed[:, 8] += torch.randn(24, generator=generator)
    with torch.no_grad():
        moved = [int(((part(pushed) - part(tokens)).abs().amax(-1) > 1e-7).sum()) for part in parts]
    return dict(zip(solutions.reach(), moved, strict=True))


def pooling_head(answer: Callable[[Tensor, Tensor, Attention, Layer, Layer], Tensor]) -> None:
    """Exercise 4: one learned query looks at all patches."""
    tokens, norm, attention, _, mlp = _block_parts()
    probe = torch.randn(1, 1, 8, generator=_seeded(1))
    with _Calls() as calls:
        result = call(answer, tokens.clone(), probe, attention, norm, mlp)
    looked = _looks(probe, tokens, attention)

    def rest(x: Tensor) -> Tensor:
        return (x + mlp(norm(x)))[:, 0]

    whole = attention(tokens)
    unprojected = probe.expand(2, 1, 8) - attention.q_proj.bias
    raw = torch.linalg.solve(attention.q_proj.weight, unprojected.mT).mT
    for wrong, hint in (
        (
            rest(looked + probe),
            "the probe is added to what it has collected: SigLIP's residual sum starts *after* attention",
        ),
        (looked[:, 0], "the MLP is missing: what attention returns still goes through x + mlp(norm(x))"),
        (mlp(norm(looked))[:, 0], "the residual around the MLP is missing: x + mlp(norm(x))"),
        ((looked + mlp(looked))[:, 0], "the MLP reads x without a norm"),
        (
            (norm(looked) + mlp(norm(looked)))[:, 0],
            "the residual starts from the normalized x: add the MLP's output to x itself",
        ),
        (norm(looked + mlp(looked))[:, 0], "this is post-norm: the norm stands before the MLP"),
        (
            rest(_looks(tokens, probe, attention).mean(dim=1, keepdim=True)),
            "the roles are exchanged: the query comes from the probe, keys and values from the tokens",
        ),
        (
            rest(whole.mean(dim=1, keepdim=True)),
            "this is the mean of a self-attention over the patches: the probe has no part in it",
        ),
        (
            rest(attention(torch.cat([probe.expand(2, 1, 8), tokens], dim=1))[:, :1]),
            "the probe is one of the keys here, as a class token would be: it only asks, and nobody sees it",
        ),
        (
            rest(_looks(probe, norm(tokens), attention)),
            "the tokens are normalized twice: the tower ended with a norm",
        ),
        (
            rest(_looks(probe, tokens, attention, scale=8**-0.5)),
            "the scale is the width's: divide by the root of head_dim",
        ),
        (
            rest(_looks(probe, tokens, attention, scale=1.0)),
            "the scores are not divided by the root of head_dim",
        ),
        (
            rest(_looks(probe, tokens, attention, heads=1)),
            "this is one head of the full width: cut q, k and v into heads of `attention.head_dim`",
        ),
        (
            rest(_looks(probe, tokens, attention, project=False)),
            "o_proj is missing: it mixes what the heads found",
        ),
        (
            rest(_looks(raw, tokens, attention)),
            "the probe is used as the query as it is: it goes through q_proj first",
        ),
        (
            rest(attention.o_proj(attention.v_proj(tokens).mean(dim=1, keepdim=True))),
            "every patch has the same weight here: the scores, or their softmax, are missing",
        ),
    ):
        expect(not same(result, wrong), hint)
    expect(
        not isinstance(result, Tensor) or result.shape != (2, 1, 8),
        "the result is [B, 1, D]: there is one query, so take its one token, [:, 0]",
    )
    expect_tensor(result, solutions.pooling_head(tokens, probe, attention, norm, mlp))
    expect(
        "scaled_dot_product_attention" not in calls.names,
        "right, but `attend` or PyTorch's function did the work: write the products and the softmax yourself",
    )
    shuffled = call(answer, tokens.flip(1), probe, attention, norm, mlp)
    expect_tensor(shuffled, result, "the result for the same tokens in another order")
    right("one query, all patches: the same vector in whatever order the patches come.")


def _looks(
    asks: Tensor,
    tokens: Tensor,
    attention: Attention,
    scale: float | None = None,
    heads: int = 2,
    project: bool = True,
) -> Tensor:
    """What the pooling head's attention returns, and what it returns with a mistake in it."""
    wide = (attention.q_proj(asks), attention.k_proj(tokens), attention.v_proj(tokens))
    rows = max(len(asks), len(tokens))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2).expand(rows, -1, -1, -1) for x in wide)
    out = attend_plain(q, k, v, None, scale or q.shape[-1] ** -0.5).transpose(1, 2).flatten(2)
    return attention.o_proj(out) if project else out


class _NormalizedResidual(EncoderBlock):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.layer_norm1(x)
        x = self.layer_norm2(x + self.self_attn(x, mask))
        return x + self.mlp(x)


class _PostNorm(EncoderBlock):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.layer_norm1(x + self.self_attn(x, mask))
        return self.layer_norm2(x + self.mlp(x))


class _ScaledByWidth(EncoderBlock):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        a, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (a._heads(projection(y)) for projection in (a.q_proj, a.k_proj, a.v_proj))
        out = attend(q, k, v, mask, x.shape[-1] ** -0.5)
        x = x + a.o_proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.layer_norm2(x))


class _Causal(EncoderBlock):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril())


BROKEN: dict[str, type[EncoderBlock]] = {
    "normalized residual": _NormalizedResidual,
    "post-norm": _PostNorm,
    "scaled by width": _ScaledByWidth,
    "causal": _Causal,
}
_BLOCK, _MISTAKE = 2, "scaled by width"


def patient(tower: SiglipVisionModel) -> SiglipVisionModel:
    """A copy of the tower with its weights, and one of four mistakes in one of its blocks."""
    changed = SiglipVisionModel(tower.config).requires_grad_(False)
    changed.load_state_dict(tower.state_dict())
    block: Any = changed.layers[_BLOCK - 1]
    block.forward = partial(BROKEN[_MISTAKE].forward, block)
    return changed


def find_the_bug(
    answer: Callable[[SiglipVisionModel, SiglipVisionModel, Tensor], tuple[int, str]],
) -> None:
    """Exercise 5: which block of the patient, and which of the four mistakes."""
    tower = load()[0].vision_tower
    size = tower.config.image_size
    pixel_values = torch.rand(2, 3, size, size, generator=_seeded()) * 2 - 1
    result = call(answer, patient(tower), tower, pixel_values)
    expect(
        isinstance(result, tuple | list) and len(result) == 2,
        "return two things: the number of the block, and the name of the mistake",
    )
    block, name = result
    block = block.item() if hasattr(block, "item") else block
    expect(
        isinstance(block, int) and not isinstance(block, bool),
        f"the first thing is the number of the block, 1, 2 or 3, but it is {block!r}",
    )
    layers = len(tower.layers)
    expect(1 <= block <= layers, f"blocks are counted from 1 to {layers}: there is no block {block}")
    expect(
        name in BROKEN,
        f"the name should be one of {', '.join(map(repr, BROKEN))}, but it is {name!r}",
    )
    states, right_states = (
        [state.norm(dim=-1).mean().item() for state in one.hidden_states(pixel_values)]
        for one in (patient(tower), tower)
    )
    expect(
        block >= _BLOCK,
        f"if block {block} were broken, the tokens after it would differ from the right tower's. Compare the "
        "two lists of hidden_states: number 0 is the patch embeddings, number 1 what leaves block 1",
    )
    expect(
        block <= _BLOCK,
        f"block {block} only passes on what it got: if it were the broken one, the tokens that enter it "
        "would still be right. Take the *first* difference",
    )
    symptoms = {
        "causal": "with a causal block, pushing the last patch would leave the first patch where it is, and "
        "in the patient the first patch moves",
        "post-norm": "post-norm would end the block with a LayerNorm. Set the tokens' length after the block "
        f"beside the right tower's: {states[_BLOCK]:.0f} against {right_states[_BLOCK]:.0f}: no norm cut it",
        "normalized residual": "with a norm on the line of x, the block's output would no longer contain its "
        "input: take the cosine of both. In the patient it is nearly as high as in the right tower",
    }
    expect(name == _MISTAKE, f"the block is right, the mistake is not: {symptoms.get(name)}")
    right(
        "a reference finds the block, and building each suspect finds the mistake: no answer had to be read."
    )


def block_operations(answer: Callable[[int, int, int], int]) -> None:
    """Exercise 5: what a block costs."""
    tokens, width, inner = 11, 6, 26
    result = call(answer, tokens, width, inner)
    try:
        result = float(result)
    except (TypeError, ValueError) as error:
        raise NotYet(f"the result should be a number, but it is a {type(result).__name__}") from error
    projections, products, mlp = tokens * width**2, tokens**2 * width, tokens * width * inner
    expected = solutions.block_operations(tokens, width, inner)
    for wrong, hint in (
        (
            expected / 2,
            "only the multiplications are counted: each one is followed by an addition, so multiply by 2",
        ),
        (
            2 * (3 * projections + 2 * products + 2 * mlp),
            "three projections of attention are counted, and there are four: queries, keys, values, output",
        ),
        (
            2 * (4 * projections + products + 2 * mlp),
            "one product of N x N is counted, and there are two: the scores and the weighted sum of values",
        ),
        (
            2 * (4 * projections + 2 * products + mlp),
            "one layer of the MLP is counted, and there are two",
        ),
        (
            2 * (4 * projections + 2 * mlp),
            "the scores and the weighted sum are missing: they are what grows with the square of N",
        ),
        (
            2 * (4 * projections + 2 * tokens**2 + 2 * mlp),
            "each of the N x N scores is a dot product: over all heads together it has D terms, and so has "
            "the weighted sum",
        ),
        (
            2 * (4 * projections + 2 * products + 2 * tokens * inner**2),
            "the MLP is counted with M x M matrices: it goes from D to M and back, D x M each",
        ),
        (2 * (4 * projections + 2 * products), "the MLP is missing"),
        (2 * (2 * products + 2 * mlp), "the four projections of attention are missing"),
        (
            2 * (4 * projections + 2 * products + 8 * projections),
            "the MLP is counted with an inner width of 4 D: use intermediate_size, which may differ",
        ),
    ):
        expect(abs(result - wrong) > 0.5, hint)
    expect(abs(result - expected) < 0.5, f"for N = 11, D = 6, M = 26 you count {result:.0f}, not {expected}")
    larger = solutions.block_operations(576, 768, 3072)
    expect(
        abs(float(call(answer, 576, 768, 3072)) - larger) < 0.5,
        "right for one size only: is there a constant where N, D or M should be?",
    )
    right("projections and MLP grow with N, scores and weighted sum with the square of N.")


class _Calls(TorchFunctionMode):
    """The names of PyTorch's functions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _block_parts() -> tuple[Tensor, nn.LayerNorm, Attention, nn.LayerNorm, MLP]:
    """x and the four parts of a block, with weights large enough that every mistake shows."""
    generator = _seeded()
    norm1, norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
    attention, mlp = Attention(8, num_attention_heads=2, bias=True), MLP(8, 16)
    for module in (norm1, norm2, attention, mlp):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator).requires_grad_(False)
    return 3 * torch.randn(2, 5, 8, generator=generator) + 1, norm1, attention, norm2, mlp
