"""int4 weights: how close they are to the originals, and what they can and cannot be used for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomize, tiny_paligemma
from torch import Tensor, nn

import minivlm
from minivlm import InputError, PaliGemma
from minivlm.adapters import LoraConfig, new_adapter, put_on, switch_to
from minivlm.adapters.dora import plain_weight
from minivlm.adapters.lora import AdaptedLinear, LowRank
from minivlm.models.load import load_answering
from minivlm.speed import int4
from minivlm.speed.int4 import (
    FEW_ROWS,
    Int4Linear,
    bytes_in_int4,
    dequantize_groups,
    pack_values,
    quantize_decoder_to_int4,
    quantize_groups,
    unpack_values,
)
from minivlm.speed.int8 import Int8Embedding, Int8Linear, quantize_decoder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest output


def matrix(outputs: int = 300, inputs: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different magnitudes and middles; one is zero, and one is constant."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) + torch.randn(outputs, 1, generator=generator)
    weight *= torch.logspace(-3, 1, outputs)[:, None]
    weight[7], weight[9] = 0, 0.3
    return weight.to(dtype)


# Rounding


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_step_away_in_every_group(dtype: torch.dtype, group: int) -> None:
    weight = matrix(dtype=dtype)
    values, scale, middle = quantize_groups(weight, group)
    assert (values.dtype, scale.dtype, middle.dtype) == (torch.uint8, dtype, dtype)
    assert scale.shape == middle.shape == (300, 256 // group)
    assert values.max() == 15
    rounded = (values.double() - 8) * scale.double().repeat_interleave(group, 1)
    rounded += middle.double().repeat_interleave(group, 1)
    # If a scale or a middle is rounded, the ends of a group may be cut a little.
    size = (scale.abs() * 15 + middle.abs()).double().repeat_interleave(group, 1)
    slack = {torch.float32: 2**-22, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    error = (rounded - weight.double()).abs()
    assert (error <= 0.501 * scale.double().repeat_interleave(group, 1) + slack * size + 1e-7).all()
    assert (error[7] < 1e-7).all()
    ends = values.unflatten(1, (-1, group))[[row for row in range(300) if row not in (7, 9)]]
    assert (ends.amax(dim=2) - ends.amin(dim=2)).min() >= 14  # each group uses its whole range
    close = dequantize_groups(values, scale, middle).double() - rounded
    assert (close.abs() <= slack * size + 1e-7).all()


def test_smaller_groups_are_closer() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        (Int4Linear(weight, group).plain() - weight).square().mean().item() for group in (32, 64, 128, 256)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[2]
    # A step is the range of a group in fifteenths, and its error that of an even spread: step / sqrt(12).
    steps = (weight.unflatten(1, (-1, 32)).amax(2) - weight.unflatten(1, (-1, 32)).amin(2)) / 15
    assert errors[0] == pytest.approx((steps.square() / 12).mean().item(), rel=0.1)


def test_values_come_back() -> None:
    """In the order of this processor, whatever it is."""
    size, place = int4.interleaved()
    assert sorted(place.tolist()) == list(range(size))
    for rows, columns in ((64, 2), (128, 34), (576, 64)):
        values = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(rows))
        packed = pack_values(values)
        assert packed.shape == (rows, columns // 2)
        assert torch.equal(unpack_values(packed), values.to(torch.uint8))


# The layer


@pytest.mark.parametrize("shape", [(300, 256), (64, 32), (1, 1), (33, 100)])  # odd ones are filled up
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_product_with_the_rounded_weight(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "WEIGHTS_PER_BLOCK", 40_000)  # outputs in several blocks
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    layer = Int4Linear(weight, bias=bias)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ layer.plain().double().T + bias.double()
    assert layer.plain().shape == shape
    for shaped in (x, x[None], x[:, None]):
        out = layer(shaped)
        assert out.dtype == dtype
        assert out.shape == (*shaped.shape[:-1], shape[0])
        error = (out.view(rows, -1).double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rows", [2, 40])
def test_the_gradient_is_that_of_the_rounded_weight(rows: int, dtype: torch.dtype) -> None:
    layer = Int4Linear(torch.randn(100, 96, generator=torch.Generator().manual_seed(0)).to(dtype))
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    wanted = torch.randn(rows, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    (layer(x) * wanted).sum().backward()
    expected = wanted.double() @ layer.plain().double()
    assert x.grad is not None
    assert (x.grad.double() - expected).abs().max() / expected.abs().max() < TOLERANCE[dtype]
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_nothing_large_is_kept_for_the_gradient() -> None:
    """Otherwise training an adapter would hold the whole model once more."""
    layer = Int4Linear(torch.randn(64, 64))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        layer(torch.randn(50, 64, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_on_other_processors(capability: str) -> None:
    """The order in a block is another one."""
    tests = "test_values_come_back or test_linear_is_the_product"
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is the other processor")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# A model


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model(tied: bool) -> None:
    """All matrices of the blocks; table and head in int8; nothing else. Inputs of 48 are filled up."""
    model = randomize(PaliGemma(replace(TINY, text=replace(TINY.text, tie_word_embeddings=tied)))).eval()
    tower = {name: tensor.clone() for name, tensor in model.vision_tower.state_dict().items()}
    quantize_decoder_to_int4(model)
    assert sum(isinstance(m, Int4Linear) for m in model.modules()) == 7 * TINY.text.num_hidden_layers
    assert not any(isinstance(module, nn.Linear) for module in model.language_model.modules())
    table, head = model.language_model.embed_tokens, model.language_model.lm_head
    assert isinstance(table, Int8Embedding)
    assert isinstance(head, Int8Linear)
    assert (head.weight is table.weight) is tied
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.vision_tower.state_dict().items())
    for quantize in (quantize_decoder, quantize_decoder_to_int4):
        with pytest.raises(InputError, match="already"):
            quantize(model)
    with pytest.raises(InputError, match="cannot be saved"):
        model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


@torch.no_grad()
def test_the_model_is_that_with_rounded_weights() -> None:
    model, other = tiny_paligemma(), tiny_paligemma()
    quantize_decoder_to_int4(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Int4Linear):
            other.get_submodule(name).weight.copy_(layer.plain())
    table = model.language_model.embed_tokens
    other.language_model.embed_tokens.weight.copy_(table.weight * table.scale[:, None])
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_shipped_model_in_a_third() -> None:
    """Its bytes are those that were computed before; in bf16 and fp32 the integers are the same."""
    whole, _ = load_answering(dtype=torch.bfloat16)
    expected = bytes_in_int4(whole.language_model, None)
    models = [load_answering(quantize="int4", dtype=dtype)[0] for dtype in (torch.bfloat16, torch.float32)]
    decoder = models[0].language_model
    stored = {one.data_ptr(): one.nbytes for one in (*decoder.buffers(), *decoder.parameters())}
    layers = [module for module in decoder.modules() if isinstance(module, Int4Linear)]
    filled = sum(  # up to whole blocks, which are larger on some processors: much of a model as small as this
        (len(one.weight) - one.out_features) * (one.weight[0].nbytes + one.scales[:, 0].nbytes)
        for one in layers
    )
    assert sum(stored.values()) - filled == pytest.approx(expected, rel=0.03)
    assert sum(stored.values()) < 0.55 * sum(one.nbytes for one in whole.language_model.parameters())
    first, second = (model.language_model.layers[0].mlp.up_proj for model in models)
    assert torch.equal(first.weight, second.weight)
    assert [first.scales.dtype, second.scales.dtype] == [torch.bfloat16, torch.float32]


def test_the_shipped_model_answers_alike() -> None:
    from PIL import Image

    model, processor = load_answering()
    rounded, _ = load_answering(quantize="int4")
    pictures = [Image.open(f"figures/samples/scene_{n}.png") for n in (1, 2, 3)]
    inputs = processor(pictures, ["caption en"] * 3)
    answers = [processor.decode(one.generate(**inputs)) for one in (model, rounded)]
    assert sum(one == other for one, other in zip(*answers, strict=True)) >= 2


def test_refusals() -> None:
    with pytest.raises(InputError, match="a group has 48 weights: choose from 32, 64, 128, 256"):
        Int4Linear(torch.randn(64, 96), 48)
    with pytest.raises(InputError, match="quantize makes them int4: choose one"):
        minivlm.load(pack=True, dtype=torch.bfloat16, quantize="int4")
    model = nn.Module()
    model.language_model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(InputError, match="Sequential has no head to round"):
        quantize_decoder_to_int4(model)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivlm.checkpoints import devices

    monkeypatch.setattr(devices, "free_memory", lambda device: 10_000)
    with pytest.raises(InputError, match=r"the weights in int4 take 0\.0 GB of memory on cpu"):
        load_answering(quantize="int4")


# As a base of adapters


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_learns_on_it(dora: bool, tmp_path: Path) -> None:
    """As on the rounded weights in fp32; its folder opens on the plain model as well."""
    results, models = [], []
    for plain in (False, True):
        model, _ = load_answering(quantize="int4")
        if plain:
            for name, layer in list(model.named_modules()):
                if isinstance(layer, Int4Linear):
                    parent, _, end = name.rpartition(".")
                    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
                    linear.weight.data = plain_weight(layer)
                    setattr(model.get_submodule(parent), end, linear)
        model.requires_grad_(False)
        config = LoraConfig(("q_proj", "down_proj"), r=4, use_dora=dora)
        adapter = new_adapter(model, config, generator=torch.Generator().manual_seed(0))
        ids = torch.randint(3, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(ids, token_type_ids=torch.ones_like(ids), labels=ids).loss
            loss.backward()
            optimizer.step()
        results.append([loss.item(), *(one.detach().clone() for one in adapter.parameters())])
        models.append((model, adapter, ids))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5)
    model, adapter, ids = models[0]
    assert sum(isinstance(one, AdaptedLinear) for one in model.modules()) > 0
    with torch.no_grad():
        worn = model(ids).logits
        adapter.save(tmp_path)
        again, _ = load_answering(quantize="int4", adapter=tmp_path)
        torch.testing.assert_close(again(ids).logits, worn)
        switch_to(again, None)
        assert not torch.allclose(again(ids).logits, worn, atol=1e-3)
        other, _ = load_answering()
        put_on(other, tmp_path)


def test_an_adapter_is_as_wide_as_the_layer() -> None:
    """Not as its bytes, of which each holds two weights, nor as it is filled up."""
    layer = AdaptedLinear(Int4Linear(torch.randn(33, 100)), slice(None))
    layer.changes["default"], layer.active = LowRank(100, 33, 2, 4), "default"
    assert layer.in_features == 100
    assert layer(torch.randn(3, 100)).shape == (3, 33)
