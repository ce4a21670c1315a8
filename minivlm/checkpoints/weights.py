"""Checkpoint folders in the Hub's format: config.json, and tensors in *.safetensors.

Only safetensors are read, because a pickle can run code. The files are memory-mapped: a tensor of a loaded
model *is* a part of the file, read from disk when it is first used, so there is no second copy. The mapping
is private: training changes the model's memory, never the file.

Loading is all or nothing. A tensor that is missing, unexpected or misshapen is an error that names it, since
a model with a few random weights still answers, only wrongly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.checkpoints.devices import bytes_needed, check_dtype, gigabytes, require_memory
from minivlm.checkpoints.hub import GENERATION, few, read_json, refuse_pickles, special_ids
from minivlm.checkpoints.layouts import UNUSED, Layout, as_in_file, join, names_in, split, to_file, to_ours
from minivlm.errors import InputError
from minivlm.files import write_aside

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
ROUNDED = "quantized.safetensors"  # in place of WEIGHTS: no other program takes it for weights that it knows
AS_IT_IS: dict[str, Layout] = {"as it is": [("", "")]}  # the names of our modules
# Looking for NaN reads every byte. Up to this size (bytes) it is cheap; above it, `generate` still checks
# the logits of every token.
CHECKED_SIZE = 256 * 2**20

# A buffer in old files that counts 0, 1, 2, ...; no model here reads it from a file.
IGNORED_BUFFER = re.compile(r"(^|\.)embeddings\.position_ids$")

# Of tensors that share memory, safetensors stores one: of a tied head and table, that may be the head.
HEAD, TABLE = "language_model.lm_head.weight", "language_model.embed_tokens.weight"

Config = TypeVar("Config")
AnswerConfig = TypeVar("AnswerConfig", bound="HasText")
Model = TypeVar("Model", bound=nn.Module)


class HasText(Protocol):
    """A config with a decoder's part."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def text(self) -> Any:
        """The decoder's part."""


class Rounding(NamedTuple):
    """How a folder holds rounded weights, which `minivlm.models.quantized` knows how to make and to read."""

    replace: Callable[[nn.Module], None]  # a model's layers, while they have shapes alone
    finish: Callable[[nn.Module], None]  # once they have their values
    config: Mapping[str, Any]  # what config.json says beside the model's own
    leave_out: tuple[str, ...] = ()  # names of ours that are not written


_rounding: ContextVar[Rounding | None] = ContextVar("rounding", default=None)


@contextmanager
def rounded_by(rounding: Rounding) -> Iterator[None]:
    """Folders that are opened or written inside hold rounded weights, with the names of our modules."""
    token = _rounding.set(rounding)
    try:
        yield
    finally:
        _rounding.reset(token)


def read_tensors(folder: Path, file: str = WEIGHTS) -> dict[str, Tensor]:
    """All tensors of a folder, under their names in the file, memory-mapped.

    Args:
        file: the one that holds them. model.safetensors may also be in shards, with an index.

    Raises InputError: no safetensors, a shard that the index names is missing, a tensor in two shards, or a
    damaged file.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder, file):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is not a dict
                    if name in tensors:
                        raise InputError(
                            f"{folder} has {name} in two files: which one counts is unknown, download the "
                            "folder again"
                        )
                    tensors[name] = opened.get_tensor(name)
        except MemoryError as error:
            raise InputError(
                f"{path} does not fit into the address space of this process: raise the limit (`ulimit -v`)"
            ) from error
        except (SafetensorError, OSError) as error:
            # A file in the Hub's cache is a link. If only the link is deleted, the same file is linked again.
            remedy = (
                f"delete {path.resolve()} and download it again" if path.is_symlink() else "download it again"
            )
            raise InputError(f"{path} is damaged or incomplete ({error}): {remedy}") from error
    return tensors


def _weight_files(folder: Path, file: str) -> list[Path]:
    if file == WEIGHTS and _rounding.get() is not None:
        file = ROUNDED
    if (folder / file).is_file():
        return [folder / file]
    if file == WEIGHTS and (folder / INDEX).is_file():
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map: download the file again")
        odd = [name for name, shard in weight_map.items() if not isinstance(shard, str)]
        if odd:
            raise InputError(f"{folder / INDEX} names no file for {few(odd)}: download the file again")
        shards = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            cut = any((folder / ".cache" / "huggingface").rglob("*.incomplete"))
            raise InputError(
                f"{folder} lacks {few(missing)}, named in {INDEX}: "
                + (
                    "its download was interrupted, run the same `hf download` again"
                    if cut
                    else "download the folder again"
                )
            )
        return shards
    refuse_pickles(folder, (path.name for path in folder.iterdir()))
    if file == WEIGHTS and (folder / ROUNDED).is_file():
        raise InputError(
            f"{folder} has its weights rounded, in {ROUNDED}: open it with minivlm.load, or take the folder "
            "that it was made from"
        )
    wanted = f"neither {WEIGHTS} nor {INDEX}" if file == WEIGHTS else f"no {file}"
    raise InputError(f"{folder} has {wanted}: download the weights as well")


def load_model(
    cls: Callable[[Config], Model],
    config: Config,
    folder: Path,
    layouts: dict[str, Layout],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    file: str = WEIGHTS,
    elsewhere: Mapping[str, Tensor] | None = None,
) -> Model:
    """Build `cls(config)` with the weights of a folder, in evaluation mode and ready to be trained.

    Args:
        layouts: the names that the file may use; the layout that matches best is taken.
        elsewhere: weights that the folder leaves out, with our names.
        dtype: None keeps the file's. A conversion copies, one tensor at a time.
        device: where the weights go; on "cpu" and in the file's dtype they stay in the mapped file.
        file: as in `read_tensors`.

    Raises:
        InputError: the tensors do not fit the config, or contain NaN or infinity (folders up to 256 MB); the
            device cannot compute in the dtype, or has too little memory free for the copies.
    """
    found, rounding = read_tensors(folder, file), _rounding.get()
    with torch.device("meta"), _Uninitialized():  # shapes without memory: the values come from the file
        model = cls(config)
    if rounding is not None:
        rounding.replace(model)
        layouts = AS_IT_IS
    layout_name, layout = max(
        layouts.items(), key=lambda item: sum(to_ours(name, item[1]) is not None for name in found)
    )
    elsewhere = elsewhere or {}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in elsewhere}
    tensors, problems = _fit(found, layout, wanted)
    if problems:
        raise InputError(
            f"the tensors of {folder} do not fit its config.json (closest of the layouts "
            f"{', '.join(layouts)}: {layout_name}): {'; '.join(problems)}. All files must come from one "
            "checkpoint: download it again"
        )
    kind = next(iter(found.values())).dtype
    tensors |= {name: tensor.to(kind) for name, tensor in elsewhere.items()}
    _check_device(folder, tensors, dtype, device)
    converted = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    if sum(tensor.nbytes for tensor in tensors.values()) <= CHECKED_SIZE:
        _check_finite(folder, tensors, converted)
    model.load_state_dict(converted, assign=True)
    for module in model.modules():
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:  # buffers that are in no file are still on the meta device
            reset_buffers()
    if rounding is not None:
        rounding.finish(model)
    return model.eval()


def with_other_files(folder: Path, config: AnswerConfig) -> AnswerConfig:
    """A config of a model that answers, with what other files of its folder say: they win over config.json.

    The head is untied if the weights have both a head and an embedding table. An id that is not in
    generation_config.json is that of config.json; transformers would then answer without an end.
    """
    names = read_tensors(folder)
    if all(any(name.endswith(end) for name in names) for end in ("lm_head.weight", "embed_tokens.weight")):
        config = replace(config, text=replace(config.text, tie_word_embeddings=False))
    return with_generation_ids(folder, config)


def with_generation_ids(folder: Path, config: AnswerConfig) -> AnswerConfig:
    """A config with the ids of pad, bos and eos that generation_config.json has, where there is one."""
    has_file = (folder / GENERATION).is_file()
    return replace(config, **special_ids(read_json(folder, GENERATION))) if has_file else config


class _Uninitialized(TorchFunctionMode):
    """Skips `torch.nn.init`. Drawing random numbers on the meta device would be a waste of time, and the
    first draw imports PyTorch's compiler, which takes longer than the rest of loading.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _fit(
    found: Mapping[str, Tensor], layout: Layout, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under our names, and a line for each kind of problem, with the file's names."""
    tensors: dict[str, Tensor] = {}
    unexpected, misshapen = [], []
    for name, tensor in found.items():
        if IGNORED_BUFFER.search(name):
            continue
        ours = to_ours(name, layout)
        if ours is not None and ours.startswith(UNUSED):
            continue
        if ours == HEAD and HEAD not in wanted:
            ours = TABLE
        places = names_in(ours) if ours is not None else []
        if ours is None or any(place not in wanted or place in tensors for place in places):
            unexpected.append(name)
            continue
        expected = join([wanted[place] for place in places], ours)
        fits = tensor.shape == expected.shape
        parts = split(tensor, ours) if fits else [tensor] * len(places)
        tensors |= zip(places, parts, strict=True)
        if not fits:
            misshapen.append(f"{name} is {list(tensor.shape)}, expected {list(expected.shape)}")
        elif expected.is_floating_point() and not tensor.is_floating_point():
            misshapen.append(f"{name} is {tensor.dtype}, expected floating point (no quantized files)")
    missing = list(dict.fromkeys(to_file(name, layout) for name in wanted if name not in tensors))
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or type": misshapen}
    return tensors, [f"{len(names)} {kind}: {few(names)}" for kind, names in kinds.items() if names]


def _check_device(
    folder: Path, found: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Refuse what would fail only after gigabytes are read."""
    numbers = [tensor for tensor in found.values() if tensor.is_floating_point()]
    for kind in {dtype} if dtype is not None else {tensor.dtype for tensor in numbers}:
        check_dtype(kind, device)
    rounded = bytes_needed((one for one in found.values() if not one.is_floating_point()), None, device)
    needed = rounded + bytes_needed(numbers, dtype, device)
    smaller = rounded + bytes_needed(numbers, torch.bfloat16, device)
    advice = "use a smaller checkpoint, or a machine with more memory"
    if smaller < needed:
        takes = (
            f"which takes {gigabytes(smaller)}" if smaller else "which stays in the file and needs no memory"
        )
        advice = f"load it as bfloat16 (dtype=torch.bfloat16, --dtype bfloat16), {takes}; or {advice}"
    require_memory(needed, device, f"the weights of {folder}" + (f" as {dtype}" if dtype else ""), advice)


def _check_finite(folder: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in after.items() if not torch.isfinite(tensor).all()]
    damaged = [name for name in bad if not torch.isfinite(before[name]).all()]
    if damaged:
        raise InputError(
            f"{folder} contains NaN or infinity in {few(damaged)}: it is damaged, download it again"
        )
    if bad:
        raise InputError(
            f"{few(bad)} in {folder}: numbers too large for {after[bad[0]].dtype}. Use torch.bfloat16 or "
            "torch.float32"
        )


def save_model(
    model: nn.Module,
    config: Mapping[str, Any],
    folder: Path,
    layout: Layout,
    names: tuple[str, str] = (CONFIG, WEIGHTS),
    generation: Mapping[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
) -> None:
    """Write config.json and model.safetensors, or two files of other `names`, as in a layout.

    Weights whose names here begin as `leave_out` says are not written.

    The ids of pad, bos and eos of a model that has them are written to generation_config.json, too, beside
    what `generation` has. All files are complete before any replaces an old one, so a failure leaves the old
    folder as it was, and a model may be saved into the folder that its own weights are mapped from. A head
    that is tied to the embedding table is not written twice.

    Raises:
        InputError: the folder cannot be written, for example because the disk is full; the model is
            quantized or packed, or wears adapters.
    """
    rounding = _rounding.get()
    if rounding is not None:
        layout, names = AS_IT_IS["as it is"], (names[0], ROUNDED)
        config, leave_out = {**config, **rounding.config}, (*leave_out, *rounding.leave_out)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(leave_out)}
    if rounding is None and any(tensor.dtype == torch.int8 for tensor in state.values()):
        raise InputError(
            "a quantized model cannot be saved as one of the Hub: save it before quantizing, and quantize it "
            "when loading; or write a folder for this package alone with "
            "minivlm.models.quantized.save_quantized"
        )
    if any(tensor.is_mkldnn for tensor in state.values()):
        raise InputError("a packed model cannot be saved: save it before packing, and pack it when loading")
    if any(name.endswith(".lora_A") for name in state):
        raise InputError(
            "the model wears adapters, which are no part of a checkpoint: save an adapter on its own, and "
            "take it off or merge it for good before saving the model"
        )
    tensors = {name: tensor.contiguous() for name, tensor in as_in_file(state, layout).items()}
    texts = {names[0]: config}
    ids = special_ids(config)
    if ids:  # a file that is there already would win over config.json
        texts[GENERATION] = {**(generation or {}), **ids}
    with ExitStack() as files:
        paths = {name: files.enter_context(write_aside(folder / name)) for name in (*texts, names[1])}
        for name, values in texts.items():
            paths[name].write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        # transformers refuses a file without this line of metadata
        save_file(tensors, paths[names[1]], metadata={"format": "pt"})
