"""From a folder's name to a model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from minivlm.checkpoints import weights
from minivlm.checkpoints.devices import bytes_needed, check_dtype, require_memory
from minivlm.configs import PaliGemmaConfig
from minivlm.encoder_configs import CLIPConfig, SiglipConfig, ViTConfig
from minivlm.errors import InputError
from minivlm.models.clip import CLIP
from minivlm.models.paligemma import PaliGemma
from minivlm.models.siglip import SigLIP
from minivlm.models.vit import ViT
from minivlm.processing import PairProcessor, Processor, ViTImageProcessor
from minivlm.speed.int8 import quantize_decoder
from minivlm.speed.packing import check_packing, matrices, pack_matrices

SHIPPED = Path(__file__).parents[1] / "assets" / "tiny"  # the small checkpoint that comes with the package
PICTURES = "preprocessor_config.json"

Model = TypeVar("Model", bound=torch.nn.Module)

MODELS = ("paligemma", "clip", "siglip", "vit")  # the values of model_type in config.json


def load(
    name: str | Path = SHIPPED,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    quantize: str | None = None,
    pack: bool = False,
) -> tuple[Any, Any]:
    """Open a checkpoint: a local folder, or a repo id of the Hub such as "google/paligemma-3b-mix-224".

    >>> model, processor = load("google/paligemma-3b-mix-224", dtype=torch.bfloat16)

    Args:
        name: folder or repo id; without one, the small model that comes with the package.
        dtype: what the weights are converted to; None keeps what the files have.
        device: where the model computes, such as "cpu" or "cuda".
        revision: of a repo id, a branch, tag or commit; without one, the main branch.
        quantize: "int8" halves the bytes of a decoder in bf16, see `minivlm.speed.int8`.
        pack: on a CPU and in bf16, spend memory on faster prompts and batches, see `minivlm.speed.packing`.

    Returns:
        Which types, the folder's config.json decides: `PaliGemma` and `Processor`, `CLIP` or `SigLIP` and
        `PairProcessor`, `ViT` and `ViTImageProcessor`.

    Raises:
        InputError: the folder cannot be found or read, holds another system than those of `MODELS`, or its
            files do not fit together; the device does not exist, cannot compute in the dtype, or has too
            little memory free; there is no such way to quantize, or no decoder; the weights cannot be packed.
    """
    folder, values = _find(name, revision, MODELS, dtype, device, quantize, pack)
    # The processor first: a mistake in its small files shows before the large ones are read.
    match values.get("model_type"):
        case "paligemma":
            return load_paligemma(folder, dtype, device, quantize=quantize, pack=pack)
        case "clip":
            clip = CLIPConfig.from_dict(values)
            pairs = PairProcessor.from_pretrained(folder, "clip", clip.text.max_position_embeddings)
            _check_pairs(folder, clip, pairs)
            return _packed(CLIP.from_pretrained(folder, dtype=dtype, device=device), pack), pairs
        case "siglip":
            siglip = SiglipConfig.from_dict(values)
            pairs = PairProcessor.from_pretrained(folder, "siglip", siglip.text.max_position_embeddings)
            _check_pairs(folder, siglip, pairs)
            return _packed(SigLIP.from_pretrained(folder, dtype=dtype, device=device), pack), pairs
        case "vit":
            vit = ViTConfig.from_dict(values)
            pictures = ViTImageProcessor.from_pretrained(folder)
            _require_equal(folder, {"the picture's side": (vit.image_size, pictures.image_size, PICTURES)})
            return _packed(ViT.from_pretrained(folder, dtype=dtype, device=device), pack), pictures
        case other:
            raise ValueError(f"{other!r} is in MODELS, and nothing here loads it")


def load_paligemma(
    name: str | Path = SHIPPED,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    quantize: str | None = None,
    pack: bool = False,
) -> tuple[PaliGemma, Processor]:
    """`load` for what needs a model that writes: answering, evaluation, fine-tuning.

    Raises:
        InputError: as `load`, and where the folder holds a model that writes no text.
    """
    folder, values = _find(name, revision, ("paligemma",), dtype, device, quantize, pack)
    config = PaliGemmaConfig.from_dict(values)
    processor = Processor.from_pretrained(folder, image_seq_length=config.vision.num_patches)
    _check_pair(folder, config, processor)
    if quantize is None:
        return _packed(PaliGemma.from_pretrained(folder, dtype=dtype, device=device), pack), processor
    model = PaliGemma.from_pretrained(folder, dtype=None)  # rounded once, from what the file has
    _require_memory(model, dtype, device)
    quantize_decoder(model)
    return model.to(device, dtype), processor


def _find(
    name: str | Path,
    revision: str | None,
    supported: tuple[str, ...],
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantize: str | None,
    pack: bool,
) -> tuple[Path, dict[str, Any]]:
    """The folder and its config.json. What can be refused is refused before gigabytes are downloaded."""
    if quantize not in (None, "int8"):
        raise InputError(f'quantize is {quantize!r}, and only "int8" is known: choose it, or leave it out')
    if quantize is not None and pack:
        raise InputError("packing is for matrices in bfloat16, and quantize makes them int8: choose one")
    if dtype is not None:
        check_dtype(dtype, device)
    if pack:
        check_packing(dtype, device)
    folder = weights.find_folder(name, revision, files=["config.json"])
    values = weights.read_config(folder)
    if values.get("model_type") not in supported:
        purpose = "can be loaded" if supported == MODELS else "writes answers"
        raise InputError(
            f"{name} holds a model of type {values.get('model_type')!r}, and only {', '.join(supported)} "
            f"{purpose}: choose another checkpoint"
        )
    if quantize is not None and values["model_type"] != "paligemma":
        raise InputError(
            f"{name} holds a {values['model_type']}, which has no decoder to quantize: leave quantize out"
        )
    return weights.find_folder(name, revision), values


def _packed(model: Model, pack: bool) -> Model:
    if pack:
        copies = bytes_needed((matrix.weight for matrix in matrices(model)), None, "cpu", bytes_per_weight=2)
        require_memory(copies, "cpu", "the packed weights", "do without packing, or use a smaller checkpoint")
        pack_matrices(model)
    return model


def _require_memory(model: PaliGemma, dtype: torch.dtype | None, device: torch.device | str) -> None:
    decoder = list(model.language_model.parameters())
    rest = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()]
    needed = bytes_needed(decoder, None, "cpu", bytes_per_weight=1) + bytes_needed(rest, dtype, device)
    require_memory(needed, device, "the weights in int8", "use a smaller checkpoint, or a machine with more")


def _check_pair(folder: Path, config: PaliGemmaConfig, processor: Processor) -> None:
    pairs = {
        "the id of <image>": (config.image_token_id, processor.tokenizer.image_id, "tokenizer.json"),
        "the picture's side": (config.vision.image_size, processor.image_processor.image_size, PICTURES),
    }
    _require_equal(folder, pairs)


def _check_pairs(folder: Path, config: CLIPConfig | SiglipConfig, processor: PairProcessor) -> None:
    pairs = {"the picture's side": (config.vision.image_size, processor.image_processor.image_size, PICTURES)}
    # 2 stands in old files by mistake, see `CLIPTextConfig`.
    if isinstance(config, CLIPConfig) and config.text.eos_token_id != 2:
        pairs["the id of the end"] = (config.text.eos_token_id, processor.tokenizer.eos_id, "tokenizer.json")
    _require_equal(folder, pairs)
    if processor.tokenizer.vocab_size > config.text.vocab_size:
        raise InputError(
            f"in {folder}, tokenizer.json has {processor.tokenizer.vocab_size} tokens and the model knows "
            f"{config.text.vocab_size}: take all files from the same checkpoint"
        )


def _require_equal(folder: Path, pairs: dict[str, tuple[int, int, str]]) -> None:
    for what, (expected, found, file) in pairs.items():
        if found != expected:
            raise InputError(
                f"in {folder}, {what} is {expected} by config.json and {found} by {file}: take all files "
                "from the same checkpoint"
            )
