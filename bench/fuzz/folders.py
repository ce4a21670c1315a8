"""Random folders, opened here and by transformers: is anything computed otherwise without a word?

    python bench/fuzz/folders.py --folders 500 --seed 0

Each folder holds a tiny system with random weights that transformers saved, and a config.json in which up to
three values were changed, to what real files hold and to what they should not. Both programs open it. What
may happen: both give the same logits and stop at the same token; this package refuses by name. What may not:
other numbers without a word, and any exception that is not an `InputError`. Folders that transformers itself
cannot open or run are counted, and only have to end in a refusal or in an answer here.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPModel,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipModel,
    ViTForImageClassification,
    logging,
)

from minivlm import CLIP, InputError, PaliGemma, SigLIP, ViT

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14, "num_channels": 3,
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 120, "max_position_embeddings": 64}
PALIGEMMA = {
    "model_type": "paligemma", "image_token_index": 119, "projection_dim": 32, "hidden_size": 32,
    "bos_token_id": 2,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "paligemma": PALIGEMMA
    | {
        "text_config": DECODER | {"model_type": "gemma"},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "paligemma2": PALIGEMMA
    | {
        "text_config": DECODER | {"model_type": "gemma2", "query_pre_attn_scalar": 5, "sliding_window": 6},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "clip": {
        "model_type": "clip", "projection_dim": 20,
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "text_config": TEXT
        | {"model_type": "clip_text_model", "vocab_size": 99, "max_position_embeddings": 10,
        "bos_token_id": 97,
           "eos_token_id": 98, "pad_token_id": 0},
    },
    "siglip": {
        "model_type": "siglip", "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "text_config": TEXT
        | {"hidden_size": 24, "model_type": "siglip_text_model", "vocab_size": 99,
        "max_position_embeddings": 10},
    },
    "vit": VISION | {"model_type": "vit", "id2label": {"0": "cat", "1": "dog", "2": "star"},
                     "label2id": {"cat": 0, "dog": 1, "star": 2}},
}  # fmt: skip
CLASSES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "paligemma": (PaliGemmaForConditionalGeneration, PaliGemma),
    "paligemma2": (PaliGemmaForConditionalGeneration, PaliGemma),
    "clip": (CLIPModel, CLIP),
    "siglip": (SiglipModel, SigLIP),
    "vit": (ViTForImageClassification, ViT),
}
MISSING = object()
ODD: list[Any] = [
    None,
    MISSING,
    0,
    -1,
    1,
    2,
    2.5,
    1e9,
    "4",
    "no",
    "",
    True,
    False,
    [],
    [4],
    [28, 28],
    {},
    1e-3,
]
ACTIVATIONS = [
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "relu",
    "gelu_fast",
    "swish",
    "tanh",
]
IDS = [1, 0, 7, 118, [1, 7], [7], [], None, MISSING, "1", -1, 10**6]
# What is tried more often than by chance: field -> values that some published file holds, or nearly does.
KNOWN: dict[str, list[Any]] = {
    "hidden_act": ACTIVATIONS,
    "hidden_activation": [*ACTIVATIONS, None],
    "eos_token_id": IDS,
    "bos_token_id": IDS,
    "pad_token_id": IDS,
    "rope_theta": [10000.0, 5000.0, 100, "10000"],
    "rope_scaling": [
        None, {"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0},
        {"type": "default"},
        {"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}, [], "linear",
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 500.0}, {"rope_theta": 500.0}, {"rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 10000.0}, [], {}, None, {"type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ],
    "final_logit_softcapping": [None, 30.0, 2.0, 0, "30"],
    "attn_logit_softcapping": [None, 50.0, 2.0, 0],
    "tie_word_embeddings": [True, False, "no", None, 0],
    "attention_bias": [True, False],
    "attention_dropout": [0.5, 0.0],
    "rms_norm_eps": [1e-6, 1e-2, "1e-6", 0],
    "layer_norm_eps": [1e-6, 1e-2, "1e-6", 0],
    "sliding_window": [1, 4, 4096, None, 2.5, 0, "4"],
    "query_pre_attn_scalar": [8, 5, 144, None, 2.5],
    "layer_types": [["full_attention", "full_attention"], ["sliding_attention", "full_attention"], None,
    []],
    "use_bidirectional_attention": [True, False, None],
    "qkv_bias": [True, False],
    "pooler_act": ["tanh", "relu", None],
    "pooler_output_size": [8, None],
    "projection_size": [12, 24, None],
    "vision_use_head": [True, False, None],
    "image_token_id": [119, 118, 130, None],
    "image_token_index": [119, 118, 130, None],
    "projection_dim": [20, 32, 16, None],
    "model_type": ["gemma", "gemma2", "gemma3_text", "llama", "clip_text_model", "siglip_text_model", None],
    "image_size": [28, 42, [28, 28], "28", [28, 42]],
    "patch_size": [14, 7, [14, 14], "14"],
    "id2label": [{"0": "cat", "1": "dog", "2": "star"}, {"0": "cat"}, None, [], ["cat", "dog", "star"]],
    "num_labels": [3, 2, None],
    "head_dim": [8, 4, None, MISSING],
    "num_key_value_heads": [2, 1, 4, 0, 3, None, "2"],
    "logit_scale_init_value": [2.6592, 1.0],
    "dtype": ["float32", "bfloat16", None],
    "torch_dtype": ["float32", "float16"],
    "is_encoder_decoder": [True, False],
    "use_cache": [True, False, None],
    "initializer_range": [0.02, 1.0],
}  # fmt: skip


def mutate(values: dict[str, Any], rng: random.Random) -> list[str]:
    """Change one value of a config.json, or move it; returns what was done, in words."""
    parts = [values, *(part for part in values.values() if isinstance(part, dict) and "hidden_size" in part)]
    part = rng.choice(parts)
    where = next((name for name, other in values.items() if other is part), "top")
    kind = rng.random()
    if kind < 0.6:
        name = rng.choice(sorted(KNOWN))
        value = rng.choice(KNOWN[name])
    elif kind < 0.95:
        name = rng.choice(
            sorted(name for name in part if not isinstance(part[name], dict)) or ["hidden_size"]
        )
        value = rng.choice(ODD)
    else:  # another place: a part under its old name, or missing, or of another type
        name = rng.choice(["text_config", "vision_config"])
        if name not in values:
            return mutate(values, rng)
        if rng.random() < 0.5:
            values[f"{name}_dict"] = copy.deepcopy(values[name])
            return [f"{name}_dict = a copy"]
        value, part, where = rng.choice([None, MISSING, [], "gemma"]), values, "top"
    if value is MISSING:
        part.pop(name, None)
        return [f"{where}: no {name}"]
    part[name] = copy.deepcopy(value)
    return [f"{where}: {name} = {json.dumps(value)}"]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights so large that a difference shows, LayerNorm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight += 1


def make_folder(system: str, folder: Path, rng: random.Random, seed: int) -> list[str]:
    """A folder as transformers saves it, then changed. Returns the changes."""
    before = copy.deepcopy(BASES[system])
    changes: list[str] = []
    built = None
    if rng.random() < 0.5:  # the weights fit the changed config, where transformers can build it at all
        changed = copy.deepcopy(before)
        for _ in range(rng.randint(1, 3)):
            changes += mutate(changed, rng)
        try:
            built = build(system, changed)
            values = changed
            if sum(parameter.numel() for parameter in built.parameters()) > 10**7:
                built, changes = None, []  # gigabytes, for nothing that a small one would not show
        except Exception:
            built, changes = None, []
    if built is None:
        built, values = build(system, before), copy.deepcopy(before)
        for _ in range(rng.randint(1, 3)):
            changes += mutate(values, rng)
    randomize(built, seed)
    built.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    generation = folder / "generation_config.json"
    if rng.random() < 0.5:
        generation.unlink(missing_ok=True)
    elif generation.exists() and rng.random() < 0.6:
        name, value = rng.choice(["eos_token_id", "pad_token_id", "bos_token_id"]), rng.choice(IDS)
        stored = json.loads(generation.read_text())
        stored.pop(name, None)
        if value is not MISSING:
            stored[name] = value
        generation.write_text(json.dumps(stored))
        changes.append(f"generation_config: {name} = {'missing' if value is MISSING else json.dumps(value)}")
    return changes


def build(system: str, values: dict[str, Any]) -> PreTrainedModel:
    """The reference's model of a config, untrained."""
    fields = copy.deepcopy(values)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return CLASSES[system][0](config)


def outputs(system: str, model: Any, ours: bool, seed: int) -> list[Tensor]:
    """Numbers, then tokens, of one of the two programs; the same inputs for both."""
    generator = torch.Generator().manual_seed(seed)
    size = 28
    config = model.config
    sides = [
        getattr(config, "image_size", None),
        getattr(getattr(config, "vision_config", None), "image_size", None),
    ]
    if not ours:
        size = next((side for side in sides if isinstance(side, int)), 28)
    else:
        parts = (config, getattr(config, "vision", None))
        size = next((part.image_size for part in parts if hasattr(part, "image_size")), 28)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    words = torch.randint(3, 90, (2, 5), generator=generator)
    with torch.no_grad():
        if system.startswith("paligemma"):
            image_id = config.image_token_id
            vision = config.vision if ours else config.vision_config
            count = (vision.image_size // vision.patch_size) ** 2
            ids = torch.cat([torch.full((2, count), image_id), torch.full((2, 1), 2), words], dim=1)
            types, mask = torch.zeros_like(ids), torch.ones_like(ids)
            logits = model(
                input_ids=ids, pixel_values=pixels, token_type_ids=types, attention_mask=mask
            ).logits  # fmt: skip
            if ours:
                new = model.generate(ids, max_new_tokens=24, pixel_values=pixels)
            else:
                new = model.generate(
                    input_ids=ids, pixel_values=pixels, token_type_ids=types, attention_mask=mask,
                    max_new_tokens=24,
                    do_sample=False,
                )[:, ids.shape[1] :]  # fmt: skip
            return [logits, new]
        if system == "vit":
            return [model(pixels) if ours else model(pixel_values=pixels).logits]
        if system == "clip":
            text = config.text if ours else config.text_config
            eos = text.eos_token_id if text.eos_token_id in range(3, 99) else 98
            words = torch.cat([torch.full((2, 1), 97), words[:, :3], torch.full((2, 1), eos)], dim=1)
        else:
            words = torch.randint(3, 90, (2, 10), generator=generator)
        if ours:
            images, texts = model.encode_image(pixels), model.encode_text(words)
            return [model.logits(images, texts)]
        return [model(input_ids=words, pixel_values=pixels).logits_per_image]


def both(system: str, folder: Path, seed: int) -> tuple[Any, Any]:
    """What transformers and this package make of a folder: outputs or exceptions."""
    theirs, ours = CLASSES[system]

    def open_theirs() -> list[Tensor]:
        model = theirs.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return outputs(system, model.eval(), False, seed)

    return attempt(open_theirs), attempt(lambda: outputs(system, ours.from_pretrained(folder), True, seed))


def attempt(function: Callable[[], list[Tensor]]) -> list[Tensor] | Exception:
    try:
        return function()
    except Exception as error:
        return error


def verdict(ours: list[Tensor] | Exception, theirs: list[Tensor] | Exception) -> str:
    """One of: equal, refused, both fail, ours alone, DIFFERENT, TRACEBACK."""
    if isinstance(ours, InputError):
        return "refused" if not isinstance(theirs, Exception) else "both refuse"
    if isinstance(ours, ValueError) and isinstance(theirs, Exception):
        return "both refuse"  # these inputs
    if isinstance(ours, Exception):
        return "TRACEBACK"
    if isinstance(theirs, Exception):
        return "opened here alone"
    for mine, reference in zip(ours, theirs, strict=True):
        if mine.dtype.is_floating_point:
            if mine.shape != reference.shape:
                return "DIFFERENT"
            scale = reference.abs().max().clamp(min=1)
            if not float((mine - reference).abs().max() / scale) < 1e-3:
                return "DIFFERENT"
        else:  # after its end, a row may be padded or cut
            width = max(mine.shape[1], reference.shape[1])
            if mine.shape != reference.shape or not torch.equal(mine, reference):
                return f"DIFFERENT tokens of {width}"
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folders", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one folder, with what went wrong")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    systems = list(BASES)
    for number in range(options.folders) if options.only is None else [options.only]:
        rng = random.Random(f"{options.seed} {number}")
        system = systems[number % len(systems)]
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            changes = make_folder(system, folder, rng, number)
            theirs, ours = both(system, folder, number)
        finally:
            shutil.rmtree(folder)
        found = verdict(ours, theirs)
        counts[found.split(" tokens")[0]] += 1
        if found.startswith(("DIFFERENT", "TRACEBACK")) or options.only is not None:
            print(f"{number} {system}: {'; '.join(changes)}: {found}")
            for name, result in (("here", ours), ("transformers", theirs)):
                if isinstance(result, Exception):
                    print(f"   {name}: {type(result).__name__}: {str(result)[:200]}")
                    if options.only is not None:
                        traceback.print_exception(result)
    print(f"{sum(counts.values())} folders, seed {options.seed}: {dict(counts)}")


if __name__ == "__main__":
    main()
