"""One picture, one prompt, one answer, and what went on inside: the tensors that measures.py measures.
For two towers: one picture, one text, and how well they fit.

The model answers as always. Then it reads picture, prompt and its own answer once more in one pass, with
every attention map kept. A word is written by the position before it, so the row of attention that belongs
to a word is that of the token before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minivlm import masks
from minivlm.attention import record_attention
from minivlm.looking.measures import attention_rollout, log_odds
from minivlm.losses import similarity
from minivlm.models.clip import CLIP
from minivlm.models.paligemma import PaliGemma
from minivlm.models.siglip import SigLIP
from minivlm.processing import PairProcessor, Processor


@dataclass(frozen=True)
class Inspection:
    """An answer of A words to a prompt about one picture of N patches. fp32, on the model's device."""

    answer: str
    words: list[str]  # A, the answer's tokens one by one
    pixel_values: Tensor  # [C, height, width], as the tower gets them
    tower: Tensor  # [layers, H, N, N], where patches look in the image tower
    attention: Tensor  # [A, layers, H, N], where the writer of each word looks in the decoder; the rest: text
    rollout: Tensor  # [A, N], the same through all layers of decoder and tower, down to the patches
    image_tokens: Tensor  # [N, D], what the decoder gets in place of patches
    sureness: Callable[[Tensor], Tensor]  # pictures [B, C, height, width] -> [B], log-odds of the answer


@torch.no_grad()  # and not inference_mode, whose tensors would shut gradients out of `sureness`
def inspect_answer(
    model: PaliGemma, processor: Processor, picture: Image.Image, prompt: str, max_new_tokens: int = 64
) -> Inspection:
    """Let the model answer, and keep what went on inside.

    Raises InputError: as the processor and `PaliGemma.generate`.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in processor([picture], [prompt]).items()}
    written = model.generate(**inputs, max_new_tokens=max_new_tokens)[0].clone()  # [A]
    ids = written[written != model.config.eos_token_id]
    ids = ids if len(ids) else written[:1]  # an empty answer is the word <eos>
    answer = processor.decode(written[None])[0]
    words = [processor.tokenizer.decode([i], skip_special_tokens=False).strip(" ") for i in ids.tolist()]

    prompt_ids = inputs["input_ids"]  # [1, S - A]
    with record_attention() as maps:
        image_tokens = model.encode_image(inputs["pixel_values"])
        _read(model, prompt_ids, ids, image_tokens)
    layers = model.config.vision.num_hidden_layers
    tower, decoder = maps[:layers], maps[layers:]

    writers = slice(prompt_ids.shape[1] - 1, prompt_ids.shape[1] - 1 + len(ids))
    is_image = torch.cat([prompt_ids[0] == model.config.image_token_id, torch.zeros_like(ids).bool()])
    attention = torch.stack([layer[0, :, writers][..., is_image] for layer in decoder])  # [layers, H, A, N]
    rollout = attention_rollout(decoder)[0, writers][:, is_image] @ attention_rollout(tower)[0]

    def sureness(pixel_values: Tensor) -> Tensor:
        logits = _read(model, prompt_ids, ids, model.encode_image(pixel_values))
        return log_odds(logits, ids.expand(len(pixel_values), -1)).sum(dim=1)

    return Inspection(
        answer=answer,
        words=words,
        pixel_values=inputs["pixel_values"][0],
        tower=torch.stack([layer[0] for layer in tower]).float(),
        attention=attention.permute(2, 0, 1, 3).float(),
        rollout=rollout,
        image_tokens=image_tokens[0].float(),
        sureness=sureness,
    )


@dataclass(frozen=True)
class Match:
    """How well a text fits a picture of N patches, by two towers. fp32, on the model's device."""

    cosine: float
    pixel_values: Tensor  # [C, height, width], as the tower gets them
    tower: Tensor  # [layers, H, N, N], where patches look; rows sum to less than 1 beside a class token
    pooling: Tensor  # [H, N], what the picture's vector is made from, in the last step
    rollout: Tensor  # [N], the same through all layers of the tower
    match: Callable[[Tensor], Tensor]  # pictures [B, C, height, width] -> [B], the logit of this text


@torch.no_grad()
def inspect_match(model: CLIP | SigLIP, processor: PairProcessor, picture: Image.Image, text: str) -> Match:
    """Compare a picture with a text, and keep what went on inside the image tower.

    Raises InputError: as the processor.
    """
    inputs = processor(images=[picture], texts=[text])
    pixel_values, input_ids = (inputs[name].to(model.device) for name in ("pixel_values", "input_ids"))
    text_embeds = model.encode_text(input_ids)
    with record_attention() as maps:
        image_embeds = model.encode_image(pixel_values)
    layers = model.config.vision.num_hidden_layers
    if isinstance(model, CLIP):  # the class token is the first, and reads patches in every layer
        pooling = maps[layers - 1][0, :, 0, 1:]
        rollout = attention_rollout(maps)[0, 0, 1:]
        tower = torch.stack([layer[0, :, 1:, 1:] for layer in maps])
    else:  # the pooling head comes after the last layer, with one query
        pooling = maps[layers][0, :, 0]
        rollout = pooling.mean(dim=0) @ attention_rollout(maps[:layers])[0]
        tower = torch.stack([layer[0] for layer in maps[:layers]])
    return Match(
        cosine=float(similarity(image_embeds, text_embeds)),
        pixel_values=pixel_values[0],
        tower=tower.float(),
        pooling=pooling.float(),
        rollout=rollout.float(),
        match=lambda pictures: model.logits(model.encode_image(pictures), text_embeds)[:, 0],
    )


def _read(model: PaliGemma, prompt_ids: Tensor, answer_ids: Tensor, image_features: Tensor) -> Tensor:
    """Logits where the words of an answer are written: [1, S - A], [A], [B, N, D] -> [B, A, V].

    `PaliGemma.forward` would give the logits of all positions, most of which nobody asked for.
    """
    input_ids = torch.cat([prompt_ids, answer_ids[None]], dim=1).expand(len(image_features), -1)
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    prefix_lengths = torch.tensor([prompt_ids.shape[1]], device=input_ids.device)
    mask = masks.prefix_lm(position_ids, position_ids, prefix_lengths)
    hidden_states = model.language_model(model.merge(input_ids, image_features), position_ids, mask[:, None])
    return model.logits(hidden_states[:, prompt_ids.shape[1] - 1 : -1])
