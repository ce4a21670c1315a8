"""Packed weights: the same numbers in another order, the same results, and when they are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_paligemma
from PIL import Image
from small_towers import make_towers
from torch import nn

import minivlm
from minivlm import InputError
from minivlm.attention import onednn_has_bf16
from minivlm.checkpoints import devices
from minivlm.cli import main
from minivlm.models import load
from minivlm.models.load import load_answering
from minivlm.speed import packing
from minivlm.speed.compiled import compile_parts
from minivlm.speed.packing import PackedLinear, matrices, pack_matrices

needs_kernels = pytest.mark.skipif(not onednn_has_bf16(), reason="needs bf16 instructions and oneDNN")
BF16 = torch.bfloat16


@needs_kernels
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (8,), (300,), (1, 1), (2, 5), (3, 100)])
@torch.no_grad()
def test_the_same_product(shape: tuple[int, ...], bias: bool):
    """Up to rounding: tiles may be summed in a different order."""
    linear = nn.Linear(200, 120, bias=bias).to(BF16)
    x = torch.randn(*shape, 200).to(BF16)
    out = PackedLinear(linear)(x)
    assert (out.dtype, out.shape) == (BF16, (*shape, 120))
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)


@needs_kernels
@torch.no_grad()
def test_one_row_reads_short_rows_in_the_files_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "SHORT_ROW", 200)
    monkeypatch.setattr(packing, "has_amx", lambda: False)
    short, long = (nn.Linear(inputs, 120).to(BF16) for inputs in (200, 201))
    assert PackedLinear(short).row_major.data_ptr() == short.weight.data_ptr()  # no second copy
    assert PackedLinear(long).row_major is None
    calls = []
    right = packing.linear
    monkeypatch.setattr(packing, "linear", lambda *args: (calls.append(len(args[0])), right(*args))[1])
    for linear in (short, long):
        packed, x = PackedLinear(linear), torch.randn(1, linear.in_features).to(BF16)
        torch.testing.assert_close(packed(x), linear(x), rtol=0.01, atol=0.01)
        packed(x.expand(2, -1))
    assert calls == [1]  # only the short one, with one row


@needs_kernels
@torch.no_grad()
def test_with_tiles_for_every_row_nothing_is_held_twice(monkeypatch: pytest.MonkeyPatch):
    given: list[int] = []
    monkeypatch.setattr(packing, "has_amx", lambda: True)
    monkeypatch.setattr(packing, "give_back", lambda tensor: given.append(tensor.data_ptr()))
    linear, x = nn.Linear(200, 120).to(BF16), torch.randn(1, 200).to(BF16)
    packed = PackedLinear(linear)
    assert packed.row_major is None
    assert given == [linear.weight.data_ptr()]
    torch.testing.assert_close(packed(x), linear(x), rtol=0.01, atol=0.01)


@needs_kernels
@torch.inference_mode()
def test_the_same_answers():
    """All matrices of tower, projector and decoder are packed; tables and norms are not."""
    model, processor = load_answering(dtype=BF16)
    count = len(matrices(model))
    packed, _ = load_answering(dtype=BF16, pack=True)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == count > 40
    assert not matrices(packed)
    assert packed.language_model.embed_tokens.weight.layout == torch.strided
    pictures = [Image.open(f"figures/samples/scene_{n}.png") for n in (1, 2)]
    for batch in (
        processor(pictures, ["caption en", "how many circles are there?"]),
        processor(pictures[:1], ["detect red circle"]),
    ):
        assert packed.generate(**batch).tolist() == model.generate(**batch).tolist()
        before, after = (one.logits(one.prefill(**batch)[0]) for one in (model, packed))
        torch.testing.assert_close(after, before, rtol=0.02, atol=0.1)


@needs_kernels
def test_what_a_packed_model_is_not_for(tmp_path: Path):
    model = tiny_paligemma().to(BF16)
    pack_matrices(model)
    with pytest.raises(InputError, match="already packed"):
        pack_matrices(model)
    with pytest.raises(InputError, match="packed model cannot be saved"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(InputError, match="packed model cannot be compiled"):
        compile_parts(model)


@needs_kernels
def test_nothing_is_packed_where_one_matrix_cannot_be():
    model = tiny_paligemma().to(BF16)
    model.multi_modal_projector.float()
    with pytest.raises(InputError, match=r"for bfloat16 on a CPU, but the model is torch\.float32 on cpu"):
        pack_matrices(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_refusals(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"packing is for bfloat16 on a CPU"):
        minivlm.load(pack=True)  # in fp32
    with pytest.raises(InputError, match=r"packing is for bfloat16 on a CPU.* on meta"):
        minivlm.load(pack=True, dtype=BF16, device="meta")
    with pytest.raises(InputError, match="choose one"):
        minivlm.load(pack=True, dtype=BF16, quantize="int8")
    monkeypatch.setattr(packing, "onednn_has_bf16", lambda: False)
    with pytest.raises(InputError, match="needs a processor with bf16 instructions"):
        minivlm.load(pack=True, dtype=BF16)


@needs_kernels
def test_too_little_memory(monkeypatch: pytest.MonkeyPatch):
    """The copy and working memory must fit beside the model itself."""
    needed = 2 * sum(matrix.weight.numel() for matrix in matrices(load_answering()[0]))

    def with_so_much(*arguments: Any) -> None:
        monkeypatch.setattr(devices, "free_memory", lambda device: needed)
        devices.require_memory(*arguments)

    monkeypatch.setattr(load, "require_memory", with_so_much)
    with pytest.raises(InputError, match=r"the packed weights take 0\.0 GB of memory on cpu"):
        load_answering(dtype=BF16, pack=True)


@needs_kernels
@pytest.mark.parametrize("objective", ["clip", "siglip"])
@torch.inference_mode()
def test_pairs_of_towers(objective: str, tmp_path: Path):
    folder = make_towers(tmp_path, objective)
    (model, processor), (packed, _) = (minivlm.load(folder, dtype=BF16, pack=pack) for pack in (False, True))
    assert not matrices(packed)
    batch = processor([Image.new("RGB", (16, 16), "red")], ["a red circle", "a blue square"])
    expected = model(**batch)
    for name, value in vars(packed(**batch)).items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=0.02, atol=0.02)


@needs_kernels
def test_from_the_command_line(capsys: pytest.CaptureFixture[str]):
    command = ["ask", "figures/samples/scene_1.png", "--prompt", "caption en", "--dtype", "bfloat16"]
    assert main(command) == 0
    answer = capsys.readouterr().out
    assert main([*command, "--pack"]) == 0
    assert capsys.readouterr().out == answer
    assert main([*command[:4], "--pack"]) != 0
    assert "packing is for bfloat16" in capsys.readouterr().err
