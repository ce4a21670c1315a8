"""MLPs in pieces: the same results, never more than a piece at a time, and all at once with gradients."""

import copy

import pytest
import torch
from helpers import tiny_paligemma
from torch import Tensor, nn

from minivlm.layers import ACTIVATIONS, MLP, GatedMLP, SwiGLU
from minivlm.speed import pieces
from minivlm.speed.pieces import GatedMLPInPieces, MLPInPieces, SwiGLUInPieces, in_pieces
from minivlm.speed.replacing import replace_modules, replaced


@pytest.mark.parametrize("length", [1, 300, 600, 1000])
def test_pieces_agree_with_the_whole(length: int):
    torch.manual_seed(0)
    layer, sizes = MLP(8, 16), []
    layer.register_forward_hook(lambda module, args, out: sizes.append(len(args[0].flatten(0, -2))))
    x = torch.randn(2, length, 8)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(layer, x), layer(x))
    assert max(sizes[:-1]) <= 1.5 * pieces.TOKENS_PER_PIECE
    assert min(sizes[:-1]) >= min(2 * length, pieces.TOKENS_PER_PIECE // 2)  # no small piece is left over
    sizes.clear()
    in_pieces(layer, x)
    assert sizes == [2 * length]  # with gradients, everything is kept anyway


@pytest.mark.parametrize(
    ("plain", "cut"), [(MLP, MLPInPieces), (GatedMLP, GatedMLPInPieces), (SwiGLU, SwiGLUInPieces)]
)
def test_a_replaced_mlp_works_in_pieces(
    plain: type[MLP], cut: type[MLPInPieces], monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    mlp, x = plain(8, 16), torch.randn(3, 400, 8)
    expected, names = mlp(x), list(mlp.state_dict())
    sizes: list[int] = []
    right = cut.at_once

    def watched(self: MLPInPieces, piece: Tensor) -> Tensor:
        sizes.append(len(piece))
        return right(self, piece)

    monkeypatch.setattr(cut, "at_once", watched)
    mlp = replaced(mlp, cut)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
    assert len(sizes) == 5
    assert sum(sizes) == 1200
    assert list(mlp.state_dict()) == names


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_long_where_products_are_fast(
    amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "has_amx", lambda: amx)
    sizes: list[int] = []
    with torch.no_grad():
        in_pieces(lambda piece: sizes.append(len(piece)) or piece, torch.zeros(1, 4096, 8, dtype=dtype))
    assert sizes == ([2048] * 2 if amx and dtype == torch.bfloat16 else [256] * 16)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_in_place_is_the_same_to_the_bit(act: str):
    """And what was given stays as it was."""
    torch.manual_seed(0)
    mlps: list[tuple[nn.Module, type[nn.Module]]] = [
        (MLP(8, 16, act), MLPInPieces),
        (GatedMLP(8, 16), GatedMLPInPieces),
        (SwiGLU(8, 16), SwiGLUInPieces),
    ]
    x = torch.randn(2, 5, 8)
    before = x.clone()
    for mlp, cut in mlps:
        fast = replaced(copy.deepcopy(mlp), cut)
        with torch.no_grad():
            assert torch.equal(fast(x), mlp(x))
        assert torch.equal(x, before)
        fast(x).sum().backward()
        mlp(x).sum().backward()
        for ours, wanted in zip(fast.parameters(), mlp.parameters(), strict=True):
            assert ours.grad is not None
            assert wanted.grad is not None
            assert torch.equal(ours.grad, wanted.grad)


def test_in_place_needs_no_more_room():
    """The gate is written into the memory of its product."""
    mlp, places = replaced(SwiGLU(8, 16), SwiGLUInPieces), []
    mlp.gate_proj.register_forward_hook(lambda module, given, out: places.append(out.data_ptr()))
    mlp.down_proj.register_forward_pre_hook(lambda module, given: places.append(given[0].data_ptr()))
    with torch.no_grad():
        mlp(torch.randn(1, 5, 8))
    assert len(places) == 2
    assert places[0] == places[1]


def test_replaced_modules_hold_the_same_weights():
    """The model can be trained, copied and saved as before."""
    model = tiny_paligemma()
    before = dict(model.named_parameters())
    replace_modules(model, {MLP: MLPInPieces, GatedMLP: GatedMLPInPieces})
    assert not any(type(module) in (MLP, GatedMLP) for module in model.modules())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    copied = copy.deepcopy(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in ours for parameter in copied.parameters())
