"""One measurement of bench/inference.py, in a process of its own: prints its numbers as JSON.

A process of its own, because the largest memory that a process ever held can be asked for but not reset.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from inference_systems import system_of
from torch import Tensor

NEVER = -1  # an end-of-sequence id that no word has: every run writes the same number of tokens


def main() -> None:
    """`inference_worker.py JSON`: what to do, on which side; see `inference.py`."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"minivlm": Ours, "transformers": Theirs, "timm": Timm}
    side = kinds[job["side"].split()[0]](job)
    result = {"load": side.load_seconds, "copied": side.copied, **globals()[job["task"]](side, job)}
    result["peak"] = memory("VmHWM")
    if torch.cuda.is_available() and job["device"] == "cuda":
        result["peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


def dtype_of(job: dict[str, Any]) -> torch.dtype:
    """Of weights and pixels: bf16, where a job does not say another."""
    dtype: torch.dtype = getattr(torch, job.get("dtype", "bfloat16"))
    return dtype


def memory(name: str) -> int:
    """Bytes, from the process's status: VmHWM is the most it ever held, RssAnon what is in no file now.

    Linux only; elsewhere 0. (getrusage would hand down the peak of the process that started this one.)
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


# What our models read of a batch.
READ = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
    "aspect_ratio_ids",
)


class Ours:
    """minivlm: bf16, `int8` and `int4`, any of them compiled, and bf16 packed."""

    def __init__(self, job: dict[str, Any]) -> None:
        import minivlm
        from minivlm.speed import speed_up

        quantize = next((kind for kind in ("int8", "int4") if kind in job["side"]), None)
        dtype, folder = dtype_of(job), job["folder"]
        pack = "packed" in job["side"]
        self.system = system_of(Path(folder))
        self.processor = self.system.processor
        before, start = memory("RssAnon"), time.perf_counter()
        if quantize or pack:  # by `load`, which also reads the tokenizer: half a second
            self.model, _ = minivlm.load(
                folder, dtype=dtype, device=job["device"], quantize=quantize, pack=pack
            )
        else:
            model = self.system.model.from_pretrained(folder, dtype=dtype, device=job["device"])
            self.model = cast(Any, speed_up(model))
        self.load_seconds = time.perf_counter() - start
        self.copied = memory("RssAnon") - before
        self.size = self.processor.image_processor.image_size
        if "compiled" in job["side"]:
            from minivlm.speed.compiled import compile_parts

            compile_parts(self.model)

    @property
    def tower(self) -> Any:
        return self.model.vision_tower

    def first_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            hidden, _ = self.model.prefill(**{name: inputs[name] for name in READ if name in inputs})
            return self.model.logits(hidden).float()

    def tokens(self, inputs: dict[str, Tensor], count: int) -> Iterator[float]:
        """Seconds of each new token."""
        from minivlm.generate import stream

        inputs = {name: inputs[name] for name in READ if name in inputs}
        start = time.perf_counter()
        for token in stream(self.model, **inputs, max_new_tokens=count, eos_token_id=NEVER):
            token.tolist()
            now = time.perf_counter()
            yield now - start
            start = now

    def step_after(self, context: int) -> Any:
        """A function that reads one token with so many tokens before it."""
        from minivlm.cache import KVCache

        text = self.model.config.text
        cache = KVCache(
            text.num_hidden_layers, 1, text.num_key_value_heads, text.head_dim,
            dtype=torch.bfloat16, device=self.model.device,
        )  # fmt: skip
        cache.reserve(torch.ones(1, context, device=self.model.device))
        some = torch.randn(1, text.num_key_value_heads, context, text.head_dim, device=self.model.device)
        for layer in range(text.num_hidden_layers):
            cache.write(layer, some.bfloat16(), some.bfloat16())
        token = torch.ones(1, dtype=torch.long, device=self.model.device)

        @torch.inference_mode()
        def step() -> None:
            self.model.logits(self.model.decode(token, token > 0, cache)).argmax().item()

        return step


class Theirs:
    """transformers."""

    def __init__(self, job: dict[str, Any]) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        attention = "eager" if "eager" in job["side"] else None
        self.system = system_of(Path(job["folder"]))
        self.processor = self.system.processor
        before, start = memory("RssAnon"), time.perf_counter()
        self.model = self.system.open_peer(
            Path(job["folder"]), dtype=dtype_of(job), attn_implementation=attention
        )
        self.load_seconds = time.perf_counter() - start
        self.copied = memory("RssAnon") - before
        self.model.to(job["device"]).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        if "static" in job["side"]:
            self.model.generation_config.cache_implementation = "static"
        self.size = self.processor.image_processor.image_size

    @property
    def tower(self) -> Any:
        tower = self.model.model.vision_tower
        return lambda pixels: tower(pixel_values=pixels).last_hidden_state

    def first_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        inputs = self.system.told(inputs)
        with torch.inference_mode():
            return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def tokens(self, inputs: dict[str, Tensor], count: int) -> Iterator[float]:
        """Seconds of each new token."""
        inputs = self.system.told(inputs)
        times: list[float] = []
        start = time.perf_counter()

        def stop_at(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            nonlocal start
            input_ids[:, -1].tolist()
            now = time.perf_counter()
            times.append(now - start)
            start = now
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        with torch.inference_mode():
            self.model.generate(**inputs, max_new_tokens=count, do_sample=False, stopping_criteria=[stop_at])
        yield from times

    def step_after(self, context: int) -> Any:
        """A function that reads one token with so many tokens before it."""
        from transformers import DynamicCache

        text = self.model.config.text_config
        some = torch.randn(1, text.num_key_value_heads, context, text.head_dim, device=self.model.device)
        cache = DynamicCache(config=text)
        for layer in range(text.num_hidden_layers):
            cache.update(some.bfloat16(), some.bfloat16(), layer)
        token = torch.ones(1, 1, dtype=torch.long, device=self.model.device)
        position = context

        @torch.inference_mode()
        def step() -> None:
            nonlocal position
            position += 1
            self.model(
                input_ids=token,
                attention_mask=token.new_ones(1, position),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits.argmax().item()

        return step


class Timm:
    """timm's image tower of the same shape, with random weights; it reads no folder."""

    load_seconds, copied = 0.0, 0

    def __init__(self, job: dict[str, Any]) -> None:
        import timm

        from minivlm.checkpoints.hub import read_config
        from minivlm.models.paligemma import PaliGemmaConfig

        size = PaliGemmaConfig.from_dict(read_config(Path(job["folder"]))).vision.image_size
        model = timm.create_model("vit_so400m_patch14_siglip_224", img_size=size, num_classes=0)
        self.tower = model.to(job["device"], torch.bfloat16).eval().forward_features
        self.size = size


# ---- tasks -------------------------------------------------------------------------------------------------


def inputs_for(side: Any, job: dict[str, Any]) -> dict[str, Tensor]:
    """Gray noise as pictures and prompts of the wished length; in a batch they differ in length."""
    from PIL import Image

    from minivlm.processing.video import video_of

    torch.manual_seed(0)  # here: opening a model may have drawn numbers
    processor = side.processor
    width, height = job.get("size") or [side.size, side.size]
    if "frames" in job:  # read at their size, where a published budget would enlarge small frames
        processor.video_budget = replace(processor.video_budget, min_pixels=width * height)
    pictures, prompts = [], []
    for row in range(job["batch"]):
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
        picture = Image.fromarray(noise)
        pictures.append(video_of([picture] * job["frames"], fps=2) if "frames" in job else picture)
        prompts.append("what is it " * (1 + 2 * row))
    inputs: dict[str, Tensor] = processor(pictures, prompts)
    if (
        inputs["attention_mask"][:, -1].min() == 0
    ):  # transformers generates from rows that are padded on the left
        for row, mask in enumerate(inputs["attention_mask"]):
            shift = int((mask == 0).sum())
            for tensor in inputs.values():
                if tensor.shape[:2] == inputs["input_ids"].shape:
                    tensor[row] = tensor[row].roll(shift)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].to(dtype_of(job))
    asked: dict[str, Tensor] = side.system.asked(inputs)
    return {name: tensor.to(job["device"]) for name, tensor in asked.items()}


def answer(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first token, and of each further one, warm; the first logits go into a file."""
    inputs = inputs_for(side, job)
    logits = side.first_logits(inputs)
    torch.save(logits, job["logits"])
    prefill, decode = [], []
    for _ in range(job["repeats"]):
        first, *others = side.tokens(inputs, 1 + job["tokens"])
        prefill.append(first)
        decode += others
    real = int(inputs["attention_mask"].sum())
    return {"prefill": prefill, "decode": decode, "prompt": real, "width": inputs["input_ids"].shape[1]}


def load(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Nothing more than what the side's constructor did."""
    return {}


def context(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a token, by the number of tokens before it."""
    seconds = {}
    for length in job["lengths"]:
        step = side.step_after(length)
        step()
        seconds[length] = []
        for _ in range(job["tokens"]):
            start = time.perf_counter()
            step()
            seconds[length].append(time.perf_counter() - start)
    return {"seconds": seconds}


def tower(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the image tower alone."""
    pixels = torch.randn(job["batch"], 3, side.size, side.size).bfloat16().to(job["device"])
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + job["repeats"]):
            start = time.perf_counter()
            side.tower(pixels).float().sum().item()
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:]}


if __name__ == "__main__":
    main()
