"""What is refused, by name: another base, targets without layers, features of peft that are not computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, assert_equal, randomize, tiny_paligemma
from safetensors.torch import load_file, save_file
from torch import nn

import minivlm
from minivlm import InputError, PaliGemma
from minivlm.adapters import LoraConfig, new_adapter, put_on, read_adapter, take_off
from minivlm.models.load import SHIPPED

FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter for queries of the decoder of `TINY`."""
    model = tiny_paligemma()
    config = LoraConfig(r".*language_model.*q_proj", r=2, base_model_name_or_path="some/base")
    new_adapter(model, config).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refuses(folder: Path, message: str, model: nn.Module | None = None) -> None:
    model = model or tiny_paligemma()
    before = list(model.state_dict())
    with pytest.raises(InputError, match=message):
        put_on(model, folder)
    assert list(model.state_dict()) == before  # nothing is left half done


# Another base


def test_a_base_of_another_shape(folder: Path) -> None:
    model, _ = minivlm.load()
    refuses(folder, r"for some/base, does not fit this PaliGemma \(.*of another shape: model", model)


def test_another_system(folder: Path) -> None:
    from qwen2_vl import pair

    refuses(
        folder,
        r"for some/base, was trained on other weights than those of this Qwen2VL",
        pair()[0],
    )


def test_fewer_layers(folder: Path) -> None:
    from dataclasses import replace

    model = randomize(PaliGemma(replace(TINY, text=replace(TINY.text, num_hidden_layers=1))))
    refuses(folder, r"not in the model: model.language_model.layers.1.self_attn.q_proj", model)
    model = randomize(PaliGemma(replace(TINY, text=replace(TINY.text, num_hidden_layers=3))))
    refuses(folder, r"among the targets, but without weights: .*layers.2.self_attn.q_proj\)", model)


def test_other_weights_of_the_same_shape(folder: Path) -> None:
    """What would fit, and answer nonsense."""
    refuses(folder, r"for some/base, was trained on other weights", tiny_paligemma(seed=1))
    put_on(tiny_paligemma().to(torch.bfloat16), folder)  # the same in another dtype
    # An adapter of peft does not say.
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    put_on(tiny_paligemma(seed=1), folder)


# Targets


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_proj", "c_attn"),
            r"no linear layer of this PaliGemma is named c_attn: choose from .*fc1.* q_proj",
        ),
        (r".*\.c_attn", r"is named \.\*\\\.c_attn: choose from down_proj, fc1"),
        (("proj",), "is named proj: choose"),  # whole parts of names alone
        ("(", "is no regular expression for names of layers"),
        (("embed_tokens",), "no linear layer of this PaliGemma is named embed_tokens"),
        (("lm_head",), "no linear layer of this PaliGemma is named lm_head"),  # it is the table
    ],
)
def test_targets_that_match_nothing(targets: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        new_adapter(tiny_paligemma(), LoraConfig(targets))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 14),  # the decoder's blocks
        ({"target_modules": ("q_proj",)}, 5),  # the tower's as well
        ({"target_modules": ("q_proj",), "exclude_modules": r".*vision.*"}, 2),
        ({"target_modules": ("q_proj",), "layers_to_transform": (1,)}, 2),
        ({"target_modules": ("q_proj",), "layers_to_transform": 2, "layers_pattern": ("layers",)}, 1),
        ({"target_modules": ("linear", "layers.0.self_attn.k_proj")}, 3),
        ({"target_modules": r"model\.language_model\.layers\.0\..*_proj"}, 7),
    ],
)
def test_targets_are_read_as_in_peft(options: dict[str, Any], count: int) -> None:
    from helpers import reference_paligemma
    from peft import LoraConfig as Theirs
    from peft import get_peft_model

    adapter = new_adapter(tiny_paligemma(), LoraConfig(**options))
    assert len(adapter.names) == count
    if options:
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        theirs = get_peft_model(reference_paligemma(), Theirs(**listed))
        assert set(theirs.targeted_module_names) == set(adapter.names)


# Files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type 'IA3': only 'LORA' is supported"),
        ({"bias": "all"}, "has bias = 'all'"),
        (
            {"modules_to_save": ["lm_head"]},
            r"has modules_to_save = \['lm_head'\], which is not supported here",
        ),
        ({"lora_bias": True}, "has lora_bias = True"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"use_qalora": True}, "has use_qalora = True"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out = True"),
        ({"target_parameters": ["a"]}, "has target_parameters"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"of_next_year": 1}, "has of_next_year = 1, which is not supported here"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights = 'pissa', which also changes the weights"),
        ({"target_modules": None}, "names no target_modules"),
        ({"target_modules": 5}, "has target_modules = 5, which peft does not write"),
        ({"use_dora": "yes"}, "has use_dora = 'yes'"),
        ({"r": 0}, "the rank of an adapter is 0"),
        ({"rank_pattern": {"q_proj": 1.5}}, "the rank of an adapter is 1.5"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"r": 3}, "of another shape"),
        ({"use_dora": True}, "with other tensors than the config says"),
        ({"target_modules": ["v_proj"]}, "not among the targets"),
    ],
)
def test_configs_that_are_refused(values: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **values)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{FIRST}.lora_B.weight": None},
            "with other tensors than the config says: model.language",
        ),
        (
            {f"{FIRST}.lora_A.weight": torch.full((2, 32), torch.nan)},
            r"NaN or infinity in .*layers.0.*lora_A",
        ),
        ({f"{FIRST}.lora_B.bias": torch.ones(1)}, "holds .*lora_B.bias: only changes of low rank"),
        ({"base_model.model.lm_head.weight": torch.ones(1)}, "holds base_model.model.lm_head.weight: only"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)}, "lora_embedding_A: only"),
        ({"other.q_proj.lora_A.weight": torch.ones(1)}, "holds other.q_proj"),
        (
            {"base_model.model.other.q_proj.lora_A.weight": torch.ones(1)},
            "not in the model: other.q_proj",
        ),
    ],
)
def test_tensors_that_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit_tensors(folder, changes)
    refuses(folder, message)


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    refuses(SHIPPED, "has no adapter_config.json: is it the folder of an adapter")
    refuses(tmp_path / "missing", "neither a folder nor a repo id")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refuses(folder, "is damaged or incomplete")
    path.unlink()
    refuses(folder, "has no adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    refuses(folder, r"adapter_model.bin: a pickle can run code")
    with pytest.raises(InputError, match="has no adapter_config"):  # before the model is looked for
        minivlm.load("nobody/nothing", adapter=SHIPPED)


def test_names_of_adapters(folder: Path) -> None:
    model = tiny_paligemma()
    put_on(model, folder)
    with pytest.raises(InputError, match="already has an adapter 'default'"):
        put_on(model, folder)
    for name in ("a.b", "", "keys"):
        with pytest.raises(InputError, match="cannot be the name of an adapter"):
            put_on(model, folder, name)
    with pytest.raises(InputError, match="no adapter 'other': choose from default"):
        take_off(model, "other")


def test_packed_weights_have_no_norm_to_read() -> None:
    class Packed(nn.Module):
        weight = torch.ones(2, 2).to_mkldnn()

    from minivlm.adapters.dora import plain_weight

    with pytest.raises(InputError, match="load the model without packing"):
        plain_weight(Packed())


def test_patterns_give_layers_their_own_rank_and_alpha(tmp_path: Path) -> None:
    """As peft reads them."""
    from adapters_with_peft import CASES, peft_adapter

    case = CASES["paligemma"]
    ours, reference = case.make(tmp_path / "base")
    patterns = {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.v_proj": 5}, "alpha_pattern": {"v_proj": 9}}
    theirs = peft_adapter(reference, tmp_path / "adapter", case.targets, **patterns)
    put_on(ours, tmp_path / "adapter")
    assert_equal(*case.outputs(ours, theirs))
    assert read_adapter(tmp_path / "adapter").config.alpha_pattern == {"v_proj": 9}
