"""From a folder's name to a model and its processor: the table of systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch

from minivlm.adapters import put_on, read_adapter
from minivlm.checkpoints.devices import bytes_needed, check_dtype, require_memory
from minivlm.checkpoints.hub import OPEN_CLIP, SHIPPED, describe, find_folder
from minivlm.errors import InputError
from minivlm.models import (
    clip,
    deepseek_original,
    deepseek_vl,
    deepseek_vl2,
    deepseek_vl_hybrid,
    llama_vision,
    llava,
    open_clip,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen_vl,
    siglip,
    vit,
)
from minivlm.models.miniatures.clipcap import ClipCap
from minivlm.models.miniatures.cm3 import CM3
from minivlm.models.miniatures.cross_attention import CrossAttentionLlama
from minivlm.models.miniatures.experts import LlavaExperts
from minivlm.models.miniatures.flamingo import Flamingo
from minivlm.models.miniatures.one_view import OneView
from minivlm.models.miniatures.simvlm import SimVLM
from minivlm.models.miniatures.tiles import Tiles
from minivlm.models.miniatures.two_towers import TwoTowers
from minivlm.models.miniatures.visualbert import VisualBERT
from minivlm.models.miniatures.visualgpt import VisualGPT
from minivlm.models.protocols import Answers, Matches
from minivlm.models.quantized import Quantization
from minivlm.processing import AnswerProcessor, PairProcessor
from minivlm.speed import speed_up
from minivlm.speed.int4 import bytes_in_int4, quantize_decoder_to_int4
from minivlm.speed.int8 import quantize_decoder
from minivlm.speed.packing import check_packing, matrices, pack_matrices

MINIATURES = SHIPPED.parent / "miniatures"  # a folder for each system that `minivlm train --system` made

__all__ = [
    "MINIATURES",
    "SHIPPED",
    "SYSTEMS",
    "LoadOptions",
    "System",
    "kind_of",
    "load",
    "load_answering",
    "load_matching",
    "system_of",
]

DESCRIPTIONS = ("config.json", OPEN_CLIP[0])

Kind = Literal["answers", "matches", "classifies"]


class System(NamedTuple):
    """How to open a folder, and what kind of model it holds."""

    open_folder: Callable[[Path, Mapping[str, Any], torch.dtype | None, torch.device | str], tuple[Any, Any]]
    kind: Kind
    weights: str = "*.safetensors"  # which files are downloaded, besides *.json
    vocabulary: tuple[str, ...] = ()  # and those
    videos: bool = False  # whether its processor reads them, too


SYSTEMS = {  # model_type, as `describe` reads it -> what opens its folder
    "paligemma": System(paligemma.open_folder, "answers"),
    "llava": System(llava.open_folder, "answers"),
    "qwen": System(qwen_vl.open_folder, "answers", vocabulary=("*.tiktoken",)),
    "mllama": System(llama_vision.open_folder, "answers"),
    "qwen2_vl": System(qwen2_vl.open_folder, "answers", videos=True),
    "qwen2_5_vl": System(qwen2_5_vl.open_folder, "answers", videos=True),
    "deepseek_vl": System(deepseek_vl.open_folder, "answers"),
    "deepseek_vl_hybrid": System(deepseek_vl_hybrid.open_folder, "answers"),
    "multi_modality": System(deepseek_original.open_folder, "answers"),  # DeepSeek-VL as its program has it
    "deepseek_vl_v2": System(deepseek_vl2.open_folder, "answers"),
    "clip": System(clip.open_folder, "matches"),
    "open_clip": System(open_clip.open_folder, "matches", OPEN_CLIP[1]),
    "siglip": System(siglip.open_folder, "matches"),
    "vit": System(vit.open_folder, "classifies"),
    "clipcap": System(ClipCap.open_folder, "answers"),
    "visual_bert": System(VisualBERT.open_folder, "answers"),
    "flamingo": System(Flamingo.open_folder, "answers"),
    "cm3": System(CM3.open_folder, "answers"),
    "simvlm": System(SimVLM.open_folder, "answers"),
    "visualgpt": System(VisualGPT.open_folder, "answers"),
    "llama_cross_attention": System(CrossAttentionLlama.open_folder, "answers"),
    "llava_experts": System(LlavaExperts.open_folder, "answers"),
    "llava_one_view": System(OneView.open_folder, "answers"),
    "llava_tiles": System(Tiles.open_folder, "answers"),
    "llava_two_towers": System(TwoTowers.open_folder, "answers"),
}


def load(
    name: str | Path = SHIPPED,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    quantize: str | None = None,
    pack: bool = False,
    adapter: str | Path | None = None,
    kind: Kind | None = None,
) -> tuple[Any, Any]:
    """Open a checkpoint: a local folder, or a repo of the Hub such as "google/paligemma-3b-mix-224".

    >>> model, processor = load("google/paligemma-3b-mix-224", dtype=torch.bfloat16)

    Args:
        name: folder or repo id; by default, the small model that ships with the package.
        dtype: the dtype of the weights; None keeps that of the files.
        device: where the model runs, such as "cpu" or "cuda".
        revision: a branch, tag or commit of a repo; by default, the main branch.
        quantize: "int8" halves the size of a bf16 decoder, and "int4" makes its blocks a third as large, see
            `minivlm.speed.int8` and `minivlm.speed.int4`. A folder that holds rounded weights, see
            `minivlm.models.quantized`, is opened without it.
        pack: on a CPU in bf16, use more memory for faster prompts and batches, see `minivlm.speed.packing`.
        adapter: a folder or repo of a low-rank adapter for this model, see `minivlm.adapters`.
        kind: accept only models that answer, match or classify.

    Returns:
        The types depend on the folder's config.json: `PaliGemma` and `Processor`, `Llava` and
        `LlavaProcessor`, `CLIP` and `PairProcessor`, and so on: a system's own, or those of its kind. Where
        a folder of open_clip has a config of its own, it gives a `CLIP` or a `ResNetCLIP`.

    Raises:
        InputError: the folder cannot be found or read, holds a system that is not in `SYSTEMS`, or its files
            do not match each other; the device does not exist, does not support the dtype, or has too little
            free memory; the quantization is unknown, or there is no decoder, or it is rounded already; the
            weights cannot be packed; the adapter is for another model, or cannot be read.
    """
    # Reject bad options before gigabytes are downloaded.
    _check_options(dtype, device, quantize, pack)
    files = None if adapter is None else read_adapter(adapter)
    values = describe(find_folder(name, revision, files=DESCRIPTIONS))
    system = _system(name, values.get("model_type"), kind, quantize)
    rounding = Quantization.from_dict(name, values)
    if rounding is not None and (quantize is not None or pack):
        choice = "pack" if quantize is None else "quantize"
        raise InputError(
            f"{name} holds weights in {rounding.weights}, and they are neither rounded again nor packed: "
            f"leave {choice} out, or take the folder that it was made from"
        )
    folder = find_folder(name, revision, files=["*.json", system.weights, *system.vocabulary])
    if rounding is not None:
        with rounding.applied():
            model, processor = system.open_folder(folder, values, dtype, device)
    elif quantize is None:
        model, processor = system.open_folder(folder, values, dtype, device)
    else:
        # In the file's dtype, so that weights are rounded only once.
        model, processor = system.open_folder(folder, values, None, "cpu")
        _require_memory_for(quantize, model, dtype, device)
        (quantize_decoder if quantize == "int8" else quantize_decoder_to_int4)(model)
        model.to(device, dtype)
    if pack:
        copies = bytes_needed((matrix.weight for matrix in matrices(model)), None, "cpu", bytes_per_weight=2)
        require_memory(copies, "cpu", "the packed weights", "do without packing, or use a smaller checkpoint")
        pack_matrices(model)
    model = speed_up(model)
    if files is not None:
        put_on(model, files)
    return model, processor


class LoadOptions(TypedDict, total=False):
    """The choices of `load` beside the name and the kind."""

    dtype: torch.dtype | None
    device: torch.device | str
    revision: str | None
    quantize: str | None
    pack: bool
    adapter: str | Path | None


def load_answering(
    name: str | Path = SHIPPED, **options: Unpack[LoadOptions]
) -> tuple[Answers, AnswerProcessor]:
    """`load` for what needs a model that writes: answering, evaluation, fine-tuning.

    Raises InputError: as `load`, and where the folder holds a model of another kind.
    """
    return load(name, kind="answers", **options)


def load_matching(name: str | Path, **options: Unpack[LoadOptions]) -> tuple[Matches, PairProcessor]:
    """`load` for what needs two towers: retrieval, zero-shot classification.

    Raises InputError: as `load`, and where the folder holds a model of another kind.
    """
    return load(name, kind="matches", **options)


def kind_of(name: str | Path = SHIPPED, revision: str | None = None) -> Kind:
    """What kind of model a folder or repo id holds. Raises InputError: as `system_of`."""
    return system_of(name, revision).kind


def system_of(name: str | Path = SHIPPED, revision: str | None = None, kind: Kind | None = None) -> System:
    """The system of a folder or repo id. Nothing but its config is looked at.

    Raises InputError: the folder cannot be found or read, or holds another system than those of `SYSTEMS`, or
    one of another kind.
    """
    values = describe(find_folder(name, revision, files=DESCRIPTIONS))
    return _system(name, values.get("model_type"), kind, None)


def _check_options(
    dtype: torch.dtype | None, device: torch.device | str, quantize: str | None, pack: bool
) -> None:
    if quantize not in (None, "int8", "int4"):
        raise InputError(f'quantize is {quantize!r}: choose "int8" or "int4", or leave it out')
    if quantize is not None and pack:
        raise InputError(
            f"packing is for matrices in bfloat16, and quantize makes them {quantize}: choose one"
        )
    if dtype is not None:
        check_dtype(dtype, device)
    if pack:
        check_packing(dtype, device)


def _system(name: str | Path, model_type: object, kind: Kind | None, quantize: str | None) -> System:
    supported = [row for row, system in SYSTEMS.items() if kind in (None, system.kind)]
    if not isinstance(model_type, str) or model_type not in supported:
        purpose = {
            None: "can be loaded",
            "answers": "can write answers",
            "matches": "can match pictures with texts",
            "classifies": "can classify pictures",
        }[kind]
        raise InputError(
            f"{name} holds a model of type {model_type!r}, and only {', '.join(supported)} "
            f"{purpose}: choose another checkpoint"
        )
    if quantize is not None and SYSTEMS[model_type].kind != "answers":
        raise InputError(f"{name} holds a {model_type}, which has no decoder to quantize: leave quantize out")
    return SYSTEMS[model_type]


def _require_memory_for(
    quantize: str, model: torch.nn.Module, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    decoder = list(model.get_submodule("language_model").parameters())
    ids = {id(parameter) for parameter in decoder}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    if quantize == "int8":
        rounded = bytes_needed(decoder, None, "cpu", bytes_per_weight=1)
    else:
        rounded = bytes_in_int4(model.get_submodule("language_model"), dtype)
    needed = rounded + bytes_needed(rest, dtype, device)
    advice = "use a smaller checkpoint, or a machine with more"
    require_memory(needed, device, f"the weights in {quantize}", advice)
