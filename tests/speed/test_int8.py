"""int8 weights: how close they are to the originals, and what they can and cannot be used for."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomize, tiny_paligemma
from torch import Tensor, nn

import minivlm
from minivlm import InputError, PaliGemma
from minivlm.models.load import SHIPPED, load_answering
from minivlm.speed import int8
from minivlm.speed.int8 import Int8Embedding, Int8Linear, quantize_decoder, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(outputs: int = 300, inputs: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different magnitudes; one is zero."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 1, outputs)[:, None]
    weight[7] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_step_away_in_every_row(dtype: torch.dtype):
    weight = matrix(dtype=dtype)
    values, scale = quantize_rows(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, dtype)
    assert values.min() >= -127
    error = (values.double() * scale.double()[:, None] - weight.double()).abs()
    # If the scale is rounded down, the largest number of a row may be clipped a little.
    cut = {torch.float32: 0.0, torch.float16: 127 * 2**-11, torch.bfloat16: 127 * 2**-8}[dtype]
    assert (error <= max(0.501, cut) * scale.double()[:, None]).all()
    rest = values.abs() < 127
    assert (error <= 0.501 * scale.double()[:, None])[rest].all()
    assert (values[7] == 0).all()
    assert (values.abs().amax(dim=1)[torch.arange(300) != 7] >= 126).all()  # each row uses its whole range


@pytest.mark.parametrize("inputs", [40, 64, 192])
@pytest.mark.parametrize("rows", [1, 2, int8.FEW_ROWS, int8.FEW_ROWS + 1, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_the_product_with_the_rounded_weight(
    rows: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "WEIGHTS_PER_BLOCK", 1000)  # 301 outputs in many blocks
    values, scale = quantize_rows(matrix(301, inputs, dtype))
    bias = torch.randn(301, generator=torch.Generator().manual_seed(2)).to(dtype)
    layer = Int8Linear(values, scale, bias)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ (values.double() * scale.double()[:, None]).T + bias.double()
    for shaped in (x, x[None], x[:, None]):
        out = layer(shaped)
        assert out.dtype == dtype
        assert out.shape == (*shaped.shape[:-1], 301)
        tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        torch.testing.assert_close(out.view(rows, 301).double(), expected, rtol=tolerance, atol=tolerance * 2)


def test_only_bf16_takes_the_kernel(monkeypatch: pytest.MonkeyPatch):
    """In fp32 it takes several times as long as a product with the weights converted back."""
    taken: list[torch.dtype] = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(
        torch, "_weight_int8pack_mm", lambda rows, *rest: taken.append(rows.dtype) or kernel(rows, *rest)
    )
    for dtype in DTYPES:
        Int8Linear(*quantize_rows(matrix(64, 64, dtype)))(torch.ones(1, 64, dtype=dtype))
    assert taken == [torch.bfloat16]


def test_embedding():
    weight = matrix()
    values, scale = quantize_rows(weight)
    ids = torch.tensor([[0, 7], [299, 5]])
    table = Int8Embedding(values, scale)
    torch.testing.assert_close(table(ids), values[ids].float() * scale[ids][..., None])
    assert (table(ids) - weight[ids]).abs().max() < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_model(tied: bool):
    """All matrices of the decoder and nothing else; a tied head stays tied."""
    from dataclasses import replace

    config = replace(TINY, text=replace(TINY.text, tie_word_embeddings=tied))
    model = randomize(PaliGemma(config)).eval()
    tower = {name: tensor.clone() for name, tensor in model.vision_tower.state_dict().items()}
    before = sum(p.numel() for p in model.language_model.parameters())
    quantize_decoder(model)
    assert not any(isinstance(module, nn.Linear) for module in model.language_model.modules())
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 7 * TINY.text.num_hidden_layers + 1
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.vision_tower.state_dict().items())
    table, head = model.language_model.embed_tokens, model.language_model.lm_head
    assert (head.weight is table.weight) is tied
    stored = {
        t.data_ptr(): t.numel() for t in model.language_model.state_dict().values() if t.dtype == torch.int8
    }
    norms = sum(p.numel() for p in model.language_model.parameters())
    assert sum(stored.values()) + norms == before
    with pytest.raises(InputError, match="already in int8"):
        quantize_decoder(model)
    with pytest.raises(InputError, match="cannot be saved"):
        model.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


def test_a_loaded_model_is_quantized_with_its_head():
    """Its tied head is a module already, see `speed.one_row.TiedHead`."""
    model, _ = load_answering()
    quantize_decoder(model)
    head, table = model.language_model.lm_head, model.language_model.embed_tokens
    assert isinstance(head, Int8Linear)
    assert head.weight.data_ptr() == table.weight.data_ptr()


@torch.no_grad()
def test_logits_are_near_and_not_equal():
    """Random weights: errors of up to half a step in 254, many times over."""
    model = tiny_paligemma()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    quantize_decoder(model)
    after = model(ids).logits
    error = ((after - before).std() / before.std()).item()
    assert 1e-4 < error < 0.1


def test_the_shipped_model_answers_alike():
    from PIL import Image

    model, processor = load_answering()
    rounded, _ = load_answering(quantize="int8")
    pictures = [Image.open(f"figures/samples/scene_{n}.png") for n in (1, 2, 3)]
    inputs = processor(pictures, ["caption en"] * 3)
    assert rounded.generate(**inputs).tolist() == model.generate(**inputs).tolist()
    one = processor(pictures[:1], ["caption en"])
    assert rounded.generate(**one).tolist() == model.generate(**one).tolist()


def test_rounded_from_what_the_file_has(tmp_path: Path):
    """Whatever the model's dtype, the integers are the same."""
    whole = [load_answering(quantize="int8", dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    first, second = (model.language_model.layers[0].mlp.up_proj for model in whole)
    assert torch.equal(first.weight, second.weight)
    assert [first.scale.dtype, second.scale.dtype] == [torch.float32, torch.bfloat16]
    assert whole[1].vision_tower.post_layernorm.weight.dtype == torch.bfloat16


def test_refusals(tmp_path: Path):
    with pytest.raises(InputError, match=r"quantize is 'int2': choose \"int8\" or \"int4\""):
        minivlm.load(quantize="int2")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SHIPPED / name, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"model_type": "paligemma"', '"model_type": "clip"'))
    with pytest.raises(InputError, match="clip, which has no decoder to quantize"):
        minivlm.load(tmp_path, quantize="int8")


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch):
    """One byte per weight, and working memory."""
    from minivlm.checkpoints import devices

    monkeypatch.setattr(devices, "free_memory", lambda device: 10_000)
    with pytest.raises(InputError, match=r"the weights in int8 take 0\.0 GB of memory on cpu"):
        load_answering(quantize="int8")
