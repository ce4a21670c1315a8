"""Numbers computed from a config are those of the model: parameters, bytes, operations."""

from dataclasses import replace

import pytest
import torch
from gemma2 import TINY2
from helpers import IMAGE_TOKENS, TINY, make_batch, randomize
from torch.utils.flop_counter import FlopCounterMode

from minivlm import PaliGemma, PaliGemmaConfig
from minivlm.attention import record_attention
from minivlm.cache import KVCache
from minivlm.models.sizes import (
    cache_bytes,
    decode_bytes,
    decode_operations,
    image_operations,
    paligemma2_config,
    parameter_counts,
    prefill_operations,
    weight_bytes,
)
from minivlm.speed import speed_up

UNTIED = replace(TINY, text=replace(TINY.text, tie_word_embeddings=False))
CONFIGS = {
    "tiny": TINY,
    "tiny, untied": UNTIED,
    "tiny 2": TINY2,
    "3b-224": PaliGemmaConfig(),
    "3b-448": replace(PaliGemmaConfig(), vision=replace(PaliGemmaConfig().vision, image_size=448)),
    "2-3b": paligemma2_config("3b"),
    "2-10b": paligemma2_config("10b", 448),
    "2-28b": paligemma2_config("28b"),
}
TINIES = [TINY, UNTIED, TINY2]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_and_bytes_are_those_of_the_model(config: PaliGemmaConfig):
    with torch.device("meta"):
        model = PaliGemma(config)
    decoder = model.language_model
    blocks = [*decoder.layers.parameters(), *decoder.norm.parameters()]
    assert parameter_counts(config) == {
        "vision": sum(p.numel() for p in model.vision_tower.parameters()),
        "projector": sum(p.numel() for p in model.multi_modal_projector.parameters()),
        "embedding": decoder.embed_tokens.weight.numel(),
        "decoder": sum(p.numel() for p in blocks),
        "head": 0 if decoder.lm_head is None else decoder.lm_head.weight.numel(),
    }
    assert weight_bytes(config) == sum(p.nbytes for p in model.bfloat16().parameters())
    assert weight_bytes(config, torch.float32) == 2 * weight_bytes(config)


def test_published_sizes():
    """The numbers of weights in the files of paligemma-3b-pt-224 and paligemma2-3b-pt-224 on the Hub."""
    counts = {name: sum(parameter_counts(config).values()) for name, config in CONFIGS.items()}
    assert counts["3b-224"] == 2_923_466_480
    assert counts["2-3b"] == 3_032_242_416


@pytest.mark.parametrize("config", [TINY, TINY2], ids=["gemma", "gemma 2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_cache_bytes_are_those_of_the_cache(config: PaliGemmaConfig, batch_size: int):
    text = config.text
    cache = KVCache(
        text.num_hidden_layers, batch_size, text.num_key_value_heads, text.head_dim, dtype=torch.bfloat16
    )
    cache.reserve(torch.ones(batch_size, 300, dtype=torch.long))
    held = sum(tensor.nbytes for tensor in cache.keys + cache.values)
    assert cache.capacity == 512
    assert held == cache_bytes(config, 512, batch_size)


@pytest.mark.parametrize("config", TINIES, ids=["tied", "untied", "gemma 2"])
def test_decoding_reads_decoder_head_and_cache(config: PaliGemmaConfig):
    model = randomize(PaliGemma(config)).bfloat16()
    decoder = model.language_model
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    weights = sum(p.nbytes for part in (decoder.layers, decoder.norm, head) for p in part.parameters())
    assert decode_bytes(config, 0) == weights
    assert decode_bytes(config, 10, batch_size=4) == weights + 40 * cache_bytes(config, 1)
    mixed = decode_bytes(config, 10, torch.int8, cache_dtype=torch.bfloat16)
    assert mixed == weights // 2 + cache_bytes(config, 10)


def counted(step) -> int:
    # `record_attention` forces the plain form of attention, whose products the counter knows.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), record_attention(), counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", TINIES, ids=["tied", "untied", "gemma 2"])
def test_operations_are_those_that_run(config: PaliGemmaConfig):
    model = speed_up(randomize(PaliGemma(config)))
    batch = make_batch([5], [0], [True])
    tokens = IMAGE_TOKENS + 5
    assert batch["input_ids"].shape == (1, tokens)
    pixels, ids, mask = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
    assert counted(lambda: model.encode_image(pixels)) == image_operations(config)

    def read_everything() -> None:
        model.logits(model.prefill(ids, mask, pixels)[0])

    assert counted(read_everything) == image_operations(config) + prefill_operations(config, tokens)

    def every_token() -> None:
        positions, all_see_all = (
            torch.arange(tokens)[None],
            torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
        )
        hidden = model.language_model(model.merge(ids, model.encode_image(pixels)), positions, all_see_all)
        model.logits(hidden[:, -1])

    expected = image_operations(config) + prefill_operations(config, tokens, last_mlp_tokens=tokens)
    assert counted(every_token) == expected

    _, cache = model.prefill(ids, mask, pixels)
    one, unfinished = torch.tensor([7]), torch.tensor([True])
    for context in (tokens + 1, tokens + 2):
        operations = counted(lambda: model.logits(model.decode(one, unfinished, cache)))
        assert operations == decode_operations(config, context)
    assert decode_operations(config, 1) == prefill_operations(config, 1)
