"""What goes on inside a model: the tensors that measures.py measures, about one picture.

Of a model that answers: one prompt, its answer, and where each word of it comes from. The model answers as
always. Then it reads picture, prompt and its own answer once more in one pass, with every attention map kept.
A word is written by the position before it, so the row of attention that belongs to a word is that of the
token before.

Of a model that matches: one text, and how well it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from minivlm.attention import record_attention
from minivlm.looking.measures import attention_rollout, log_odds
from minivlm.looking.visible import visible
from minivlm.losses import similarity
from minivlm.models.protocols import (
    Answers,
    ConvolutionalTower,
    HasTiles,
    HasTwoTowers,
    Matches,
    MergesPatches,
    Resamples,
    SortsMaps,
    place_size,
)
from minivlm.processing import AnswerProcessor, PairProcessor, to_device
from minivlm.processing.inputs import Inputs

MOST_LOGITS = 2**28  # at a time, of all positions of several pictures: 1 GiB in fp32


@dataclass(frozen=True)
class Inspection:
    """An answer of A words to a prompt about one picture of N patches. fp32, on the model's device.

    Where a tower joins patches, N counts what it makes of them.
    """

    answer: str
    words: list[str]  # A, the answer's tokens one by one
    tokens: list[str]  # S, those of picture, prompt and answer; a newline is \\n
    visible: Tensor  # [S, S], boolean, who looks at whom in the decoder
    pixel_values: Tensor  # [C, height, width], as the tower gets them
    tower: Tensor | None  # [layers, H, N, N], where patches look; rows sum to less beside a class token
    attention: Tensor | None  # [A, layers, H, N], where the writer of each word looks in the decoder
    rollout: Tensor | None  # [A, N], the same through all layers of decoder and tower, down to the patches
    # [n, D], what the decoder reads in place of words, if it does; n = N where each patch keeps its place
    image_tokens: Tensor | None
    sureness: Callable[[Tensor], Tensor]  # pictures [B, C, height, width] -> [B], log-odds of the answer


@torch.no_grad()  # and not inference_mode, whose tensors would shut gradients out of `sureness`
def inspect_answer(
    model: Answers,
    processor: AnswerProcessor,
    picture: Image.Image,
    prompt: str,
    max_new_tokens: int = 64,
) -> Inspection:
    """Let the model answer, and keep what went on inside.

    Raises InputError: as the processor and the model's `generate`.
    """
    tokenizer = processor.tokenizer
    inputs = to_device(processor([picture], [prompt]), model.device)
    written = model.generate(**inputs, max_new_tokens=max_new_tokens)[0].clone()  # [A]
    ids = written[written != tokenizer.eos_id]
    ids = ids if len(ids) else written[:1]  # an empty answer is the word <eos>
    answer = processor.decode(written[None])[0]
    words = [tokenizer.decode([i], skip_special_tokens=False).strip(" ") for i in ids.tolist()]

    prompt_ids, shown = inputs["input_ids"], processor.to_pictures(inputs)  # [1, T], [1, C, height, width]
    input_ids = torch.cat([prompt_ids, ids[None]], dim=1)  # [1, T + A]
    token_type_ids = torch.zeros_like(input_ids)
    token_type_ids[:, prompt_ids.shape[1] :] = 1  # the answer, which is read from left to right
    writers = slice(prompt_ids.shape[1] - 1, input_ids.shape[1] - 1)

    def logits_of_words(pictures: Tensor) -> Tensor:
        """Where the words of the answer are written: [B, C, height, width] -> [B, A, V]."""
        rows = (len(pictures), -1)
        pixels = processor.from_pictures(pictures, inputs)
        output = model(input_ids.expand(rows), token_type_ids=token_type_ids.expand(rows), **pixels)
        return output.logits[:, writers]

    pixels = processor.from_pictures(shown, inputs)
    with record_attention() as encoding:
        image_tokens = model.encode_image(**pixels)
    with record_attention() as maps:
        vocabulary = logits_of_words(shown).shape[-1]
    is_image = (input_ids == tokenizer.image_id)[0]
    is_image[prompt_ids.shape[1] :] = False
    patches = math.prod(side // place_size(model.vision_tower) for side in shown.shape[2:])  # N
    maps = maps[len(encoding) :]  # before the decoder's come those of the picture, once more
    if isinstance(model.vision_tower, MergesPatches):
        encoding = model.vision_tower.token_maps(encoding, inputs["image_grid_thw"])
    if isinstance(model, HasTwoTowers):
        encoding = model.maps_of_tokens(encoding)
    tower, decoder, attention, rollout = _sorted(model, encoding, maps, is_image, patches, pixels)
    width = model.language_model.embed_tokens.weight.shape[1]
    image_tokens = image_tokens.view(1, *image_tokens.shape[-2:])
    in_row = image_tokens.shape[1:] == (int(is_image.sum()), width)
    has_tiles = isinstance(model, HasTiles)  # then more tokens than places are no class tokens
    at_once = max(1, MOST_LOGITS // (input_ids.shape[1] * vocabulary))  # pictures

    def sureness(pictures: Tensor) -> Tensor:
        pieces = pictures.split(at_once)
        odds = [log_odds(logits_of_words(piece), ids.expand(len(piece), -1)) for piece in pieces]
        return torch.cat(odds).sum(dim=1)

    return Inspection(
        answer=answer,
        words=words,
        tokens=[_shown(tokenizer.decode([i], skip_special_tokens=False)) for i in input_ids[0].tolist()],
        visible=visible(decoder),
        pixel_values=shown[0],
        tower=torch.stack([layer[0, :, -patches:, -patches:] for layer in tower]).float() if tower else None,
        attention=None if attention is None else attention[:, :, writers].permute(2, 0, 1, 3).float(),
        rollout=None if rollout is None else rollout[writers],
        image_tokens=image_tokens[0, 0 if has_tiles else -patches :].float() if in_row else None,
        sureness=sureness,
    )


def _sorted(
    model: Answers,
    encoding: list[Tensor],
    reading: list[Tensor],
    is_image: Tensor,
    patches: int,
    pixels: Inputs,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Attention maps by where they come from.

    Args:
        encoding, reading: maps [1, H, T, S] of the picture's way to the decoder, and of the decoder.
        is_image: [S], which tokens of the row are placeholders.
        patches: N. A class token comes before them; it may end in the tower, or be an image token as well.
        pixels: what the processor made of the picture.

    Returns:
        Those of the tower, those of the decoder among its own tokens, where each token looks in the picture
        [layers, H, S, N], and the same down to the patches through all layers [S, N].
    """
    if isinstance(model, SortsMaps):
        tower, decoder, attention = model.sort_maps(encoding, reading, pixels)
        if attention is None:
            return tower, decoder, None, None
        return tower, decoder, attention, attention.float().mean(dim=(0, 1)) @ attention_rollout(tower)[0]
    if isinstance(model, Resamples | HasTiles):
        if isinstance(model, Resamples):
            *encoding, queries = encoding
            seen = queries[0].float().mean(dim=0)  # [n, N], where each image token has looked
        else:
            encoding = [layer[:1] for layer in encoding]
            seen = model.places_of_tokens(pixels)  # [n, N], where it is
        attention = torch.stack([layer[0][..., is_image].float() @ seen for layer in reading])
        rollout = attention_rollout(reading)[0][:, is_image] @ seen @ attention_rollout(encoding)[0]
        return encoding, reading, attention, rollout
    attention = torch.stack([layer[0][..., is_image] for layer in reading])
    rollout = attention_rollout(reading)[0][:, is_image]
    if encoding:  # a stem of convolutions has none
        rollout = rollout @ attention_rollout(encoding)[0, -attention.shape[-1] :, -patches:]
    return encoding, reading, attention[..., -patches:], rollout


def _shown(token: str) -> str:
    """A token in one line."""
    return token.strip(" ").replace("\n", "\\n") or "␣"


@dataclass(frozen=True)
class Match:
    """How well a text fits a picture of N patches, by two towers. fp32, on the model's device.

    The N places of a convolutional tower do not look at each other: it has no layers here.
    """

    cosine: float
    pixel_values: Tensor  # [C, height, width], as the tower gets them
    tower: Tensor  # [layers, H, N, N], where patches look; rows sum to less than 1 beside a class token
    pooling: Tensor  # [H, N], what the picture's vector is made from, in the last step
    rollout: Tensor  # [N], the same through all layers of the tower
    match: Callable[[Tensor], Tensor]  # pictures [B, C, height, width] -> [B], the logit of this text


@torch.no_grad()
def inspect_match(model: Matches, processor: PairProcessor, picture: Image.Image, text: str) -> Match:
    """Compare a picture with a text, and keep what went on inside the image tower.

    Raises InputError: as the processor.
    """
    inputs = to_device(processor(images=[picture], texts=[text]), model.device)
    pixel_values, text_embeds = inputs["pixel_values"], model.encode_text(inputs["input_ids"])
    with record_attention() as maps:
        image_embeds = model.encode_image(pixel_values)
    if isinstance(model.vision_model, ConvolutionalTower):  # the mean of its places looks at them, at the end
        tower = maps[0][:0, :, 1:, 1:]
        pooling = maps[0][0, :, 0, 1:]
        rollout = pooling.mean(dim=0)
    elif model.has_class_token:  # the first token, which reads the patches in every layer
        tower = torch.stack([layer[0, :, 1:, 1:] for layer in maps])
        pooling = maps[-1][0, :, 0, 1:]
        rollout = attention_rollout(maps)[0, 0, 1:]
    else:  # the pooling head, one query after the last layer
        *layers, head = maps
        tower = torch.stack([layer[0] for layer in layers])
        pooling = head[0, :, 0]
        rollout = pooling.mean(dim=0) @ attention_rollout(layers)[0]
    return Match(
        cosine=float(similarity(image_embeds, text_embeds)),
        pixel_values=pixel_values[0],
        tower=tower.float(),
        pooling=pooling.float(),
        rollout=rollout.float(),
        match=lambda pictures: model.logits(model.encode_image(pictures), text_embeds)[:, 0],
    )
