"""MLPs in pieces: the same results, never more than a piece at a time, and all at once with gradients."""

import copy

import pytest
import torch
from helpers import tiny_paligemma
from torch import Tensor

from minivlm.layers import MLP, GatedMLP, SwiGLU
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
    right = plain.forward

    def watched(self: MLP, piece: Tensor) -> Tensor:
        sizes.append(len(piece))
        return right(self, piece)

    monkeypatch.setattr(plain, "forward", watched)
    mlp = replaced(mlp, cut)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)
    assert len(sizes) == 5
    assert sum(sizes) == 1200
    assert list(mlp.state_dict()) == names


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
