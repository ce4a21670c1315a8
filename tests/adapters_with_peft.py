"""Adapters of peft on the tiny references, and what the tests of adapters compare: the outputs of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import deepseek_vl
import llama_vision
import qwen2_5_vl
import qwen2_vl
import torch
from encoders import PIXELS, TEXT, VISION
from helpers import make_batch, randomize, reference_paligemma, reload, without_labels
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

from minivlm import CLIP, SigLIP, ViT

IDS = torch.tensor([[97, 5, 60, 7, 98, 0, 0, 0, 0, 0], [97, 30, 31, 32, 33, 98, 0, 0, 0, 0]])


class Case(NamedTuple):
    """A system: how to make ours and the reference, what both give for a batch, and targets."""

    make: Callable[[Path], tuple[nn.Module, Any]]
    outputs: Callable[[Any, Any], tuple[Tensor, Tensor]]
    targets: list[str] | str
    fused: bool = False  # whether a target is several layers here


def _paligemma(folder: Path) -> tuple[nn.Module, Any]:
    reference = reference_paligemma()
    return reload(reference, folder), reference


def _of_paligemma(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    batch = without_labels(make_batch([3, 3], [4, 4], [True, True]))
    return ours(**batch).logits, theirs(**batch).logits


def _llava(folder: Path) -> tuple[nn.Module, Any]:
    from models.test_parity_llava import pair

    return pair()


def _of_llava(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    from models import test_parity_llava as llava

    return ours(llava.IDS, llava.PIXELS).logits, llava.theirs(theirs)


def _weaker(pair: Callable[[], tuple[nn.Module, Any]]) -> Callable[[Path], tuple[nn.Module, Any]]:
    """Both with half the weights: as they are, rounding alone comes near the tolerance."""

    def make(_: Path) -> tuple[nn.Module, Any]:
        ours, reference = pair()
        with torch.no_grad():
            for model in (ours, reference):
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter *= 0.5
        return ours, reference

    return make


def _of_qwen(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    batch = qwen2_vl.pictures()
    types = qwen2_vl.types_of(batch["input_ids"])
    real = batch["attention_mask"].bool()
    return ours(**batch).logits[real], theirs(**batch, mm_token_type_ids=types).logits[real]


def _of_llama(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    tiles = llama_vision.pixels()
    batch = llama_vision.their_inputs(llama_vision.FIRST, tiles)
    given = ours(llama_vision.FIRST, tiles, aspect_ratio_ids=llama_vision.IDS).logits
    return given, theirs(**batch).logits


def _of_deepseek(pictures: dict[str, Tensor]) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    def outputs(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
        ids = deepseek_vl.IDS
        return ours(ids, **pictures).logits, theirs(input_ids=ids, **pictures).logits

    return outputs


def _encoder(kind: Any, config: Any, ours: Any) -> Callable[[Path], tuple[nn.Module, Any]]:
    def make(folder: Path) -> tuple[nn.Module, Any]:
        reference = randomize(kind(config()))
        reference.save_pretrained(folder)
        return ours.from_pretrained(folder), reference

    return make


def _of_pairs(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    given = ours.logits(ours.encode_image(PIXELS), ours.encode_text(IDS))
    return given, theirs(input_ids=IDS, pixel_values=PIXELS).logits_per_image


def _of_classes(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    return ours(PIXELS).logits, theirs(PIXELS).logits


ATTENTION = ["q_proj", "v_proj"]  # of the tower as well: a list matches how names end
CASES = {
    "paligemma": Case(_paligemma, _of_paligemma, [*ATTENTION, "out_proj", "fc1", "linear", "gate_proj"]),
    "llava": Case(_llava, _of_llava, r".*language_model.*\.(q_proj|o_proj|down_proj)|.*linear_2"),
    "qwen2_vl": Case(_weaker(qwen2_vl.pair), _of_qwen, ["q_proj", "qkv", "attn.proj", "fc2"], fused=True),
    "qwen2_5_vl": Case(_weaker(qwen2_5_vl.pair), _of_qwen, ["v_proj", "qkv", "mlp.0", "up_proj"], fused=True),
    "llama_vision": Case(
        lambda _: llama_vision.pair(), _of_llama, [*ATTENTION, "fc1", "multi_modal_projector"]
    ),
    "deepseek_vl": Case(
        lambda _: deepseek_vl.plain_pair(), _of_deepseek(deepseek_vl.LOW_ALONE), [*ATTENTION, "out_proj"]
    ),
    "deepseek_vl_hybrid": Case(
        lambda _: deepseek_vl.hybrid_pair(),
        _of_deepseek(deepseek_vl.PICTURES),
        [*ATTENTION, "qkv", "lin1", "aligner.vision_proj", "aligner.high_res_vision_proj"],
        fused=True,
    ),
    "clip": Case(
        _encoder(
            CLIPModel, lambda: CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20), CLIP
        ),
        _of_pairs,
        [*ATTENTION, "out_proj", "visual_projection"],
    ),
    "siglip": Case(
        _encoder(
            SiglipModel,
            lambda: SiglipConfig(vision_config=VISION, text_config=TEXT | {"projection_size": 24}),
            SigLIP,
        ),
        _of_pairs,
        [*ATTENTION, "fc2"],
    ),
    "vit": Case(
        _encoder(
            ViTForImageClassification,
            lambda: ViTConfig(**VISION, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}),
            ViT,
        ),
        _of_classes,
        ["q_proj", "fc1"],
    ),
}


def peft_adapter(reference: Any, folder: Path, targets: Any, seed: int = 1, **options: Any) -> PeftModel:
    """An adapter of peft on a reference, with random weights that matter, and its folder."""
    config = LoraConfig(target_modules=targets, **{"r": 3, "lora_alpha": 5} | options)
    model = get_peft_model(reference, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def peft_layer(**options: Any) -> Any:
    """A single layer of peft, 24 inputs and 16 outputs."""
    config = LoraConfig(target_modules=["0"], **{"r": 3, "lora_alpha": 5} | options)
    return get_peft_model(nn.Sequential(nn.Linear(24, 16)), config).base_model.model[0]  # type: ignore[arg-type]
