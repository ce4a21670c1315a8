"""The ways to let a language model see, as they are trained: how each is built, what learns, and from what.

All stand between the shipped image tower and a language model of one size: GPT-2 for those that had one, BERT
for VisualBERT, Llama for LLaVA and what came after it. `systems.py` trains them.

Three ways begin from LLaVA without its first stage. In `cross-attention`, the picture stands beside the row,
so the language model can stay frozen; `experts` has other MLPs; and `small-one-view` another world, whose
things are half as large. What it cannot see there, `small-tiles` and `small-two-towers` can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minivlm import masks
from minivlm.models.llava import Llava, LlavaConfig
from minivlm.models.load import SHIPPED, load
from minivlm.models.miniatures.base import Miniature
from minivlm.models.miniatures.chats import LlamaMiniature
from minivlm.models.miniatures.clipcap import ClipCap, ClipCapConfig
from minivlm.models.miniatures.cm3 import CM3, CM3Config, causally_masked
from minivlm.models.miniatures.cross_attention import CrossAttentionConfig, CrossAttentionLlama
from minivlm.models.miniatures.experts import ExpertsConfig, LlavaExperts
from minivlm.models.miniatures.flamingo import Flamingo, FlamingoConfig
from minivlm.models.miniatures.one_view import OneView, OneViewConfig
from minivlm.models.miniatures.simvlm import SimVLM, SimVLMConfig
from minivlm.models.miniatures.tiles import Tiles, TilesConfig
from minivlm.models.miniatures.two_towers import TwoTowers, TwoTowersConfig
from minivlm.models.miniatures.visualbert import VisualBERT, VisualBERTConfig
from minivlm.models.miniatures.visualgpt import VisualGPT, VisualGPTConfig
from minivlm.models.paligemma import PaliGemma
from minivlm.models.views import place
from minivlm.processing import LlavaProcessor, Processor, Tokenizer
from minivlm.processing.inputs import IGNORE, Inputs
from minivlm.processing.llama_tokens import LlamaTokenizer
from minivlm.processing.llava import LlavaImageProcessor
from minivlm.text.bert import BertConfig, BertEncoder
from minivlm.text.deepseek_v2 import DeepseekV2Config, DeepseekV2Decoder
from minivlm.text.gpt2 import GPT2Config, GPT2Decoder
from minivlm.text.llama import LlamaConfig, LlamaDecoder
from minivlm.text.moe import MoEConfig, balancing_loss, record_routing
from minivlm.training.masked_words import mask_words, one_word_each
from minivlm.vision.conv_stem import ConvStemConfig
from minivlm.vision.siglip import SiglipVisionConfig, SiglipVisionModel

WIDTH, LAYERS, HEADS = 64, 4, 4  # of the language model
CONTEXT = 192  # positions: a picture of 64 patches, and the longest question with its answer
DENSE = 8 * WIDTH // 3  # width of Llama's MLP: three matrices for GPT-2's two, and as many weights

# Four of sixteen and the shared one are five pieces of an MLP as wide as Llama's. Where the gate has no
# preference, each counts 1, as in one MLP.
MOE = MoEConfig(
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    moe_intermediate_size=DENSE // 5,
    norm_topk_prob=True,
    routed_scaling_factor=4.0,
    aux_loss_alpha=0.01,
)

System = Miniature | VisualBERT | Llava
SystemProcessor = Processor | LlavaProcessor
Loss = Callable[[Any, Inputs, Generator], Tensor]


# What is learned from text alone


def next_word_loss(
    decoder: GPT2Decoder | LlamaDecoder | DeepseekV2Decoder, inputs: Inputs, generator: Generator
) -> Tensor:
    """Mean cross-entropy of every word of text rows, prompts too, as a language model reads them.

    The first word has a random position, since a way may put a picture before it.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    room = CONTEXT - ids.shape[1]
    shift = int(torch.randint(room, (), generator=generator))
    position_ids, seen = place(mask, None)
    hidden = decoder(decoder.embed(ids), position_ids + shift, seen)
    labels = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
    return F.cross_entropy(
        decoder.logits(hidden)[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE
    )


def masked_word_loss(encoder: BertEncoder, inputs: Inputs, generator: Generator, mask_id: int) -> Tensor:
    """Mean cross-entropy of words that were hidden, prompts too, with everything around them to see."""
    ids, is_real = inputs["input_ids"], inputs["attention_mask"].bool()
    words = torch.arange(mask_id + 1, encoder.config.vocab_size - 1)  # without <image>, the last one
    masked, labels = mask_words(ids, is_real & (ids > mask_id), mask_id, words, generator)
    position_ids, _ = place(inputs["attention_mask"], None)
    x = encoder.embed(masked, position_ids, inputs["token_type_ids"])
    hidden = encoder(x, masks.padding(is_real)[:, None])
    chosen = labels != IGNORE
    return F.cross_entropy(encoder.logits(hidden[chosen]), labels[chosen])


# What is learned from pictures


def answer_loss(model: Miniature | Llava, inputs: Inputs, generator: Generator) -> Tensor:
    """Mean cross-entropy of the answers' words: what most ways learn from."""
    labels = inputs["labels"]
    return model.loss(model.hidden_states(**{k: v for k, v in inputs.items() if k != "labels"}), labels)


def one_word_loss(model: VisualBERT, inputs: Inputs, generator: Generator) -> Tensor:
    """Of one word of each answer, since each takes a reading of its own."""
    loss = model(**inputs | {"labels": one_word_each(inputs["labels"], generator)}).loss
    assert loss is not None
    return loss


def moved_spans_loss(model: CM3, inputs: Inputs, generator: Generator) -> Tensor:
    """Mean cross-entropy of every word of documents, some of whose spans are written last."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    moved = [causally_masked(ids[is_real], model.config, generator) for ids, is_real in rows]
    pad = partial(pad_sequence, batch_first=True)
    hidden = model.hidden_states(
        input_ids=pad([ids for ids, _ in moved], padding_value=model.config.pad_token_id),
        pixel_values=inputs["pixel_values"],
        attention_mask=pad([torch.ones_like(ids) for ids, _ in moved]),
    )
    return model.loss(hidden, pad([labels for _, labels in moved], padding_value=IGNORE))


def balanced(loss: Loss) -> Loss:
    """The same loss, whose gradient also keeps the experts of each layer equally busy."""

    def total(model: Any, inputs: Inputs, generator: Generator) -> Tensor:
        with record_routing() as routings:
            found = loss(model, inputs, generator)
        uneven = torch.stack([balancing_loss(routing, MOE.seq_aux) for routing in routings]).sum()
        return found + MOE.aux_loss_alpha * (uneven - uneven.detach())

    return total


# The language models


@dataclass(frozen=True)
class LanguageModel:
    """One of them, before it has learned anything."""

    config: Callable[[Tokenizer | LlamaTokenizer], Any]
    build: Callable[[Any], nn.Module]
    loss: Loss = next_word_loss
    chats: bool = False  # whether its rows are LLaVA's, of Llama's tokens


def _sizes(tokenizer: Tokenizer | LlamaTokenizer) -> dict[str, int]:
    """What the configs of all of them have."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": CONTEXT,
    }


def _gpt2(tokenizer: Tokenizer | LlamaTokenizer) -> GPT2Config:
    return GPT2Config(**_sizes(tokenizer))


def _bert(tokenizer: Tokenizer | LlamaTokenizer) -> BertConfig:
    return BertConfig(**_sizes(tokenizer))


def _llama(tokenizer: Tokenizer | LlamaTokenizer) -> LlamaConfig:
    sizes = _sizes(tokenizer) | {"intermediate_size": DENSE, "num_key_value_heads": HEADS}
    return LlamaConfig(**sizes, tie_word_embeddings=True)


def _with_experts(tokenizer: Tokenizer | LlamaTokenizer) -> DeepseekV2Config:
    sizes: dict[str, Any] = {**_sizes(tokenizer), "num_key_value_heads": HEADS}
    return DeepseekV2Config(**sizes, tie_word_embeddings=True, mla=None, moe=MOE)


MASK_ID = 3  # <unk>: no text here has it
GPT2 = LanguageModel(_gpt2, GPT2Decoder)
BERT = LanguageModel(_bert, BertEncoder, partial(masked_word_loss, mask_id=MASK_ID))
LLAMA = LanguageModel(_llama, LlamaDecoder, chats=True)
EXPERTS = LanguageModel(_with_experts, DeepseekV2Decoder, balanced(next_word_loss), chats=True)


# The ways


@dataclass(frozen=True)
class Way:
    """A system, and which of its parts learn from pictures."""

    build: Callable[..., System]  # from a tower's config, a language model's, the ids, and the tokenizer
    learns: tuple[str, ...]  # how the names of the weights begin that are trained
    about: str
    loss: Loss = answer_loss
    language_model: LanguageModel = GPT2
    aligns: tuple[str, ...] = ()  # what learns alone first, from captions, in a quarter of the steps
    column: str = "held_out"  # of COLUMNS or MORE_COLUMNS: the world in which it learns and is measured


def _visualbert(tokenizer: Tokenizer, vision: SiglipVisionConfig, **parts: Any) -> System:
    parts |= {"visual_embedding_dim": vision.hidden_size, "mask_token_id": MASK_ID}
    return VisualBERT(VisualBERTConfig(vision=vision, **parts))


def _clipcap(tokenizer: Tokenizer, **parts: Any) -> System:
    return ClipCap(ClipCapConfig(num_mapping_layers=2, **parts))


def _clipcap_mlp(tokenizer: Tokenizer, **parts: Any) -> System:
    return ClipCap(ClipCapConfig(mapping_type="mlp", **parts))


def _visualgpt(tokenizer: Tokenizer, **parts: Any) -> System:
    return VisualGPT(VisualGPTConfig(encoder_intermediate_size=2 * WIDTH, **parts))


def _flamingo(tokenizer: Tokenizer, **parts: Any) -> System:
    return Flamingo(
        FlamingoConfig(
            num_latents=16,
            resampler_depth=2,
            resampler_heads=HEADS,
            cross_attn_heads=HEADS,
            head_dim=WIDTH // HEADS,
            **parts,
        )
    )


def _cm3(tokenizer: Tokenizer, **parts: Any) -> System:
    """Words for outlines serve as sentinels: no row here has any."""
    *sentinels, end = tokenizer.seg_ids[:5]
    return CM3(CM3Config(mask_token_ids=tuple(sentinels), end_of_mask_token_id=end, **parts))


def _simvlm(tokenizer: Tokenizer, vision: SiglipVisionConfig, **parts: Any) -> System:
    size, patch = vision.image_size, vision.patch_size
    stem = ConvStemConfig(layers=(1, 1, 1), width=WIDTH // 16, image_size=size, patch_size=patch)
    return SimVLM(SimVLMConfig(vision=stem, **parts))


def _llava(tokenizer: LlamaTokenizer, **parts: Any) -> System:
    return Llava(LlavaConfig(vision_feature_select_strategy="full", **parts))


def _cross_attention(tokenizer: LlamaTokenizer, **parts: Any) -> System:
    return CrossAttentionLlama(CrossAttentionConfig(cross_attention_layers=tuple(range(LAYERS)), **parts))


def _experts(tokenizer: LlamaTokenizer, **parts: Any) -> System:
    return LlavaExperts(ExpertsConfig(**parts))


def _one_view(tokenizer: LlamaTokenizer, **parts: Any) -> System:
    return OneView(OneViewConfig(**parts))


def _tiles(tokenizer: LlamaTokenizer, text: LlamaConfig, **parts: Any) -> System:
    more = replace(text, max_position_embeddings=CONTEXT + 32)  # for 93 image tokens instead of 64
    return Tiles(TilesConfig(text=more, **parts))


def _two_towers(tokenizer: LlamaTokenizer, vision: SiglipVisionConfig, **parts: Any) -> System:
    size, patch = 2 * vision.image_size, vision.patch_size
    stem = ConvStemConfig(layers=(1, 1, 1), width=WIDTH // 16, image_size=size, patch_size=patch)
    return TwoTowers(TwoTowersConfig(vision=vision, high_res_vision=stem, **parts))


WAYS = {
    "visualbert": Way(
        _visualbert,
        ("visual_", "language_model."),
        "patches among the words of an encoder that fills masks; it learns, too",
        one_word_loss,
        BERT,
    ),
    "simvlm": Way(
        _simvlm,
        ("vision_tower.", "projection.", "relative_attention.", "language_model."),
        "a stem of convolutions of its own, patches before the words; all learns",
    ),
    "cm3": Way(
        _cm3,
        ("projection.", "language_model."),
        "patches before the words, spans written last; the language model learns, too",
        moved_spans_loss,
    ),
    "clipcap": Way(
        _clipcap, ("clip_project.",), "one vector of the picture -> a prefix; the language model is frozen"
    ),
    "clipcap-mlp": Way(
        _clipcap_mlp,
        ("clip_project.", "language_model."),
        "the same by an MLP; the language model learns, too",
    ),
    "visualgpt": Way(
        _visualgpt,
        ("encoder.", "language_model."),
        "every block asks the patches, gates share out; the language model learns, too",
    ),
    "flamingo": Way(
        _flamingo,
        ("perceiver.", "gated_cross_attn_layers."),
        "gated blocks ask 16 latents, between frozen ones of the language model",
    ),
    "llava": Way(
        _llava,
        ("multi_modal_projector.", "language_model."),
        "patches inside of a chat, in two stages: first the projector, then the language model, too",
        language_model=LLAMA,
        aligns=("multi_modal_projector.",),
    ),
    "llava-direct": Way(
        _llava,
        ("multi_modal_projector.", "language_model."),
        "the same without the first stage: both learn from the first step on",
        language_model=LLAMA,
    ),
    "cross-attention": Way(
        _cross_attention,
        ("multi_modal_projector.", "cross_attention_layers."),
        "gated blocks ask all patches, between frozen ones of llava's language model",
        language_model=LLAMA,
    ),
    "experts": Way(
        _experts,
        ("multi_modal_projector.", "language_model."),
        "llava-direct with experts for MLPs, five of 17 for a word, together as wide",
        balanced(answer_loss),
        language_model=EXPERTS,
    ),
    "small-one-view": Way(
        _one_view,
        ("multi_modal_projector.", "language_model."),
        "llava-direct for things half as large: its pictures of 128 pixels are shrunk to 64",
        language_model=LLAMA,
        column="small_things",
    ),
    "small-tiles": Way(
        _tiles,
        ("projector.", "image_newline", "view_separator", "language_model."),
        "the same pictures shrunk, and in four tiles",
        language_model=LLAMA,
        column="small_things",
    ),
    "small-two-towers": Way(
        _two_towers,
        ("high_res_tower.", "downsample.", "aligner.", "language_model."),
        "the same pictures shrunk, and as they are in a second tower, which learns, too",
        language_model=LLAMA,
        column="small_things",
    ),
}


def build(name: str, seed: int) -> tuple[System, SystemProcessor]:
    """A system before its first step: the shipped tower, an untrained language model, the way between them.

    For the same seed, all ways with the same kind of language model have the same one.
    """
    way = WAYS[name]
    shipped, processor = load()
    assert isinstance(shipped, PaliGemma)
    vision = shipped.config.vision
    chats = way.language_model.chats
    tokenizer = LlamaTokenizer.from_pretrained(SHIPPED) if chats else processor.tokenizer
    text = way.language_model.config(tokenizer)
    torch.manual_seed(seed)
    language_model = way.language_model.build(text)
    model = way.build(
        vision=vision,
        text=text,
        tokenizer=tokenizer,
        image_token_id=tokenizer.image_id,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    # A block may have more than GPT-2's: what it asks the picture with is not in the language model.
    unknown = model.language_model.load_state_dict(language_model.state_dict(), strict=False).unexpected_keys
    assert not unknown
    if isinstance(model.vision_tower, SiglipVisionModel):  # and not a stem that learns with the rest
        model.vision_tower.load_state_dict(shipped.vision_tower.state_dict())
    if isinstance(tokenizer, LlamaTokenizer):
        size = model.config.image_size if isinstance(model, LlamaMiniature) else vision.image_size
        half = (0.5, 0.5, 0.5)
        pictures = LlavaImageProcessor(image_size=size, image_mean=half, image_std=half)
        form = model.processor_class if isinstance(model, LlamaMiniature) else LlavaProcessor
        chatting = form(tokenizer, pictures, vision.patch_size, "full", "", 0)
        chatting.image_seq_length = model.config.num_image_tokens
        return model, chatting
    pictures = replace(processor.image_processor, image_seq_length=model.config.num_image_tokens)
    return model, Processor(tokenizer, pictures)
