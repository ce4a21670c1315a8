"""Fine-tuning by a low-rank adapter: the model stays as it is, and a few million numbers beside it learn.

Gradients and the moments of AdamW are those of the adapter alone, so a model needs little more memory than
for answering. It is loaded in bf16 where that pays, and its weights are never copied; the adapter is in fp32.
What is left in the folder is the adapter, which peft opens as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minivlm.adapters import LoraConfig, new_adapter
from minivlm.data.lines import BadLines
from minivlm.errors import InputError
from minivlm.processing.inputs import Inputs, to_device
from minivlm.training.finetuning import Finetuning, FinetuningConfig, computes_in_bf16, finetune
from minivlm.training.loop import DEFAULT_LOOP, Loop


class AdapterFinetuning(Finetuning):
    """A training run of an adapter at some step."""

    rates = (
        5e-3,
        2e-4,
    )  # five and ten times those of all weights: B starts at zero, and is multiplied by small numbers

    def __init__(self, *args: Any, lora: LoraConfig, divides: bool = False) -> None:
        if divides:
            raise InputError(
                "shard divides weights that learn, and those under an adapter do not: leave it out"
            )
        self.lora = lora
        super().__init__(*args)

    def prepare(self) -> tuple[nn.Module, nn.Module]:
        """The adapter, which also computes."""
        model: Any = self.model
        model.requires_grad_(False)
        lora = replace(self.lora, base_model_name_or_path=self.config.model)
        self.adapter = new_adapter(model, lora, generator=torch.Generator().manual_seed(self.config.seed))
        self.require_room(self.adapter)
        self.told["base"] = f"with norms {self.adapter.norms}"
        return self.adapter, self.adapter

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"lora": asdict(self.lora)}

    def read(self, part: Inputs, learning: bool = False) -> Any:
        """Scores and loss of a batch: the model wears the adapter."""
        return self.model(**to_device(part, self.model.device))

    def save(self, folder: Path) -> None:
        """The adapter so far, as a folder of its own."""
        self.adapter.save(folder)


def finetune_adapter(
    out: Path,
    config: FinetuningConfig,
    lora: LoraConfig,
    data: Path,
    validation: Path | None = None,
    *,
    warn: Callable[[BadLines], object] | None = None,
    loop: Loop = DEFAULT_LOOP,
) -> Finetuning:
    """Train an adapter for a model on the pictures of a JSONL file, and leave its folder in `out`.

    Args:
        lora: without `target_modules`, all linear layers of the decoder's blocks are adapted.

    The others are those of `finetune`.

    Raises InputError: as `finetune`; a part is to be frozen; dropout, which would not be the same in a run
    that was resumed; a target that matches no layer.
    """
    if config.freeze:
        raise InputError(
            "with an adapter, all parts are frozen but for its targets: choose those, not `freeze`"
        )
    if lora.lora_dropout:
        raise InputError(f"lora_dropout is {lora.lora_dropout}: it is only read here, so train without")
    dtype = torch.bfloat16 if computes_in_bf16(config, torch.device(loop.device)) else torch.float32
    make = partial(AdapterFinetuning, lora=lora)
    return finetune(out, config, data, validation, warn=warn, loop=loop, make=make, dtype=dtype)
