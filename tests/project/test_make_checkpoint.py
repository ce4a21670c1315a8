"""bench/make_checkpoint.py writes what it says: the shapes of the published folders, for both libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from gemma2 import TINY2
from helpers import TINY, assert_differs, assert_equal
from PIL import Image
from qwen2_5_vl import reference_qwen2_5_vl
from qwen2_vl import TEXT, reference_qwen2_vl
from safetensors import safe_open
from small_checkpoints import imported
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaForConditionalGeneration
from transformers import PaliGemmaConfig as ReferenceConfig

import minivlm
from minivlm import InputError, PaliGemma, PaliGemmaConfig
from minivlm.checkpoints import layouts, weights
from minivlm.checkpoints.weights import INDEX
from minivlm.models.qwen2_5_vl import Qwen2_5_VLConfig
from minivlm.models.qwen2_vl import Qwen2VLConfig

BENCH = Path(__file__).parents[2] / "bench"
SMALL = {  # with room for a tokenizer: bytes, letters, 200 longer words, <loc>, <seg>
    "gemma": replace(TINY, text=replace(TINY.text, vocab_size=1728), image_token_id=1712),
    "gemma2": replace(TINY2, text=replace(TINY2.text, vocab_size=1728), image_token_id=1712),
}
SMALL_SHARD = 60_000


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench/make_checkpoint.py, imported as it is run."""
    return imported("make_checkpoint")


@pytest.fixture(scope="module", params=SMALL)
def made(
    bench: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PaliGemmaConfig, Path]:
    config = SMALL[request.param]
    folder = tmp_path_factory.mktemp("made") / "small"
    bench.make_checkpoint(config, folder, shard=SMALL_SHARD)
    return config, folder


@torch.no_grad()
def test_both_libraries_load_it_and_agree(made: tuple[PaliGemmaConfig, Path]):
    config, folder = made
    model, processor = minivlm.load(folder)
    assert model.config == config
    reference, info = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    picture = Image.new("RGB", (50, 40), "red")
    batch = processor([picture, None], ["what is it?", "and now for another text"], suffixes=["red", "x"])
    del batch["labels"]
    ours = model(**batch).logits[batch["attention_mask"].bool()]
    theirs = reference(**batch).logits[batch["attention_mask"].bool()]
    assert torch.isfinite(ours).all()
    assert_equal(ours, theirs)
    assert_differs(ours, ours.roll(1, 0))  # not all the same

    tokens = AutoProcessor.from_pretrained(folder)(
        text="<image>what is it?", images=picture, return_tensors="pt"
    )
    assert torch.equal(tokens["input_ids"], processor(picture, "what is it?")["input_ids"])


def test_the_layout_is_that_of_the_hub(made: tuple[PaliGemmaConfig, Path]):
    _, folder = made
    index = json.loads((folder / INDEX).read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))
    ]
    assert len(files) > 2
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
            assert sum(sizes) <= SMALL_SHARD or len(sizes) == 1
            found |= dict.fromkeys(file.keys(), path.name)
    assert found == index["weight_map"]
    tensors = weights.read_tensors(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "vision_tower.vision_model.post_layernorm.weight" in tensors
    assert "language_model.model.layers.0.mlp.up_proj.weight" in tensors
    assert not any("lm_head" in name for name in tensors)


def test_the_numbers(bench: ModuleType, made: tuple[PaliGemmaConfig, Path], tmp_path: Path):
    """Seeded; no two rows are equal; layer norms pass on what they get."""
    config, folder = made
    tensors = weights.read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            assert len(tensor.flatten(1).unique(dim=0)) == len(tensor), name
    assert 0.9 < tensors["vision_tower.vision_model.post_layernorm.weight"].mean() < 1.1
    assert abs(tensors["language_model.model.norm.weight"].mean()) < 0.1
    bench.make_checkpoint(config, tmp_path / "again", shard=SMALL_SHARD)
    bench.make_checkpoint(config, tmp_path / "other", seed=1, shard=SMALL_SHARD)
    name = "multi_modal_projector.linear.weight"
    assert torch.equal(weights.read_tensors(tmp_path / "again")[name], tensors[name])
    assert not torch.equal(weights.read_tensors(tmp_path / "other")[name], tensors[name])


def test_a_tensor_longer_than_the_block(bench: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Its pieces follow each other in the block, which begins again at its end."""
    block = torch.arange(1.0, 102.0)
    pieces = list(bench._random("x.weight", torch.Size([25, 10]), block))
    numbers = torch.cat(pieces)
    assert numbers.shape == (250,)
    assert numbers.dtype == torch.bfloat16
    assert torch.equal(numbers[:101], numbers[101:202])
    assert len(numbers[:101].unique()) > 50
    assert len(numbers.view(25, 10).unique(dim=0)) == 25


def test_pictures_of_another_size_share_the_weights(bench: ModuleType, tmp_path: Path):
    for size in (28, 56):
        vision = replace(TINY.vision, image_size=size)
        bench.make_checkpoint(replace(SMALL["gemma"], vision=vision), tmp_path / str(size))
    small, large = (weights.read_tensors(tmp_path / size) for size in ("28", "56"))
    differing = [name for name in small if not torch.equal(small[name], large[name])]
    assert differing == ["vision_tower.vision_model.embeddings.position_embedding.weight"]


# The published shapes


def test_published_names_and_sizes(bench: ModuleType):
    """Sizes in GB of two bytes a weight, as the Hub shows them."""
    assert {"paligemma-3b-pt-896", "paligemma-3b-mix-448", "paligemma2-28b-pt-224"} <= set(bench.PUBLISHED)
    for name, gigabytes in {"paligemma-3b-pt-224": 5.85, "paligemma2-3b-pt-224": 6.06}.items():
        with torch.device("meta"):
            model = PaliGemma(bench.PUBLISHED[name])
        assert round(2 * sum(p.numel() for p in model.parameters()) / 1e9, 2) == gigabytes
    assert bench.PUBLISHED["paligemma-3b-pt-448"].vision.num_patches == 1024


@pytest.mark.parametrize("name", ["paligemma-3b-pt-224", "paligemma-3b-pt-896", "paligemma2-3b-pt-448"])
def test_transformers_builds_the_same_shapes(bench: ModuleType, name: str):
    """From the config.json that is written, with the gaps that the published ones have."""
    config = bench.PUBLISHED[name]
    values = json.loads(json.dumps(bench.published_config(config)))
    assert PaliGemmaConfig.from_dict(values) == config
    assert ("head_dim" in values["text_config"]) == name.startswith("paligemma2")
    assert ("image_size" in values["vision_config"]) == ("224" not in name)
    with torch.device("meta"):
        reference = PaliGemmaForConditionalGeneration(ReferenceConfig(**values))
        ours = PaliGemma(config)
    layout = layouts.PALIGEMMA_LAYOUTS["runtime"]
    shapes = {
        minivlm.checkpoints.layouts.to_file(key, layout): tensor.shape
        for key, tensor in ours.state_dict().items()
    }
    expected = {
        key: tensor.shape for key, tensor in reference.state_dict().items() if key != "lm_head.weight"
    }
    assert shapes == expected


# Qwen2-VL and Qwen2.5-VL


def small_qwen(name: str) -> Any:
    """256 letters, 200 words, and what controls the model."""
    names = ("vision_start", "vision_end", "", "image", "video")  # in the order of ids, as published
    ids = {f"{name}_token_id": 456 + 9 + place for place, name in enumerate(names) if name}
    ids |= {"bos_token_id": 456, "pad_token_id": 456, "eos_token_id": 458}
    reference = reference_qwen2_vl if name == "qwen2_vl" else reference_qwen2_5_vl
    values = reference(text=TEXT | {"vocab_size": 480}, ids={}).config.to_dict()
    config = Qwen2VLConfig if name == "qwen2_vl" else Qwen2_5_VLConfig
    return replace(config.from_dict(values), **ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_both_libraries_load_a_qwen_and_agree(bench: ModuleType, name: str, tmp_path: Path):
    config = small_qwen(name)
    bench.make_checkpoint(config, tmp_path / "made", shard=SMALL_SHARD)
    model, processor = minivlm.load(tmp_path / "made")
    assert model.config == config
    kind = AutoModelForImageTextToText
    reference, info = kind.from_pretrained(
        tmp_path / "made", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    batch = processor([Image.new("RGB", (24, 16), "red")], ["what is it?"])
    types = (batch["input_ids"] == config.image_token_id).long()
    ours, theirs = model(**batch).logits, reference(**batch, mm_token_type_ids=types).logits
    assert torch.isfinite(ours).all()
    assert_equal(ours, theirs)
    assert_differs(ours, ours.roll(1, 1))
    tensors = weights.read_tensors(tmp_path / "made")
    norms = [value for key, value in tensors.items() if value.ndim == 1 and key.endswith("weight")]
    assert len(norms) >= 10
    assert all(0.9 < norm.float().mean() < 1.1 for norm in norms)


def test_qwens_published_shapes(bench: ModuleType):
    """Weights in millions; 2B and 3B keep one table for words in and out."""
    for name, millions in {"qwen2-vl-2b": 2209.0, "qwen2-vl-7b": 8291.4, "qwen2.5-vl-3b": 3754.6}.items():
        config = bench.PUBLISHED[name]
        with torch.device("meta"):
            model = bench.FAMILIES[type(config)].model(config)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
        written = json.loads(json.dumps(bench.published_config(config)))
        assert type(config).from_dict(written) == config
        assert "rope_parameters" not in written
    assert bench._known_name("Qwen/Qwen2.5-VL-3B-Instruct") == "qwen2.5-vl-3b"


def test_qwens_full_tokenizer(bench: ModuleType):
    backend = bench.qwen2_vl.make_tokenizer(151643)
    places = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|box_start|>": 151648}
    places |= {"<|vision_start|>": 151652, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
    assert {token: backend.token_to_id(token) for token in places} == places
    text = "what is in the picture? ☃\n"
    assert backend.decode(backend.encode(text).ids) == text
    assert 6 <= len(backend.encode("what is in the picture?\n").ids) <= 14


def test_the_full_tokenizer(bench: ModuleType):
    backend = bench.paligemma.make_tokenizer(257152)
    assert backend.get_vocab_size() == 257153
    places = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<loc0000>": 256000, "<loc1023>": 257023}
    places |= {"<seg000>": 257024, "<seg127>": 257151, "<image>": 257152}
    assert {token: backend.token_to_id(token) for token in places} == places
    text = "what is in the picture? ☃\n"
    assert backend.decode(backend.encode(text).ids) == text
    assert 8 <= len(backend.encode("what is in the picture?\n").ids) <= 14


# Refusals


def test_a_folder_that_exists(bench: ModuleType, tmp_path: Path):
    with pytest.raises(InputError, match="exists: choose another folder, or delete it first"):
        bench.make_checkpoint(SMALL["gemma"], tmp_path)


def test_a_disk_that_is_too_small(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = 33 * 2**20
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(InputError, match=r"needs 5\.9 GB, and 0\.0 GB are free there: make room"):
        bench.make_checkpoint(bench.PUBLISHED["paligemma-3b-pt-224"], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    bench.make_checkpoint(SMALL["gemma"], tmp_path / "new")


def test_what_fails_half_way_leaves_nothing(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench, "_write_shard", full)
    with pytest.raises(InputError, match=r"cannot write .*new: No space left on device. Choose"):
        bench.make_checkpoint(SMALL["gemma"], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path):
    command = [
        sys.executable,
        str(BENCH / "make_checkpoint.py"),
        "paligemma-7b",
        "--out",
        str(tmp_path / "x"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "there is no 'paligemma-7b': choose from paligemma-3b-mix-224, paligemma-3b" in result.stderr
