"""Checkpoint folders: every layout in use is read, one is written, and whatever does not fit is named."""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_differs, assert_equal, make_batch, reference_paligemma, tiny_paligemma
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

import minivlm
from minivlm import PaliGemma
from minivlm.checkpoints import hub, weights
from minivlm.checkpoints.hub import GENERATION
from minivlm.checkpoints.layouts import PALIGEMMA_LAYOUTS, to_file, to_ours
from minivlm.checkpoints.weights import INDEX, WEIGHTS
from minivlm.errors import InputError

BATCH = make_batch([3, 5], [4, 2], [True, True])
del BATCH["labels"]

# How a layout's names follow from those that transformers 5 writes, independent of the package's tables.
RENAMES: dict[str, Callable[[str], str]] = {
    "fresh": lambda name: name,
    "hub": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "runtime": lambda name: "model." + name.replace("language_model.model.", "language_model."),
    "finetune": lambda name: (
        "model."
        + name.replace("language_model.model.", "language_model.").replace(
            "vision_tower.", "vision_tower.vision_model."
        )
    ),
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(**BATCH).logits[BATCH["attention_mask"].bool()]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder that transformers wrote, and its logits."""
    folder = tmp_path_factory.mktemp("fresh")
    reference = reference_paligemma()
    reference.save_pretrained(folder)
    return folder, logits(reference)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of ours, to be damaged."""
    tiny_paligemma().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the tensors of a folder."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, tensors: dict[str, Tensor], count: int = 3) -> None:
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Reading


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("layout", RENAMES)
def test_every_layout_is_read(fresh: tuple[Path, Tensor], tmp_path: Path, layout: str, sharded: bool):
    source, expected = fresh
    tensors = {RENAMES[layout](name): tensor for name, tensor in load_file(source / WEIGHTS).items()}
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    if sharded:
        shard(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert_equal(logits(PaliGemma.from_pretrained(tmp_path)), expected)
    # The layout is one that transformers reads too, and not an invention of this test.
    reference, info = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal(logits(reference), expected)


@pytest.mark.parametrize("layout", PALIGEMMA_LAYOUTS)
def test_tables_lead_there_and_back(layout: str):
    table = PALIGEMMA_LAYOUTS[layout]
    untied = PaliGemma(replace(TINY, text=replace(TINY.text, tie_word_embeddings=False)))
    names = list(untied.state_dict())
    files = [to_file(name, table) for name in names]
    assert [to_ours(name, table) for name in files] == names
    assert len(set(files)) == len(names)
    with pytest.raises(KeyError):
        to_file("audio_tower.weight", table)
    assert to_ours("audio_tower.weight", table) is None


def test_run_time_names_are_the_state_dict_of_transformers():
    table = PALIGEMMA_LAYOUTS["runtime"]
    reference = set(reference_paligemma(tie_word_embeddings=False).state_dict())
    untied = PaliGemma(replace(TINY, text=replace(TINY.text, tie_word_embeddings=False)))
    assert {to_file(name, table) for name in untied.state_dict()} == reference


@pytest.mark.parametrize("layout", RENAMES)
@pytest.mark.parametrize("name", ["language_model.lm_head.weight", "lm_head.weight"])
def test_a_head_in_the_file_beats_the_config(
    fresh: tuple[Path, Tensor], tmp_path: Path, layout: str, name: str
):
    source, tied_logits = fresh
    tensors = {RENAMES[layout](each): tensor for each, tensor in load_file(source / WEIGHTS).items()}
    embeddings = next(tensor for each, tensor in tensors.items() if each.endswith("embed_tokens.weight"))
    tensors[name] = embeddings.flip(0).contiguous()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    assert values["tie_word_embeddings"] is True
    (tmp_path / "config.json").write_text(json.dumps(values))

    model = PaliGemma.from_pretrained(tmp_path)
    assert not model.config.text.tie_word_embeddings
    assert_equal(logits(model), tied_logits.flip(-1))
    # And that remains true once it is written: read again, here and by transformers.
    model.save_pretrained(tmp_path / "again")
    assert_equal(logits(PaliGemma.from_pretrained(tmp_path / "again")), tied_logits.flip(-1))
    reference = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert_equal(logits(reference), tied_logits.flip(-1))


def test_dtype(folder: Path):
    model = PaliGemma.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    change(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    assert {p.dtype for p in PaliGemma.from_pretrained(folder, dtype=None).parameters()} == {torch.float16}
    assert {p.dtype for p in PaliGemma.from_pretrained(folder).parameters()} == {torch.float32}


def test_a_loaded_model_is_ready(folder: Path):
    """In evaluation mode, nothing left on the meta device, and every weight can learn."""
    model = PaliGemma.from_pretrained(folder)
    assert not any(module.training for module in model.modules())
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert [tuple(buffer.shape) for buffer in model.buffers()] == [(1, 4)]
    before = (folder / WEIGHTS).read_bytes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = BATCH["input_ids"].where(BATCH["token_type_ids"] == 1, -100)
    old = model(**BATCH, labels=labels).loss
    old.backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert model(**BATCH, labels=labels).loss < old
    assert (folder / WEIGHTS).read_bytes() == before  # the mapping is private: learning changes no file


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
def test_weights_are_pieces_of_the_mapped_file(folder: Path, sharded: bool):
    """No second copy: every parameter's address is in the memory that the kernel maps to the file."""
    if sharded:
        shard(folder, load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()

    def is_mapped(tensor: Tensor) -> bool:
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            if first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= last:
                return line.endswith(".safetensors") and str(folder) in line
        return False

    assert all(is_mapped(p) for p in PaliGemma.from_pretrained(folder, dtype=None).parameters())
    assert all(is_mapped(p) for p in PaliGemma.from_pretrained(folder, dtype=torch.float32).parameters())
    assert not any(is_mapped(p) for p in PaliGemma.from_pretrained(folder, dtype=torch.bfloat16).parameters())


# Writing


def test_what_we_write_transformers_reads(folder: Path):
    reference, info = PaliGemmaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(logits(tiny_paligemma()), logits(reference))
    names = list(load_file(folder / WEIGHTS))
    assert not any("lm_head" in name for name in names)  # it is the embedding table
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight" in names
    assert "language_model.model.layers.1.self_attn.o_proj.weight" in names
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", GENERATION, WEIGHTS]


def test_a_model_saved_onto_its_own_folder_stays_whole(folder: Path):
    """Its weights are parts of the very file that is replaced."""
    model = PaliGemma.from_pretrained(folder)
    expected = logits(model)
    for _ in range(2):
        model.save_pretrained(folder)
        assert_equal(logits(model), expected)
        assert_equal(logits(PaliGemma.from_pretrained(folder)), expected)


def test_saving_over_shards_wins(folder: Path):
    shard(folder, load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    model = PaliGemma.from_pretrained(folder)
    with torch.no_grad():
        model.language_model.norm.weight += 1
    model.save_pretrained(folder)
    assert_equal(logits(PaliGemma.from_pretrained(folder)), logits(model))


def test_a_failed_save_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(
        InputError, match=r"cannot write .*model.safetensors: No space left .*Free some space"
    ):
        tiny_paligemma(seed=1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Refusals: each names what is wrong


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        PaliGemma.from_pretrained(folder)
    assert "\n" not in str(caught.value)


NORM = "language_model.model.norm.weight"
FC1 = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"


def test_one_tensor_in_two_shards(folder: Path):
    """The index says which counts, but a file that came later would win against it."""
    tensors = load_file(folder / WEIGHTS)
    shard(folder, tensors)
    (folder / WEIGHTS).unlink()
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(name for name in weight_map.values() if name != weight_map[NORM])
    part = load_file(folder / other) | {NORM: torch.zeros_like(tensors[NORM])}
    save_file(part, folder / other, metadata={"format": "pt"})
    refuse(folder, f"has {re.escape(NORM)} in two files: which one counts is unknown")


@pytest.mark.parametrize("entry", [5, None, ["model.safetensors"]])
def test_an_index_that_names_no_file(folder: Path, entry: object):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: entry}}))
    refuse(folder, f"names no file for {re.escape(NORM)}: download the file again")


def test_a_config_nested_too_deep(folder: Path):
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    refuse(folder, r"config.json cannot be read \(.*recursion.*\): download the file again")


@pytest.mark.skipif(os.name == "nt", reason="has neither")
@pytest.mark.parametrize("source", ["/dev/zero", "pipe"])
def test_a_config_without_end(folder: Path, source: str):
    (folder / "config.json").unlink()
    if source == "pipe":
        os.mkfifo(folder / "config.json")
    else:
        (folder / "config.json").symlink_to(source)
    refuse(folder, "has no config.json: is it a checkpoint folder")


def test_a_config_of_many_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "LARGEST_JSON", 1000)
    refuse(folder, r"config.json cannot be read \(it has more than 1000 bytes\): download the file again")


def test_missing_tensors(folder: Path):
    change(folder, lambda tensors: [tensors.pop(NORM), tensors.pop(FC1)])
    refuse(folder, f"2 missing: {re.escape(FC1)}, {re.escape(NORM)}")


def test_unexpected_tensors(folder: Path):
    probe = "vision_tower.vision_model.head.probe"  # SigLIP's pooling head, which PaliGemma does not use
    layer = "language_model.model.layers.2.input_layernorm.weight"  # one layer more than the config has
    change(folder, lambda tensors: tensors.update({probe: torch.zeros(1, 1, 24), layer: torch.zeros(32)}))
    refuse(folder, r"2 unexpected: .*layers.2.input_layernorm.weight, .*head.probe")


def test_two_names_for_one_tensor(folder: Path):
    heads = {name: torch.zeros(120, 32) for name in ("lm_head.weight", "language_model.lm_head.weight")}
    change(folder, lambda tensors: tensors.update(heads))
    refuse(folder, "1 unexpected: (language_model.)?lm_head.weight")


def test_misshapen_tensors(folder: Path):
    change(folder, lambda tensors: tensors.update({FC1: torch.zeros(40, 25)}))
    refuse(folder, rf"1 of another shape or type: {re.escape(FC1)} is \[40, 25\], expected \[40, 24\]")


def test_quantized_tensors(folder: Path):
    change(folder, lambda tensors: tensors.update({FC1: torch.zeros(40, 24, dtype=torch.int8)}))
    refuse(folder, rf"{re.escape(FC1)} is torch.int8, expected floating point")


def test_several_kinds_at_once_and_long_lists_are_cut(folder: Path):
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors[f"{name}.weight_scale"] = tensors.pop(name)
        tensors[NORM] = torch.zeros(31)

    change(folder, edit)
    refuse(
        folder, r"18 missing: [^;]*fc1.bias[^;]* and 13 more; 18 unexpected: [^;]* and 13 more; 1 of another"
    )


def test_a_config_of_another_size(folder: Path):
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["hidden_size"] = 40
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, r"embed_tokens.weight is \[120, 32\], expected \[120, 40\]")


def test_no_known_layout_is_compared_with_the_nearest(folder: Path):
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("vision_tower."):
                tensors[name.replace("vision_tower.", "image_encoder.")] = tensors.pop(name)

    change(folder, edit)
    refuse(folder, r"closest of the layouts hub, fresh, finetune, runtime: hub\): 53 missing.*53 unexpected")
    change(folder, lambda tensors: [tensors.clear(), tensors.update({"a": torch.zeros(1)})])
    refuse(folder, "1 unexpected: a")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_named(folder: Path, bad: float):
    change(folder, lambda tensors: tensors[NORM].__setitem__(3, bad))
    refuse(folder, r"NaN or infinity in language_model.*norm.weight: it is damaged")


def test_numbers_too_large_for_a_dtype_are_told_from_damage(folder: Path):
    change(folder, lambda tensors: tensors[NORM].__setitem__(3, 1e6))
    with pytest.raises(InputError, match=r"norm.weight .*too large for torch.float16. Use torch.bfloat16"):
        PaliGemma.from_pretrained(folder, dtype=torch.float16)
    PaliGemma.from_pretrained(folder, dtype=torch.bfloat16)


def test_large_folders_are_checked_at_the_first_answer(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Checking every number would mean reading gigabytes, so the first logits are checked."""
    monkeypatch.setattr(weights, "CHECKED_SIZE", 1000)
    change(folder, lambda tensors: tensors[NORM].__setitem__(3, math.nan))
    model = PaliGemma.from_pretrained(folder)
    with pytest.raises(InputError, match=r"NaN or infinity in language_model.norm.weight"):
        model.generate(BATCH["input_ids"], pixel_values=BATCH["pixel_values"], max_new_tokens=1)


def test_missing_shard(folder: Path):
    shard(folder, load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, "lacks model-00002-of-00003.safetensors, named in model.safetensors.index.json")


def test_a_shard_whose_download_was_cut(folder: Path):
    """As `hf download --local-dir` leaves it."""
    shard(folder, load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    partial = folder / ".cache" / "huggingface" / "download" / "x.0a1b2c.incomplete"
    partial.parent.mkdir(parents=True)
    (folder / "model-00002-of-00003.safetensors").rename(partial)
    refuse(folder, r"lacks model-00002-of-00003.safetensors, .*: its download was interrupted, run the same")


def test_one_truncated_shard_is_named(folder: Path):
    shard(folder, load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(folder, r"model-00003-of-00003.safetensors is damaged or incomplete \(.*\): download it again")


def test_pointers_of_git_lfs(folder: Path):
    """What `git clone` leaves of large files without git-lfs. All are named at once."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4985051832\n"
    shard(folder, load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    for name in ("model-00002-of-00003.safetensors", "tokenizer.json"):
        (folder / name).write_text(pointer)
    message = "only Git LFS pointers in place of model-00002-of-00003.safetensors, tokenizer.json: run `git"
    refuse(folder, message)
    with pytest.raises(InputError, match=message):
        minivlm.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_damaged_index(folder: Path, content: str):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    refuse(folder, f"{re.escape(INDEX)} (cannot be read|contains a list|has no weight_map)")


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length", "header", "last-byte"])
def test_truncated_file(folder: Path, keep: int):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    refuse(folder, r"model.safetensors is damaged or incomplete \(.*\): download it again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_pickles_are_refused(folder: Path, name: str):
    (folder / WEIGHTS).rename(folder / name)
    refuse(
        folder, f"its weights in {name}: a pickle can run code .* refused. Download the safetensors version"
    )


def test_a_pickle_beside_safetensors_does_no_harm(folder: Path):
    (folder / "training_args.bin").write_bytes(b"pickle")
    PaliGemma.from_pretrained(folder)


def test_no_weights(folder: Path):
    (folder / WEIGHTS).unlink()
    refuse(folder, "neither model.safetensors nor model.safetensors.index.json")


def test_no_config(folder: Path):
    (folder / "config.json").unlink()
    refuse(folder, "has no config.json: is it a checkpoint folder")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe\xff", b""])
def test_unreadable_config(folder: Path, content: bytes):
    (folder / "config.json").write_bytes(content)
    refuse(
        folder,
        "config.json (cannot be read|contains a list, expected a JSON object).* download the file again",
    )


def test_another_system(folder: Path):
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, "model_type 'llava', but this class is for 'paligemma'")


def test_different_weights_give_different_logits():
    """Without this, the comparisons above would prove little."""
    assert_differs(logits(tiny_paligemma(seed=1)), logits(tiny_paligemma()))
