"""The folder of an adapter, as peft writes and reads it: adapter_config.json, adapter_model.safetensors.

A tensor is named by its module in transformers:

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight      [r, in]
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight      [out, r]
    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector   [out], of DoRA

An adapter is of use with its own base alone, and two models of one shape take each other's adapters without a
complaint. So a folder that is written here also holds a checksum of the norms of its base, in a place that
peft does not read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minivlm.adapters.config import CONFIG, LoraConfig
from minivlm.checkpoints.hub import few, find_folder, read_json
from minivlm.checkpoints.weights import read_tensors
from minivlm.errors import InputError
from minivlm.files import write_aside

WEIGHTS = "adapter_model.safetensors"
PREFIX, NORMS = "base_model.model.", "minivlm_norms_of_base"
PARTS = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}


class AdapterFiles(NamedTuple):
    """What a folder holds."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, dict[str, Tensor]]  # a module in transformers -> part -> tensor
    norms: str | None  # of the base, where the folder says

    @property
    def told(self) -> str:
        """For messages."""
        base = self.config.base_model_name_or_path
        return f"{self.folder}, an adapter for {base}," if base else f"the adapter {self.folder}"


def read_adapter(name: str | Path, revision: str | None = None) -> AdapterFiles:
    """Read the folder of an adapter, or a repo of the Hub.

    Raises InputError: it cannot be found or read; it was made with a feature of peft that is not supported;
    it holds other tensors than those of LoRA, NaN or infinity.
    """
    folder = find_folder(name, revision, files=(CONFIG, WEIGHTS))
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}: is it the folder of an adapter?")
    config = LoraConfig.from_dict(read_json(folder, CONFIG))
    tensors: dict[str, dict[str, Tensor]] = {}
    odd, broken = [], []
    for key, tensor in read_tensors(folder, WEIGHTS).items():
        part = next((part for part, end in PARTS.items() if key.endswith(end)), None)
        if part is None or not key.startswith(PREFIX) or not tensor.is_floating_point():
            odd.append(key)
            continue
        module = key.removeprefix(PREFIX).removesuffix(PARTS[part])
        tensors.setdefault(module, {})[part] = tensor
        if not torch.isfinite(tensor).all():
            broken.append(key)
    if odd:
        raise InputError(
            f"{folder} holds {few(odd)}: only changes of low rank to linear layers are supported"
        )
    if broken:
        raise InputError(
            f"{folder} contains NaN or infinity in {few(broken)}: it is damaged, download it again"
        )
    return AdapterFiles(folder, config, tensors, _norms_in(folder / WEIGHTS))


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Mapping[str, Tensor]], norms: str | None = None
) -> None:
    """Write the folder of an adapter. All files are complete before one replaces an older one.

    Raises InputError: the folder cannot be written.
    """
    named = {
        f"{PREFIX}{module}{PARTS[part]}": tensor.detach().contiguous()
        for module, parts in tensors.items()
        for part, tensor in parts.items()
    }
    metadata = {"format": "pt"} | ({NORMS: norms} if norms else {})
    with ExitStack() as files:
        described = files.enter_context(write_aside(folder / CONFIG))
        written = files.enter_context(write_aside(folder / WEIGHTS))
        described.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(named, written, metadata=metadata)


def norms_of(model: nn.Module) -> str:
    """A checksum of the weights of a model's norms: no adapter changes them, and int8 leaves them alone.

    They are rounded to bf16, so that a checkpoint gives the same in fp32 and in bf16.
    """
    total = 0
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and name.endswith(".weight"):
            rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
            total = zlib.crc32(rounded.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _norms_in(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(NORMS)
    except (SafetensorError, OSError):  # it was read a moment ago
        return None
