"""Write a folder of the shapes of a published PaliGemma, Qwen2-VL, DeepSeek-VL or Llama, with random weights.

Run: python bench/make_checkpoint.py paligemma-3b-pt-224 --out FOLDER
     python bench/make_checkpoint.py qwen2-vl-2b --out FOLDER
     python bench/make_checkpoint.py deepseek-vl-1.3b --out FOLDER
     python bench/make_checkpoint.py deepseek-vl2-tiny --out FOLDER
     python bench/make_checkpoint.py llama-3.2-11b-vision-instruct --out FOLDER

PaliGemma's weights and Llama's lie behind a license. What loading and answering cost does not depend on the
numbers in the files, only on how many there are and how they are laid out; and that is as published: the
names of the Hub, bfloat16 in shards of up to 5 GB with an index, no second copy of a tied head, an embedding
table of as many rows, and a config.json that leaves out what the published one leaves out.

The numbers are normal, of such a size that every layer gives out about what it got: nothing overflows. They
are cut from one block of random numbers, from a place that depends on the tensor's name, so that pictures of
448 pixels have the same weights as those of 224, position embeddings aside. The length of the block is prime,
so that no two rows of a table are equal.

The tokenizer has as many words as the published one and the same ids for what marks pictures, boxes and
turns, but other words: every letter, and runs of two to four letters. A text has a few more tokens than with
the published one. What such a model answers means nothing: under random attention the states of a long prompt
grow alike, and one word is repeated. To compare two programs on such a folder, compare logits.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from published import deepseek_vl, deepseek_vl2, llama_vision, paligemma, qwen2_vl
from published.family import Family
from torch import Tensor

from minivlm import PaliGemmaConfig
from minivlm.checkpoints.layouts import as_in_file
from minivlm.checkpoints.weights import INDEX
from minivlm.errors import InputError
from minivlm.models.deepseek_vl import DeepseekVLConfig
from minivlm.models.deepseek_vl2 import DeepseekVL2Config
from minivlm.models.llama_vision import LlamaVisionConfig
from minivlm.models.qwen2_5_vl import Qwen2_5_VLConfig
from minivlm.models.qwen2_vl import Qwen2VLConfig

SHARD = 5_000_000_000  # bytes, as the published folders are cut
BLOCK = 2**24 + 43  # random numbers, a prime
MIB = 2**20
TOKENIZER_BYTES = 32 * MIB  # about

FAMILIES: dict[type[Any], Family] = {
    PaliGemmaConfig: paligemma.PALIGEMMA,
    Qwen2VLConfig: qwen2_vl.QWEN2_VL,
    Qwen2_5_VLConfig: qwen2_vl.QWEN2_5_VL,
    DeepseekVLConfig: deepseek_vl.DEEPSEEK_VL,
    DeepseekVL2Config: deepseek_vl2.DEEPSEEK_VL2,
    LlamaVisionConfig: llama_vision.LLAMA_VISION,
}
MODULES = (paligemma, qwen2_vl, deepseek_vl, deepseek_vl2, llama_vision)
PUBLISHED: dict[str, Any] = {  # a config of one of these classes for each name
    name: config for module in MODULES for name, config in sorted(module.PUBLISHED.items())
}


def make_checkpoint(config: Any, folder: Path, seed: int = 0, shard: int = SHARD) -> int:
    """Write a whole checkpoint of random bfloat16 weights and return the bytes of its weights.

    Args:
        folder: is made, and must not be there yet. It takes its name when it is complete.
        shard: bytes of a file of weights at most, larger tensors aside.

    Raises InputError: the folder exists, the disk has too little room, or the folder cannot be written.
    """
    shapes = shapes_of(config)
    total = sum(tensor.nbytes for tensor in shapes.values())

    if folder.exists():
        raise InputError(f"{folder} exists: choose another folder, or delete it first")
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < total + TOKENIZER_BYTES:
            raise InputError(
                f"{folder} needs {(total + TOKENIZER_BYTES) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
                "there: make room, or choose another disk"
            )
        _write_small_files(config, aside)
        _write_weights(shapes, total, aside, seed, shard, FAMILIES[type(config)].ones)
        aside.rename(folder)
    except FileExistsError as error:
        raise InputError(f"{aside} is left of a run that was killed, or still runs: delete it") from error
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror or error
        raise InputError(f"cannot write {folder}: {reason}. Choose another folder") from error
    except BaseException:  # also Ctrl-C: gigabytes that nobody asked for are not left lying
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return total


def shapes_of(config: Any) -> dict[str, Tensor]:
    """The tensors of the whole checkpoint, without their numbers."""
    family = FAMILIES[type(config)]
    with torch.device("meta"):
        model = family.model(config).to(torch.bfloat16)
        unread = {name: torch.empty(shape).bfloat16() for name, shape in family.unread(config).items()}
    return as_in_file(model.state_dict(), family.layout) | unread


def _write_small_files(config: Any, folder: Path) -> None:
    FAMILIES[type(config)].write_processor(config, folder)
    if FAMILIES[type(config)].generation:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    _write_json(folder / "config.json", published_config(config))


def published_config(config: Any) -> dict[str, Any]:
    """config.json with the gaps of the published ones: values that a reader has to know are left out."""
    return FAMILIES[type(config)].config_json(config) | {"torch_dtype": "bfloat16"}


def _write_weights(
    shapes: dict[str, Tensor], total: int, folder: Path, seed: int, shard: int, ones: tuple[str, ...]
) -> None:
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
    for file, names in split.filename_to_tensors.items():
        _write_shard(folder / file, {name: shapes[name] for name in names}, block, ones)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX, index)


def _write_shard(path: Path, shapes: dict[str, Tensor], block: Tensor, ones: tuple[str, ...]) -> None:
    """One safetensors file (length of the header, header, numbers), piece by piece.

    `save_file` would want all of its 5 GB in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, tensor in shapes.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in shapes.items():
            for numbers in _random(name, tensor.shape, block, ones):
                file.write(numbers.view(torch.uint8).numpy().data)


def _random(name: str, shape: torch.Size, block: Tensor, ones: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """The numbers of one tensor in order, bfloat16, in pieces of up to the block's length.

    They are around 1 if its name ends with one of `ones`, and else around 0.
    """
    mean = 1.0 if name.endswith(ones) else 0.0
    # Sums of fan_in products keep the size of their inputs.
    std = (shape.numel() / shape[0]) ** -0.5 if len(shape) > 1 else 0.02
    if name.endswith("embed_tokens.weight"):
        std *= 0.1  # the head is the same table: with large rows, the answer to a word would be that word
    left, place = shape.numel(), zlib.crc32(name.encode()) % len(block)
    while left:
        piece = block[place : place + left]
        yield (mean + std * piece).to(torch.bfloat16)
        left, place = left - len(piece), 0


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _known_name(text: str) -> str:
    name = text.rpartition("/")[2].lower()
    if name not in PUBLISHED:
        name = re.sub("-(instruct|chat|base)$", "", name)
    if name not in PUBLISHED:
        raise argparse.ArgumentTypeError(f"there is no {text!r}: choose from {', '.join(PUBLISHED)}")
    return name


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", type=_known_name, help="such as paligemma-3b-pt-224, qwen2-vl-2b")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    options = parser.parse_args()
    begin = time.perf_counter()
    try:
        total = make_checkpoint(PUBLISHED[options.name], options.out, options.seed)
    except InputError as error:
        sys.exit(f"make_checkpoint: error: {error}")
    print(f"{options.out}: {total / 1e9:.2f} GB of weights in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
