"""The configs of models that encode but do not write: the original ViT, CLIP, SigLIP with its text tower.

As in `minivlm.configs`: frozen dataclasses with the field names of config.json, and a value that would
change what the model computes is refused. A field that the file lacks has the default of transformers,
because transformers leaves out what equals its default in older files. SigLIP's image tower is in
`minivlm.configs`, since PaliGemma has it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from minivlm.configs import SiglipVisionConfig, _expect, _known, check_grid, check_width
from minivlm.encoder_blocks import ACTIVATIONS
from minivlm.errors import InputError


@dataclass(frozen=True)
class ViTConfig:
    """The original Vision Transformer (https://arxiv.org/abs/2010.11929), by default vit-base-patch16-224.

    `labels` are the names of the classes in their order. Without any, the model has no classifier and may
    have a pooler instead.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 16  # pixels, height = width
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pooler: bool = True
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_blocks(self.hidden_size, self.num_attention_heads, self.hidden_act)
        check_grid(self.image_size, self.patch_size)
        if self.pooler and self.labels:
            raise InputError("a ViT has a pooler or a classifier: set pooler=False where there are labels")

    @property
    def num_patches(self) -> int:
        """Patches in a picture; the tower has one token more, the class token."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """From a whole config.json, whose `architectures` say whether there is a classifier.

        Raises InputError: another system, or a part that this package does not compute.
        """
        _require_system(values, "vit")
        _expect(values, "config.json", "qkv_bias", True)
        _expect(values, "config.json", "pooler_act", "tanh")
        known = _known(cls, values)
        if values.get("pooler_output_size") is not None:
            width = known.get("hidden_size", cls.hidden_size)
            _expect(values, "config.json", "pooler_output_size", width)
        architectures = values.get("architectures") or []
        labels = _labels(values) if "ViTForImageClassification" in architectures else ()
        return cls(**known | {"labels": labels, "pooler": not labels})

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        values = {"model_type": "vit", **asdict(self), "qkv_bias": True}
        del values["labels"], values["pooler"]
        if not self.labels:
            return {**values, "architectures": ["ViTModel"]}
        return {
            **values,
            "architectures": ["ViTForImageClassification"],
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
        }


@dataclass(frozen=True)
class CLIPVisionConfig:
    """CLIP's image tower (https://arxiv.org/abs/2103.00020). The defaults are clip-vit-base-patch32."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height = width
    patch_size: int = 32  # pixels, height = width
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        _check_blocks(self.hidden_size, self.num_attention_heads, self.hidden_act)
        check_grid(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """Patches in a picture; the tower has one token more, the class token."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
        """From the `vision_config` part of a config.json. Raises InputError: another tower than CLIP's."""
        _expect(values, "vision_config", "model_type", "clip_vision_model")
        return cls(**_known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` part of a config.json."""
        return {"model_type": "clip_vision_model", **asdict(self)}


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's text tower. The defaults are clip-vit-base-patch32.

    `eos_token_id` 2 stands in the files of OpenAI by mistake. It means that the file does not say which id
    ends a text, and that the end is where the highest id is (see `minivlm.text.clip`).
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77  # tokens, with the marks of start and end
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check_blocks(self.hidden_size, self.num_attention_heads, self.hidden_act)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """From the `text_config` part of a config.json. Raises InputError: another tower than CLIP's."""
        _expect(values, "text_config", "model_type", "clip_text_model")
        return cls(**_known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {"model_type": "clip_text_model", **asdict(self)}


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers and the width of the space in which they meet."""

    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # ln(1 / 0.07)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """From a whole config.json. Raises InputError where it describes another system.

        The towers' own `projection_dim` are for towers that stand alone and are not read. In old files a
        `text_config_dict` or `vision_config_dict` takes the place of the part without `_dict`.
        """
        _require_system(values, "clip")
        return cls(
            vision=CLIPVisionConfig.from_dict(_part(values, "vision_config")),
            text=CLIPTextConfig.from_dict(_part(values, "text_config")),
            **_known_numbers(values, "projection_dim", "logit_scale_init_value"),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        width = {"projection_dim": self.projection_dim}
        return {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "vision_config": self.vision.to_dict() | width,
            "text_config": self.text.to_dict() | width,
            "logit_scale_init_value": self.logit_scale_init_value,
            **width,
        }


@dataclass(frozen=True)
class SiglipTextConfig:
    """SigLIP's text tower (https://arxiv.org/abs/2303.15343). The defaults are siglip-base-patch16-224.

    `projection_size` is the width of what the tower returns; None means hidden_size.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 32000
    max_position_embeddings: int = 64  # tokens; every text is padded to this length
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None

    def __post_init__(self) -> None:
        _check_blocks(self.hidden_size, self.num_attention_heads, "gelu_pytorch_tanh")

    @property
    def output_size(self) -> int:
        """The width of what the tower returns."""
        return self.projection_size or self.hidden_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipTextConfig:
        """From the `text_config` part of a config.json.

        Raises InputError: another tower than SigLIP's, or another activation.
        """
        _expect(values, "text_config", "model_type", "siglip_text_model")
        _expect(values, "text_config", "hidden_act", "gelu_pytorch_tanh")
        return cls(**_known(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` part of a config.json."""
        return {
            "model_type": "siglip_text_model",
            **asdict(self),
            "projection_size": self.output_size,
            "hidden_act": "gelu_pytorch_tanh",
        }


@dataclass(frozen=True)
class SiglipConfig:
    """Two towers that meet in the width of the image tower.

    Raises InputError: the text tower returns another width.
    """

    vision: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text: SiglipTextConfig = field(default_factory=SiglipTextConfig)

    def __post_init__(self) -> None:
        if self.text.output_size != self.vision.hidden_size:
            raise InputError(
                f"the image tower returns {self.vision.hidden_size} numbers and the text tower "
                f"{self.text.output_size}: set the text's projection_size to the image tower's hidden_size"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipConfig:
        """From a whole config.json. Raises InputError where it describes another system."""
        _require_system(values, "siglip")
        vision = dict(_part(values, "vision_config"))
        _expect(vision, "vision_config", "vision_use_head", True)
        vision.pop("vision_use_head", None)  # the tower alone has no head; it belongs to the model
        return cls(
            vision=SiglipVisionConfig.from_dict(vision),
            text=SiglipTextConfig.from_dict(_part(values, "text_config")),
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that this package and transformers both read."""
        return {
            "model_type": "siglip",
            "architectures": ["SiglipModel"],
            "vision_config": self.vision.to_dict() | {"vision_use_head": True},
            "text_config": self.text.to_dict(),
        }


def _check_blocks(hidden_size: int, num_attention_heads: int, hidden_act: str) -> None:
    check_width(hidden_size, num_attention_heads)
    if hidden_act not in ACTIVATIONS:
        raise InputError(f"hidden_act is {hidden_act!r}: only {', '.join(ACTIVATIONS)} are supported here")


def _require_system(values: Mapping[str, Any], model_type: str) -> None:
    if values.get("model_type") != model_type:
        raise InputError(
            f"config.json says model_type {values.get('model_type')!r}, and this class computes "
            f"{model_type!r}: use a folder of that system"
        )


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    old = values.get(f"{name}_dict")
    part = values.get(name) if old is None else old
    if part is not None and not isinstance(part, Mapping):
        raise InputError(f"{name} in config.json is {part!r}, expected an object: get the file again")
    return part or {}


def _known_numbers(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in order; transformers invents two where the file has none."""
    names = values.get("id2label")
    if names is None:
        return tuple(f"LABEL_{number}" for number in range(values.get("num_labels") or 2))
    by_number = {int(number): str(label) for number, label in names.items()}
    if not by_number or sorted(by_number) != list(range(len(by_number))):
        raise InputError("id2label in config.json does not count its classes from 0 on: get the file again")
    return tuple(by_number[number] for number in range(len(by_number)))
