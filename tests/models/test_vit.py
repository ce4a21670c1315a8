"""ViT equals ViTModel and ViTForImageClassification of transformers: tower, both heads, folders, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import PIXELS, VISION, assert_all_equal, assert_same_tensors, saved
from helpers import assert_differs, assert_equal
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig as ReferenceConfig
from transformers import ViTForImageClassification, ViTModel

from minivlm import InputError, ViT, ViTConfig, layers

LABELS = ("cat", "dog", "a third thing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vit")


@pytest.fixture(scope="module")
def reference(folder: Path) -> ViTModel:
    return saved(ViTModel(ReferenceConfig(**VISION)), folder)


@pytest.fixture(scope="module")
def expected(reference: ViTModel) -> Any:
    with torch.no_grad():
        return reference(PIXELS, output_hidden_states=True)


@pytest.fixture
def ours(folder: Path, reference: ViTModel) -> ViT:
    return ViT.from_pretrained(folder)


@pytest.fixture(scope="module")
def classes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vit_classes")


@pytest.fixture(scope="module")
def classifier(classes_folder: Path) -> ViTForImageClassification:
    names = dict(enumerate(LABELS))
    config = ReferenceConfig(**VISION, id2label=names, label2id={name: i for i, name in names.items()})
    return saved(ViTForImageClassification(config), classes_folder)


@torch.no_grad()
def test_every_hidden_state(ours: ViT, expected: Any):
    assert_all_equal(ours.vision_model.hidden_states(PIXELS), expected.hidden_states, 4)
    output = ours(PIXELS)
    assert_equal(output.last_hidden_state, expected.last_hidden_state)
    assert_equal(output.pooler_output, expected.pooler_output)
    assert output.logits is None
    assert_equal(ours.encode_image(PIXELS), expected.last_hidden_state[:, 0])
    assert_differs(output.pooler_output, expected.last_hidden_state[:, 0])


def test_the_classifier(classifier: ViTForImageClassification, classes_folder: Path):
    ours = ViT.from_pretrained(classes_folder)
    assert ours.config.labels == LABELS
    labels = torch.tensor([2, 0, 1])
    output, theirs = ours(PIXELS, labels), classifier(PIXELS, labels=labels)
    assert_equal(output.logits, theirs.logits)
    assert_equal(output.loss, theirs.loss)
    assert output.pooler_output is None
    assert ours(PIXELS).loss is None
    output.loss.backward()
    classifier.zero_grad()
    theirs.loss.backward()
    assert ours.vision_model.embeddings.cls_token.grad.abs().max() > 1e-4
    assert_equal(ours.vision_model.embeddings.cls_token.grad, classifier.vit.embeddings.cls_token.grad)


# Each feature, broken on purpose


def tanh_gelu(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu", layers.ACTIVATIONS["gelu_pytorch_tanh"])


def quick_gelu(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.ACTIVATIONS, "gelu", layers.quick_gelu)


def change_eps(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def class_token_last(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    table = model.vision_model.embeddings.position_embeddings
    table.copy_(table.roll(-1, dims=1))


def no_last_norm(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    model.vision_model.layernorm.forward = lambda x: x  # type: ignore[method-assign]


def mean_of_the_patches(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.vision_model.forward
    monkeypatch.setattr(model.vision_model, "forward", lambda x: right(x)[:, 1:].mean(dim=1, keepdim=True))


def linear_pooler(model: ViT, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.pooler is not None
    right = model.pooler.forward
    monkeypatch.setattr(model.pooler, "forward", lambda x: torch.atanh(right(x).clamp(-0.99, 0.99)))


@torch.no_grad()
@pytest.mark.parametrize(
    "damage",
    [quick_gelu, change_eps, class_token_last, no_last_norm, mean_of_the_patches, linear_pooler, tanh_gelu],
)
def test_damage_is_noticed(ours: ViT, expected: Any, monkeypatch: pytest.MonkeyPatch, damage: Any):
    damage(ours, monkeypatch)
    # the two forms of GELU differ by 0.0005 at most
    assert_differs(ours(PIXELS).pooler_output, expected.pooler_output, 3 if damage is tanh_gelu else 10)


@torch.no_grad()
def test_eps_is_that_of_the_file(tmp_path: Path):
    """1e-12 and SigLIP's 1e-6 differ only for nearly constant tokens: here the embeddings are scaled down."""
    reference = saved(ViTModel(ReferenceConfig(**VISION)), tmp_path)
    ours = ViT.from_pretrained(tmp_path)
    for model in (reference, ours):
        embeddings = model.embeddings if model is reference else model.vision_model.embeddings
        for parameter in embeddings.parameters():
            parameter.mul_(1e-3)
    expected = reference(PIXELS).pooler_output
    assert_equal(ours(PIXELS).pooler_output, expected)
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-12
            module.eps = 1e-6
    assert_differs(ours(PIXELS).pooler_output, expected)


# Folders


@torch.no_grad()
def test_transformers_loads_what_we_save(ours: ViT, expected: Any, tmp_path: Path):
    ours.save_pretrained(tmp_path)
    assert_same_tensors(ours, ViT.from_pretrained(tmp_path))
    assert ViT.from_pretrained(tmp_path).config == ours.config
    theirs, info = ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_equal(theirs(PIXELS).pooler_output, expected.pooler_output)


@torch.no_grad()
def test_transformers_loads_our_classifier(
    classifier: ViTForImageClassification, classes_folder: Path, tmp_path: Path
):
    ViT.from_pretrained(classes_folder).save_pretrained(tmp_path)
    theirs, info = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tuple(theirs.config.id2label.values()) == LABELS
    assert_equal(theirs(PIXELS).logits, classifier(PIXELS).logits)
    assert ViT.from_pretrained(tmp_path).config.labels == LABELS


@torch.no_grad()
@pytest.mark.parametrize("with_classifier", [False, True])
def test_run_time_names_are_read(
    reference: ViTModel,
    classifier: ViTForImageClassification,
    folder: Path,
    classes_folder: Path,
    tmp_path: Path,
    with_classifier: bool,
):
    theirs, source = (classifier, classes_folder) if with_classifier else (reference, folder)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert_same_tensors(ViT.from_pretrained(tmp_path), ViT.from_pretrained(source))


@torch.no_grad()
def test_a_folder_without_pooler(folder: Path, expected: Any, tmp_path: Path):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    output = ViT.from_pretrained(tmp_path)(PIXELS)
    assert_equal(output.last_hidden_state, expected.last_hidden_state)
    assert output.pooler_output is None


# config.json


def test_missing_fields_are_those_of_transformers():
    theirs = ReferenceConfig()
    ours = ViTConfig.from_dict({"model_type": "vit"})
    assert ours == ViTConfig()
    for name, value in vars(ours).items():
        if name not in ("labels", "pooler"):
            assert getattr(theirs, name) == value, name
    classes = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    assert ViTConfig.from_dict(classes).labels == tuple(theirs.id2label.values()) == ("LABEL_0", "LABEL_1")
    assert len(ViTConfig.from_dict(classes | {"num_labels": 5}).labels) == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "clip"}, "model_type 'clip', but this class is for 'vit'"),
        ({"qkv_bias": False}, "qkv_bias = False; only True"),
        ({"pooler_act": "relu"}, "pooler_act = 'relu'"),
        ({"pooler_output_size": 10}, "pooler_output_size = 10; only 768"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": 100}, "is not divisible by 12 heads"),
        (
            {"architectures": ["ViTForImageClassification"], "id2label": {"0": "a", "2": "b"}},
            "does not number its classes 0, 1, 2",
        ),
    ],
)
def test_refused_configs(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        ViTConfig.from_dict({"model_type": "vit"} | values)


def test_two_heads_at_once_are_refused():
    with pytest.raises(InputError, match="a pooler or a classifier"):
        ViTConfig(labels=LABELS)


def test_refused_input(ours: ViT, classes_folder: Path, classifier: ViTForImageClassification):
    with pytest.raises(ValueError, match=r"\[1, 1, 28, 28\], expected \[B, 3, 28, 28\]"):
        ours(torch.zeros(1, 1, 28, 28))
    with pytest.raises(ValueError, match="this ViT has no classifier"):
        ours(PIXELS, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"3 pictures and labels of shape \[2\]"):
        ViT.from_pretrained(classes_folder)(PIXELS, torch.zeros(2, dtype=torch.long))
