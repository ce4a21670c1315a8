"""Folders of rounded weights: equal to rounding while loading, and refused where they would be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_folders import WRITERS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

import minivlm
from minivlm import InputError, PaliGemma, answer
from minivlm.adapters import LoraConfig, merge, new_adapter
from minivlm.checkpoints.weights import ROUNDED
from minivlm.cli import main
from minivlm.models.load import SHIPPED, load
from minivlm.models.quantized import quantization_of, save_quantized
from minivlm.speed import int4
from minivlm.speed.int4 import Int4Linear, Order
from minivlm.training.sizing import size_of

SCENE = Path("figures/samples/scene_1.png")
BITS = pytest.mark.parametrize("bits", ["int8", "int4"])
# An encoder is not rounded, see test_miniatures.py.
DECODERS = [name for name in WRITERS if name != "visualbert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model in each form, as the command writes it."""
    root = tmp_path_factory.mktemp("converted")
    for bits in ("int8", "int4"):
        assert main(["convert", "--quantize", bits, "--out", str(root / bits)]) == 0
    return {bits: root / bits for bits in ("int8", "int4")}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["int4"], tmp_path / "copied")


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Class by class and bit by bit."""
    kinds = [[type(module).__name__ for module in model.modules()] for model in (one, other)]
    assert kinds[0] == kinds[1]
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert not other.training


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


@BITS
@pytest.mark.parametrize("name", DECODERS)
def test_as_if_rounded_while_loading(name: str, bits: str, tmp_path: Path) -> None:
    """Every system, experts and biases included: the same tensors, the same words."""
    source = WRITERS[name](tmp_path / "source")
    rounded = load(source, quantize=bits)
    save_quantized(*load(source, None, quantize=bits), tmp_path / "converted")
    opened = load(tmp_path / "converted")
    assert_same(*(pair[0] for pair in (rounded, opened)))
    words = [answer(SCENE, "caption en", pair, max_new_tokens=6) for pair in (rounded, opened)]
    assert words[0] == words[1]


@BITS
def test_in_another_dtype(bits: str, folders: dict[str, Path]) -> None:
    whole, opened = (
        load(*place, torch.bfloat16, **choice)[0]
        for place, choice in (((SHIPPED,), {"quantize": bits}), ((folders[bits],), {}))
    )
    assert_same(whole, opened)
    assert opened.vision_tower.post_layernorm.weight.dtype == torch.bfloat16


@BITS
def test_the_head_is_the_table(bits: str, folders: dict[str, Path]) -> None:
    """Once in the file, and once in memory, where it is a part of the file."""
    names = load_file(folders[bits] / ROUNDED).keys()
    assert not [name for name in names if "lm_head" in name]
    decoder = load(folders[bits])[0].language_model
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    assert decoder.lm_head.scale is decoder.embed_tokens.scale


def test_smaller_files(folders: dict[str, Path]) -> None:
    """The shipped tower is a large part, and stays as it is."""
    sizes = [(SHIPPED / "model.safetensors").stat().st_size]
    sizes += [(folders[bits] / ROUNDED).stat().st_size for bits in ("int8", "int4")]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]


@BITS
def test_commands_open_it(
    bits: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(folders[bits])]
    asked = ["ask", str(SCENE), "--prompt", "caption en"]
    assert main([*asked, *model]) == main([*asked, "--quantize", bits]) == 0
    first, second = capsys.readouterr().out.split(f"{SCENE} |")[1:]
    assert first == second
    assert main(["eval", "--scenes", "2", "--columns", "held_out", *model]) == 0
    assert main(["look", str(SCENE), "--prompt", "caption en", *model, "--out", str(tmp_path / "look")]) == 0
    assert capsys.readouterr().err == ""


def test_opening_imports_no_compiler(folders: dict[str, Path]) -> None:
    """Rounding shapes alone would: PyTorch computes them with Python, which takes seconds to import."""
    program = (
        "import sys, minivlm\n"
        f"for folder in {[str(folder) for folder in folders.values()]}: minivlm.load(folder)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_threads_that_open_rounded_and_plain_folders_at_once(folders: dict[str, Path]) -> None:
    """How a folder is opened is said where it is opened, and not for the whole process."""
    names = [folders["int8"], SHIPPED, folders["int4"], SHIPPED] * 3
    with ThreadPoolExecutor(4) as pool:
        models = [loaded[0] for loaded in pool.map(load, names)]
    found = [None if one is None else one.weights for one in map(quantization_of, models)]
    assert found == ["int8", None, "int4", None] * 3


def test_in_the_order_of_another_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder that was written there answers here alike, and the other way around."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is the other processor")
    program = (
        "import sys\nfrom minivlm.models import load, quantized\n"
        "quantized.save_quantized(*load.load(quantize='int4'), sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there")],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        check=True,
    )
    orders = [
        json.loads((folder / "config.json").read_text())["quantization_config"]["order"]
        for folder in (folders["int4"], tmp_path / "there")
    ]
    if orders[0] == orders[1]:
        pytest.skip("both processors want one order")
    assert_same(load(folders["int4"])[0], load(tmp_path / "there")[0])


def test_blocks_of_another_size(copied: Path) -> None:
    """Rows that fill a block are other ones, too: here all that are written in blocks of 48."""
    place = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    order, model = Order(48, place), load(copied)[0]
    tensors = load_file(copied / ROUNDED)
    for name, layer in model.named_modules():
        if isinstance(layer, Int4Linear):
            values = int4.unpack_values(layer.weight)[: layer.out_features]
            filled = -layer.out_features % 48
            values = nn.functional.pad(values, (0, 0, 0, filled), value=8).unflatten(0, (-1, 48))
            values = values[:, place.argsort()]  # [blocks, 48, in]
            low, high = values.unflatten(1, (24, 2)).unbind(dim=2)
            packed = (low | high << 4).transpose(1, 2).reshape(len(values) * 48, -1)
            assert torch.equal(
                int4.unpack_values(packed, order)[: layer.out_features],
                int4.unpack_values(layer.weight)[: layer.out_features],
            )
            tensors[f"{name}.weight"] = packed
            scales = layer.scales[:, : layer.out_features]
            tensors[f"{name}.scales"] = nn.functional.pad(scales, (0, 0, 0, filled))
    save_file(tensors, copied / ROUNDED)
    edit(copied, order=place.tolist())
    assert_same(model, load(copied)[0])


# What is refused


def test_rounding_again(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = (
        r"holds weights in int8, .* neither rounded again nor packed: leave quantize out, or take the folder"
    )
    for bits in ("int8", "int4"):
        with pytest.raises(InputError, match=again):
            load(folders["int8"], quantize=bits)
    with pytest.raises(InputError, match=r"leave pack out|packing needs"):
        load(folders["int8"], torch.bfloat16, pack=True)
    out = tmp_path / "out"
    assert main(["convert", "--model", str(folders["int8"]), "--quantize", "int4", "--out", str(out)]) == 2
    assert "leave quantize out" in capsys.readouterr().err
    assert not out.exists()


@BITS
def test_what_needs_the_weights_as_they_were(
    bits: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load(folders[bits])
    with pytest.raises(InputError, match=r"cannot be saved as one of the Hub.*save_quantized"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=rf"training needs .* in {bits}: use the folder that they were made"):
        size_of(folders[bits])
    new_adapter(model, LoraConfig(("q_proj",), r=2))
    with pytest.raises(
        InputError, match=r"quantized or packed.*from the folder that a converted one was made"
    ):
        merge(model)
    with pytest.raises(InputError, match="wears adapters"):
        save_quantized(model, load()[1], tmp_path / "saved")
    lines, out = tmp_path / "lines.jsonl", tmp_path / "tuned"
    line = {"image": str(SCENE.resolve()), "prefix": "caption en", "suffix": "red"}
    lines.write_text(json.dumps(line) + "\n")
    tuning = ["finetune", "--data", str(lines), "--model", str(folders[bits]), "--steps", "1"]
    assert main([*tuning, "--out", str(out)]) == 2
    expected = f"weights in {bits} cannot be trained: train an adapter beside them, or take the folder"
    assert expected in capsys.readouterr().err
    assert main([*tuning, "--suggest"]) == 2
    assert "use the folder that they were made from" in capsys.readouterr().err
    # An adapter learns beside them, and its base is this folder.
    assert main([*tuning, "--lora", "2", "--out", str(out)]) == 0
    assert f"--model {folders[bits]} --adapter {out}" in capsys.readouterr().out
    load(folders[bits], adapter=out)


def test_an_older_minivlm_and_transformers_find_no_weights(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise transformers would draw the rounded matrices at random, with a warning."""
    for folder in folders.values():
        with pytest.raises(
            InputError, match=r"weights rounded, in quantized\.safetensors: open it with minivlm"
        ):
            PaliGemma.from_pretrained(folder)
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"quant_method": "gptq"},
            r"quantized weights .*quant_method 'gptq'\), which are not supported here",
        ),
        (
            {"version": 2},
            r"weights in 'int4' of version 2, and this minivlm knows int8 and int4 of version 1",
        ),
        ({"weights": "int2"}, r"weights in 'int2' of version 1"),
        ({"order": [0, 0]}, r"group_size 32 and order \[0, 0\]: download config.json again"),
        ({"group_size": "32"}, r"group_size '32'"),
        ({"group_size": 48}, r"a group has 48 weights: choose from 32"),
        ({"group_size": 64}, r"tensors of .* do not fit its config.json .*of another shape"),
        ({"weights": "int8"}, r"tensors of .* do not fit its config.json"),
    ],
)
def test_settings_that_are_not_known(values: dict[str, Any], message: str, copied: Path) -> None:
    edit(copied, **values)
    with pytest.raises(InputError, match=message):
        load(copied)


def test_a_part_is_missing(copied: Path) -> None:
    tensors = load_file(copied / ROUNDED)
    name = "language_model.layers.0.mlp.up_proj.scales"
    del tensors[name]
    save_file(tensors, copied / ROUNDED)
    with pytest.raises(InputError, match=f"1 missing: {name}"):
        load(copied)
    (copied / ROUNDED).unlink()
    with pytest.raises(InputError, match=r"has no quantized\.safetensors: download"):
        load(copied)


# Writing


def test_what_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match='not quantized: load it with quantize="int8"'):
        save_quantized(*load(), tmp_path / "out")
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text('{"model_type": "clip"}')
    assert main(["convert", "--model", str(clip), "--quantize", "int8", "--out", str(tmp_path / "out")]) == 2
    assert "can write answers" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists: choose another name for a folder"):
        save_quantized(*load(quantize="int8"), tmp_path / "there")
    assert main(["convert", "--quantize", "int8", "--out", str(tmp_path / "there")]) == 2
    assert "there exists" in capsys.readouterr().err
    assert main(["convert", "--quantize", "int8", "--revision", "v1", "--out", str(tmp_path / "out")]) == 2
    assert "--revision is of a repo" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minivlm.checkpoints.weights.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_quantized(*load(quantize="int8"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    """Not even one that is complete: it has its name at the end."""
    program = (
        "import os, sys\nfrom minivlm.checkpoints import weights\nfrom minivlm.models.load import load\n"
        "from minivlm.models.quantized import quantization_of, save_quantized\n"
        "weights.save_file = lambda *_, **__: os._exit(9)\n"
        "save_quantized(*load(quantize='int8'), sys.argv[1])"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", program, str(out)], check=False)
    assert done.returncode == 9
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises(InputError):
        minivlm.load(left)
