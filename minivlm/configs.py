"""The numbers that define a model: frozen dataclasses, read from and written to the Hub's config.json.

One dataclass per part, nested: `PaliGemmaConfig(vision=..., text=...)`. Field names are those of
config.json, so that a reader who meets `num_key_value_heads` here finds it again in transformers.
A published config.json holds many more fields than a forward pass needs. They are ignored, except where
a value would change what the model computes: then it is refused rather than computed wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minivlm.errors import InputError


@dataclass(frozen=True)
class SiglipVisionConfig:
    """SigLIP's image tower (https://arxiv.org/abs/2303.15343). The defaults are siglip-base-patch16-224."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 16  # pixels, height = width
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_width(self.hidden_size, self.num_attention_heads)
        check_grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Number of image tokens; pixels beyond the last whole patch are dropped."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipVisionConfig:
        """From the `vision_config` part of a config.json.

        Raises InputError: another tower than SigLIP, another activation, or the pooling head.
        """
        _expect(values, "vision_config", "model_type", "siglip_vision_model")
        _expect(values, "vision_config", "hidden_act", "gelu_pytorch_tanh")
        _expect(values, "vision_config", "vision_use_head", False)
        return cls(**_known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {
            "model_type": "siglip_vision_model",
            **asdict(self),
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        }


@dataclass(frozen=True)
class GemmaConfig:
    """Gemma's decoder (https://arxiv.org/abs/2403.08295). The defaults are the text half of paligemma-3b."""

    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257216
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        _check_heads(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GemmaConfig:
        """From the `text_config` part of a config.json.

        `rope_theta` may stand alone (older files) or inside `rope_parameters` (newer ones).
        Raises InputError: another decoder than Gemma, another activation, scaled rotary positions.
        """
        _expect(values, "text_config", "model_type", "gemma")
        return cls(**_known_decoder(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "gemma",
            **asdict(self),
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


@dataclass(frozen=True)
class Gemma2Config:
    """Gemma 2's decoder (https://arxiv.org/abs/2408.00118). The defaults are those of paligemma2-3b."""

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 257216
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: int = 256  # queries are multiplied by its -0.5th power
    sliding_window: int = 4096  # positions, in the first, third, fifth ... layer
    attn_logit_softcapping: float | None = 50.0  # None: no cap
    final_logit_softcapping: float | None = 30.0

    def __post_init__(self) -> None:
        _check_heads(self)
        if self.sliding_window < 1:
            raise InputError(
                f"sliding_window is {self.sliding_window}: a token sees at least itself, give 1 or more"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gemma2Config:
        """From the `text_config` part of a config.json.

        Raises InputError: another decoder than Gemma 2, another activation, scaled rotary positions, another
        order of layers with and without a window, or none with one.
        """
        _expect(values, "text_config", "model_type", "gemma2")
        known = _known_decoder(cls, values)
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if cap in values:
                known[cap] = values[cap]  # here null has a meaning of its own
        if "sliding_window" in values and values["sliding_window"] is None:
            raise InputError("text_config has sliding_window = null; only Gemma 2 with a window is supported")
        config = cls(**known)
        if values.get("layer_types") is not None:
            _expect(values, "text_config", "layer_types", config.layer_types)
        return config

    @property
    def layer_types(self) -> list[str]:
        """Which layers have a window: every second one, beginning with the first."""
        kinds = ("sliding_attention", "full_attention")
        return [kinds[number % 2] for number in range(self.num_hidden_layers)]

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "gemma2",
            **asdict(self),
            "layer_types": self.layer_types,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


@dataclass(frozen=True)
class PaliGemmaConfig:
    """PaliGemma (https://arxiv.org/abs/2407.07726): a SigLIP tower, one linear layer, a Gemma decoder.

    PaliGemma 2 (https://arxiv.org/abs/2412.03555) is the same system with `text` a Gemma2Config; its
    published sizes are in `minivlm.paligemma2_configs`.
    """

    vision: SiglipVisionConfig = field(
        default_factory=lambda: SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            patch_size=14,
        )
    )
    text: GemmaConfig | Gemma2Config = field(default_factory=GemmaConfig)
    image_token_id: int = 257152
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PaliGemmaConfig:
        """From a whole config.json. Raises InputError where it describes another system."""
        if values.get("model_type") != "paligemma":
            raise InputError(
                f"config.json says model_type {values.get('model_type')!r}, and this class computes "
                "'paligemma': use a PaliGemma folder"
            )
        for part in ("vision_config", "text_config"):
            if not isinstance(values.get(part), Mapping):
                raise InputError(f"config.json has no {part!r}: is it the config.json of a whole PaliGemma?")
        text = dict(values["text_config"])
        text.setdefault("tie_word_embeddings", values.get("tie_word_embeddings", True))
        decoder = Gemma2Config if text.get("model_type") == "gemma2" else GemmaConfig
        # The published files call it image_token_index; transformers 5 writes image_token_id.
        ids = {"image_token_id": values.get("image_token_id", values.get("image_token_index"))}
        ids |= {name: values.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return cls(
            vision=SiglipVisionConfig.from_dict(values["vision_config"]),
            text=decoder.from_dict(text),
            **{name: value for name, value in ids.items() if value is not None},
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "paligemma",
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "vision_config": {
                **self.vision.to_dict(),
                "projection_dim": self.text.hidden_size,
                "num_image_tokens": self.vision.num_patches,
            },
            "text_config": {**self.text.to_dict(), "num_image_tokens": self.vision.num_patches},
            "projection_dim": self.text.hidden_size,
            "hidden_size": self.text.hidden_size,
            "image_token_index": self.image_token_id,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }


def check_width(hidden_size: int, num_attention_heads: int) -> None:
    """Raises InputError: the width of an encoder does not divide into its heads."""
    if hidden_size % num_attention_heads:
        raise InputError(
            f"hidden_size {hidden_size} does not divide into {num_attention_heads} heads: "
            "choose a multiple of num_attention_heads"
        )


def check_grid(image_size: int, patch_size: int) -> None:
    """Raises InputError: no patch fits into the picture."""
    if not 0 < patch_size <= image_size:
        raise InputError(
            f"patch_size {patch_size} does not fit into image_size {image_size}: "
            "choose a patch between 1 pixel and the whole image"
        )


def _check_heads(config: GemmaConfig | Gemma2Config) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key/value "
            "heads evenly: num_attention_heads must be a multiple of num_key_value_heads"
        )
    if config.head_dim % 2:
        raise InputError(f"head_dim {config.head_dim} is odd, but rotary positions turn pairs of numbers")


def _known_decoder(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What Gemma and Gemma 2 read alike."""
    # Older files say hidden_act "gelu_fast" or "gelu": what was always computed is hidden_activation,
    # and where that is missing, the tanh form.
    if values.get("hidden_activation") is not None:
        _expect(values, "text_config", "hidden_activation", "gelu_pytorch_tanh")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    _expect(rope, "text_config.rope_parameters", "rope_type", "default")
    known = _known(cls, values)
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    return known


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def _expect(values: Mapping[str, Any], part: str, name: str, supported: Any) -> None:
    """Refuse a value that would make the model compute something else than this package does."""
    value = values.get(name, supported)
    if value != supported:
        raise InputError(f"{part} has {name} = {value!r}; only {supported!r} is supported here")
