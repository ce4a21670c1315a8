"""Our Gemma 2 decoder equals that of transformers, within the sliding window and beyond it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gemma2 import TEXT, WINDOW
from helpers import TINY, assert_differs, assert_equal, randomize
from torch import Tensor
from transformers import Gemma2Config as ReferenceConfig
from transformers import Gemma2ForCausalLM

from minivlm import Gemma2Config, InputError, attention, masks
from minivlm.cache import KVCache
from minivlm.models.paligemma import build_decoder
from minivlm.text import gemma2
from minivlm.text.gemma import GemmaDecoder
from minivlm.text.gemma2 import Gemma2Block, Gemma2Decoder, narrow

LENGTH = 40  # five windows
INPUT_IDS = torch.randint(0, 120, (2, LENGTH), generator=torch.Generator().manual_seed(1))
NO_WINDOW = 10_000


def pair(**changes: Any) -> tuple[Gemma2Decoder, Gemma2ForCausalLM]:
    """Ours and the reference, with the same weights."""
    values = TEXT.to_dict() | changes
    config = ReferenceConfig(**values)
    reference = randomize(Gemma2ForCausalLM._from_config(config, attn_implementation="eager"))
    assert reference.config._attn_implementation == "eager"
    ours = Gemma2Decoder(Gemma2Config.from_dict(values)).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in reference.state_dict().items()}
    if values["tie_word_embeddings"]:
        del state["lm_head.weight"]
    ours.load_state_dict(state)
    return ours, reference


def run(model: Gemma2Decoder, ids: Tensor = INPUT_IDS) -> Tensor:
    """Logits of whole rows, causal."""
    positions = torch.arange(ids.shape[1])[None].expand(ids.shape)
    mask = masks.causal(positions, positions)
    return model.logits(model(model.embed(ids), positions, mask[:, None]))


# Parity


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": False},
        {"sliding_window": 1},
        {"sliding_window": NO_WINDOW},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"num_hidden_layers": 3, "layer_types": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=lambda changes: ", ".join(changes) or "plain",
)
def test_logits_and_every_layer(changes: dict[str, Any]):
    ours, reference = pair(**changes)
    outputs: dict[str, list[Tensor]] = {"ours": [], "reference": []}
    for name, blocks in (("ours", ours.layers), ("reference", reference.model.layers)):
        for block in blocks:
            block.register_forward_hook(lambda _m, _i, output, name=name: outputs[name].append(output))
    assert_equal(run(ours), reference(INPUT_IDS).logits)
    assert len(outputs["ours"]) == len(outputs["reference"]) == ours.config.num_hidden_layers
    for mine, theirs in zip(outputs["ours"], outputs["reference"], strict=True):
        assert_equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(side: str):
    ours, reference = pair()
    lengths = [LENGTH, 17, 5]
    ids, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(LENGTH - length, LENGTH) if side == "left" else slice(length)
        ids[row, place] = INPUT_IDS[0, :length]
        mask[row, place] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    allowed = masks.causal(positions, positions) & masks.padding(mask)
    logits = ours.logits(ours(ours.embed(ids), positions, allowed[:, None]))
    expected = reference(ids, attention_mask=mask, position_ids=positions).logits
    assert_equal(logits[mask.bool()], expected[mask.bool()])
    alone = [run(ours, INPUT_IDS[:1, :length])[0] for length in lengths]
    assert_equal(logits[mask.bool()], torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [20] + [1] * 20, [3, 17, 1, 19]], ids=str)
def test_cached_decoding(pieces: list[int]):
    """In pieces of any length, the logits are those of whole rows."""
    ours, reference = pair()
    cache = KVCache(
        TEXT.num_hidden_layers, len(INPUT_IDS), TEXT.num_key_value_heads, TEXT.head_dim, step=LENGTH
    )
    found = []
    for piece in INPUT_IDS.split(pieces, dim=1):
        positions = cache.reserve(torch.ones_like(piece))
        allowed = masks.causal(positions, cache.key_positions) & masks.padding(cache.key_is_real)
        found.append(ours.logits(ours(ours.embed(piece), positions, allowed[:, None], cache)))
    assert_equal(torch.cat(found, dim=1), reference(INPUT_IDS).logits)


@torch.no_grad()
def test_bf16_keeps_its_dtype_and_stays_near():
    ours, _ = pair()
    expected = run(ours)
    logits = run(ours.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


# The mask of a layer with a window


def test_narrow_is_its_drawing():
    lines = str(narrow.__doc__).splitlines()
    rows = [line.split() for line in lines if line.split() and set(line.split()) <= {"0", "1"}]
    drawn = torch.tensor([[int(cell) for cell in row] for row in rows], dtype=torch.bool)
    positions = torch.arange(6)[None]
    mask = masks.prefix_lm(positions, positions, torch.tensor([3]))[:, None]
    assert torch.equal(narrow(mask, positions, positions, window=2)[0, 0], drawn)


@pytest.mark.parametrize("prefix", range(8))
@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_narrow_finds_the_prefix(prefix: int, window: int):
    """Against the rule written out: near and causal, or both in the prefix."""
    positions = torch.arange(7)[None]
    mask = masks.prefix_lm(positions, positions, torch.tensor([prefix]))[:, None]
    expected = torch.tensor(
        [
            [(key <= query and query - key < window) or (query < prefix and key < prefix) for key in range(7)]
            for query in range(7)
        ]
    )
    assert torch.equal(narrow(mask, positions, positions, window)[0, 0], expected)


# Each of these is a mistake that some reimplementation has made.


@pytest.fixture
def check():
    """Asserts that our model, broken by now, is far from the reference."""
    ours, reference = pair()

    @torch.no_grad()
    def far() -> None:
        assert_differs(run(ours), reference(INPUT_IDS).logits, factor=100)

    return ours, far


def test_missing_soft_cap_of_scores_is_noticed(check):
    ours, far = check
    for layer in ours.layers:
        layer.self_attn.softcap = None
    far()


def test_missing_soft_cap_of_logits_is_noticed(check):
    ours, far = check
    ours.config = replace(ours.config, final_logit_softcapping=None)
    far()


def test_soft_cap_after_the_mask_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    """The lowest number, once capped, is a score like any other."""
    _, far = check
    right = attention.additive
    monkeypatch.setattr(gemma2, "additive", lambda mask, dtype: right(mask, dtype).clamp(min=-2.0))
    far()


def test_missing_window_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    _, far = check
    monkeypatch.setattr(gemma2, "narrow", lambda mask, *_: mask)
    far()


def test_window_in_every_layer_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    _, far = check
    positions = torch.arange(LENGTH)[None]
    near = masks.sliding(positions, positions, WINDOW)[:, None]
    right = gemma2.additive
    monkeypatch.setattr(gemma2, "additive", lambda mask, dtype: right(mask & near, dtype))
    far()


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
def test_window_off_by_one_is_noticed(check, window: int):
    ours, far = check
    ours.config = replace(ours.config, sliding_window=window)
    far()


def test_window_in_the_odd_layers_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    ours, far = check
    biases: list[Tensor] = []
    for layer in ours.layers:
        layer.register_forward_pre_hook(lambda _m, inputs: biases.append(inputs[1]))
    with torch.no_grad():
        run(ours)
    other = {id(bias): index for index, bias in enumerate(biases[:2])}
    assert len(other) == 2  # two masks, alternating
    assert all(bias is biases[number % 2] for number, bias in enumerate(biases))
    for number, layer in enumerate(ours.layers):
        swapped = biases[1 - number % 2]
        layer.register_forward_pre_hook(lambda _m, inputs, swapped=swapped: (inputs[0], swapped, *inputs[2:]))
    far()


def test_scale_of_head_dim_is_noticed(check):
    ours, far = check
    for layer in ours.layers:
        layer.self_attn.scale = TEXT.head_dim**-0.5
    far()


@pytest.mark.parametrize("name", ["post_attention_layernorm", "post_feedforward_layernorm"])
def test_missing_norm_after_a_part_is_noticed(check, name: str):
    ours, far = check
    for layer in ours.layers:
        setattr(layer, name, torch.nn.Identity())
    far()


def test_gemmas_order_of_norms_is_noticed(check, monkeypatch: pytest.MonkeyPatch):
    """The norm after attention, mistaken for the one before the MLP, as in Gemma."""
    _, far = check

    def wrong(self, x, mask, rotary, update_cache=None):
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary, update_cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    monkeypatch.setattr(Gemma2Block, "forward", wrong)
    far()


# Config


def test_build_decoder():
    assert isinstance(build_decoder(TEXT), Gemma2Decoder)
    assert isinstance(build_decoder(TINY.text), GemmaDecoder)


def test_config_both_ways():
    assert Gemma2Config.from_dict(TEXT.to_dict()) == TEXT
    reference = ReferenceConfig(**TEXT.to_dict())
    assert Gemma2Config.from_dict(reference.to_dict()) == TEXT
    uncapped = replace(TEXT, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert Gemma2Config.from_dict(uncapped.to_dict()) == uncapped
    # Older files have neither layer_types nor rope_parameters.
    old = TEXT.to_dict() | {"layer_types": None, "rope_parameters": None, "rope_theta": 100.0}
    assert Gemma2Config.from_dict(old) == replace(TEXT, rope_theta=100.0)


def test_the_defaults_are_those_of_transformers():
    """Missing fields get the defaults of transformers; only the vocabulary is PaliGemma 2's."""
    reference = Gemma2Config.from_dict(ReferenceConfig().to_dict())
    assert replace(reference, vocab_size=257216) == Gemma2Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma'"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"sliding_window": None}, "sliding_window = null"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Gemma2Config.from_dict(TEXT.to_dict() | changes)
