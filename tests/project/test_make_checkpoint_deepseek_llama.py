"""bench/make_checkpoint.py for DeepSeek-VL, DeepSeek-VL2 and Llama 3.2 Vision.

That transformers reads the folders and computes the same, test_bench_inference.py shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import assert_differs
from PIL import Image
from small_checkpoints import SMALL, imported

import minivlm
from minivlm.checkpoints import weights


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return imported("make_checkpoint")


@torch.no_grad()
@pytest.mark.parametrize("system", SMALL)
def test_a_folder_loads_and_sees(bench: ModuleType, system: str, tmp_path: Path):
    config = SMALL[system]()
    folder = tmp_path / "made"
    bench.make_checkpoint(config, folder, shard=60_000)
    model, processor = minivlm.load(folder)
    assert model.config == config
    pictures = [Image.new("RGB", (24, 16), color) for color in ("red", "blue")]
    batch = processor([[picture] for picture in pictures], ["what is it?"] * 2)
    logits = model(**batch).logits[:, -1]
    assert torch.isfinite(logits).all()
    assert_differs(logits[0], logits[1])
    assert len(model.generate(**processor(pictures[:1], ["what is it?"]), max_new_tokens=2)[0]) <= 2

    tensors = weights.read_tensors(folder)
    norms = [value for key, value in tensors.items() if value.ndim == 1 and "norm" in key]
    ones = [value.float().mean() for value in norms if value.float().mean() > 0.5]
    assert len(ones) >= 7
    assert all(0.9 < mean < 1.1 for mean in ones)
    assert {key for key in tensors if key.endswith("norm.weight")} <= {
        key for key, value in tensors.items() if value.float().mean() > 0.9
    }
    gates = [value.item() for key, value in tensors.items() if value.numel() == 1]
    assert all(0.9 < gate < 1.1 for gate in gates)
    assert len(gates) == (3 + 2 * 2 + 2 * 2 if system == "llama_vision" else 0)
    assert (folder / "generation_config.json").exists() == (system != "deepseek_vl2")


def test_published_shapes(bench: ModuleType):
    """Numbers in the files, as the Hub counts them.

    The last one is published for Llama-3.2-11B-Vision-Instruct, whose tiles have 560 pixels. The file of
    deepseek-vl2-tiny has 6.74 GB. That of deepseek-vl-1.3b has 3.95 GB in the layout of its own program, with
    a pooling head of 12.6 million that transformers' layout lacks.
    """
    counts = {
        "deepseek-vl-1.3b": 1_962_640_384,
        "deepseek-vl2-tiny": 3_370_501_440,
        "llama-3.2-11b-vision": 10_642_941_475,
        "llama-3.2-11b-vision-instruct": 10_670_220_835,
    }
    for name, count in counts.items():
        config = bench.PUBLISHED[name]
        assert sum(tensor.numel() for tensor in bench.shapes_of(config).values()) == count
        written = json.loads(json.dumps(bench.published_config(config)))
        assert type(config).from_dict(written) == config
        assert "rope_parameters" not in json.dumps(written)
    assert bench._known_name("deepseek-ai/deepseek-vl-1.3b-chat") == "deepseek-vl-1.3b"
    instruct = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert bench._known_name(instruct) == "llama-3.2-11b-vision-instruct"


def test_full_tokenizers(bench: ModuleType):
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    places = {
        "deepseek_vl": {begin: 100000, end: 100001, "<image_placeholder>": 100015},
        "deepseek_vl2": {begin: 0, end: 1, "<｜▁pad▁｜>": 2, "<image>": 128815, "<|ref|>": 128816}
        | {"<|grounding|>": 128820, "<|User|>": 128821},
        "llama_vision": {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009}
        | {"<|finetune_right_pad_id|>": 128004, "<|start_header_id|>": 128006, "<|image|>": 128256},
    }
    from minivlm.processing import DeepseekTokenizer, DeepseekVL2Tokenizer, Llama3Tokenizer

    kinds = {"deepseek_vl": DeepseekTokenizer, "deepseek_vl2": DeepseekVL2Tokenizer}
    words = {"deepseek_vl": 100000, "deepseek_vl2": 128000, "llama_vision": 128000}
    for system, expected in places.items():
        made = getattr(bench, system).make_tokenizer(words[system])
        tokenizer = kinds.get(system, Llama3Tokenizer)(made)
        assert {token: tokenizer.backend.token_to_id(token) for token in expected} == expected
        text = "what is in the picture? ☃ 2026\n"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 6 <= len(tokenizer.encode("what is in the picture?\n")) <= 14
