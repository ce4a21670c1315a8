"""Our Gemma decoder equals that of transformers: every layer and the logits, whatever the number of heads."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, assert_differs, assert_equal, difference, randomize
from transformers import GemmaConfig as ReferenceConfig
from transformers import GemmaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm as ReferenceLlamaRMSNorm

from minivlm import GemmaConfig, attention, layers, masks
from minivlm.layers import LlamaRMSNorm, RMSNorm
from minivlm.text import gemma
from minivlm.text.gemma import GemmaDecoder

INPUT_IDS = torch.randint(0, 120, (2, 9), generator=torch.Generator().manual_seed(1))


def run(model: GemmaDecoder, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of INPUT_IDS, causal unless another mask is given."""
    positions = torch.arange(INPUT_IDS.shape[1])[None].expand(INPUT_IDS.shape)
    if mask is None:
        mask = masks.causal(positions, positions)
    return model.logits(model(model.embed(INPUT_IDS), positions, mask[:, None]))


def pair(
    kv_heads: int = 2, tied: bool = True, theta: float = 10000.0
) -> tuple[GemmaDecoder, GemmaForCausalLM]:
    """Ours and the reference, with the same weights."""
    values = TINY.text.to_dict() | {
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    reference = randomize(GemmaForCausalLM(ReferenceConfig(**values)))
    ours = GemmaDecoder(GemmaConfig.from_dict(values)).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in reference.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    ours.load_state_dict(state)
    return ours, reference


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_and_every_layer(kv_heads: int, tied: bool):
    ours, reference = pair(kv_heads, tied)
    outputs: dict[str, list[torch.Tensor]] = {"ours": [], "reference": []}
    for name, blocks in (("ours", ours.layers), ("reference", reference.model.layers)):
        for block in blocks:
            block.register_forward_hook(lambda _m, _i, output, name=name: outputs[name].append(output))
    assert_equal(run(ours), reference(INPUT_IDS).logits)
    assert len(outputs["ours"]) == len(outputs["reference"]) == 2
    for mine, theirs in zip(outputs["ours"], outputs["reference"], strict=True):
        assert_equal(mine, theirs)


@torch.no_grad()
def test_rope_theta():
    ours, reference = pair(theta=100.0)
    assert_equal(run(ours), reference(INPUT_IDS).logits)
    assert_differs(run(pair(theta=10000.0)[0]), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_positions_may_start_anywhere():
    ours, reference = pair()
    positions = torch.arange(INPUT_IDS.shape[1])[None].expand(INPUT_IDS.shape)
    mask = masks.causal(positions, positions)[:, None]
    logits = ours.logits(ours(ours.embed(INPUT_IDS), positions + 1, mask))
    assert_equal(logits, reference(INPUT_IDS).logits)


# Each of these is a mistake that some reimplementation has made.


@torch.no_grad()
def test_missing_mask_is_noticed():
    ours, reference = pair()
    assert_differs(run(ours, torch.ones(2, 9, 9, dtype=torch.bool)), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_missing_rope_is_noticed(monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    monkeypatch.setattr(gemma, "apply_rotary", lambda x, cos, sin: x)
    assert_differs(run(ours), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_interleaved_rope_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def interleaved(x, cos, sin):
        half = x.shape[-1] // 2
        cos, sin = (angle[..., :half].repeat_interleave(2, dim=-1) for angle in (cos, sin))
        quarter_turn = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + quarter_turn * sin

    ours, reference = pair()
    monkeypatch.setattr(gemma, "apply_rotary", interleaved)
    assert_differs(run(ours), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_exact_gelu_is_noticed(monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    exact = F.gelu
    monkeypatch.setattr(layers.F, "gelu", lambda x, approximate: exact(x))
    assert_differs(run(ours), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_llamas_norm_is_noticed(monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    monkeypatch.setattr(RMSNorm, "forward", LlamaRMSNorm.forward)
    assert_differs(run(ours), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_unscaled_embeddings_are_noticed(monkeypatch: pytest.MonkeyPatch):
    ours, reference = pair()
    monkeypatch.setattr(GemmaDecoder, "embed", lambda self, ids: self.embed_tokens(ids))
    assert_differs(run(ours), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_keys_in_another_order_of_heads_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Grouped queries: head h shares the keys of h // 2, not of h % 2."""
    ours, reference = pair()
    right = attention.attend

    def wrong(q, k, v, *others):
        return right(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), *others)

    monkeypatch.setattr(attention, "attend", wrong)
    assert_differs(run(ours), reference(INPUT_IDS).logits)


# Norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ours", "reference"),
    [(RMSNorm, GemmaRMSNorm), (LlamaRMSNorm, ReferenceLlamaRMSNorm)],
    ids=["gemma", "llama"],
)
def test_norms(ours, reference, dtype: torch.dtype):
    """Bit for bit: in bf16, rounding at a different point would show."""
    ours, reference = (randomize(norm(64, eps=1e-5)).to(dtype) for norm in (ours, reference))
    x = (torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    torch.testing.assert_close(ours(x), reference(x), rtol=0, atol=0)


def test_norms_differ_from_each_other():
    x = torch.randn(3, 64)
    gemma, llama = (randomize(norm(64)) for norm in (RMSNorm, LlamaRMSNorm))
    assert_differs(gemma(x), llama(x))
    llama.weight.data += 1  # the same factor in the other convention: only rounding differs
    assert difference(gemma(x), llama(x)) < 1e-6
    x, gemma, llama = x.bfloat16(), gemma.bfloat16(), llama.bfloat16()
    assert difference(gemma(x), llama(x)) > 0
