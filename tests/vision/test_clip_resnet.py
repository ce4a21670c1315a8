"""CLIP's convolutional tower gives the numbers of OpenAI's own program, and its usual mistakes give others.

transformers has no such tower. `EXPECTED` was printed by clip/model.py of https://github.com/openai/CLIP
(d05afc4), class ModifiedResNet((2, 1, 2, 1), 16, 8, 64, 16) in evaluation mode, with the tensors of
`made_up` and PIXELS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_differs, assert_equal
from made_up import made_up, noise
from torch import Tensor, nn

from minivlm.errors import InputError
from minivlm.vision.clip_resnet import AttentionPool, Bottleneck, CLIPResNet, CLIPResNetConfig

CONFIG = CLIPResNetConfig(layers=(2, 1, 2, 1), width=16, image_size=64, projection_dim=16)


PIXELS = noise(2, 3, 64, 64, start=0.5)


def theirs(name: str) -> str:
    """Our name of a tensor in OpenAI's words."""
    name = re.sub(r"^stages\.(\d)", lambda found: f"layer{int(found[1]) + 1}", name)
    name = name.replace("pool.position_embedding", "attnpool.positional_embedding")
    return name.replace("pool.attention.o_proj", "attnpool.c_proj").replace("pool.attention.", "attnpool.")


def tower() -> CLIPResNet:
    model = CLIPResNet(CONFIG)
    state = {
        name: tensor if tensor.dtype == torch.int64 else made_up(theirs(name), tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


EXPECTED = torch.tensor(
    [
        [
            0.011387,
            -0.339295,
            0.301466,
            -0.167749,
            0.362169,
            0.108529,
            0.094379,
            -0.063944,
            -0.087764,
            0.023279,
            -0.126209,
            0.252382,
            -0.228518,
            -0.018516,
            -0.479758,
            0.160187,
        ],
        [
            0.011565,
            -0.339224,
            0.301600,
            -0.167815,
            0.361972,
            0.108562,
            0.094984,
            -0.063622,
            -0.087606,
            0.023354,
            -0.125831,
            0.252545,
            -0.228094,
            -0.018290,
            -0.480094,
            0.160400,
        ],
    ]
)


@torch.no_grad()
def test_it_gives_openais_numbers():
    assert_equal(tower()(PIXELS), EXPECTED)


@torch.no_grad()
def test_the_picture_counts():
    assert_differs(tower()(noise(2, 3, 64, 64, start=2.5)), EXPECTED)


def strided(self: Bottleneck, x: Tensor) -> Tensor:
    """The 3 x 3 convolution skips pixels, as in torchvision's ResNet."""
    stride = 1 if isinstance(self.shrink, nn.Identity) else 2
    out = F.relu(self.bn1(self.conv1(x)))
    out = F.relu(self.bn2(F.conv2d(out, self.conv2.weight, stride=stride, padding=1)))
    shortcut = x if self.downsample is None else self.downsample(self.shrink(x))
    return F.relu(self.bn3(self.conv3(out)) + shortcut)


def strided_shortcut(self: Bottleneck, x: Tensor) -> Tensor:
    out = F.relu(self.bn1(self.conv1(x)))
    out = F.relu(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(self.shrink(out)))
    stride = 1 if isinstance(self.shrink, nn.Identity) else 2
    shortcut = x if self.downsample is None else self.downsample(x[..., ::stride, ::stride])
    return F.relu(out + shortcut)


def mean_of_places(self: AttentionPool, x: Tensor) -> Tensor:
    return self.attention.o_proj(x.flatten(2).mean(dim=2))


def without_positions(self: AttentionPool, x: Tensor) -> Tensor:
    places = x.flatten(2).transpose(1, 2)
    return self.attention(torch.cat([places.mean(dim=1, keepdim=True), places], dim=1))[:, 0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "forward"),
    [
        (Bottleneck, strided),
        (Bottleneck, strided_shortcut),
        (AttentionPool, mean_of_places),
        (AttentionPool, without_positions),
    ],
)
def test_mistakes_differ(
    kind: type[nn.Module], forward: Callable[[Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kind, "forward", forward)
    assert_differs(tower()(PIXELS), EXPECTED)


@torch.no_grad()
def test_the_largest_instead_of_the_mean_differs(monkeypatch: pytest.MonkeyPatch):
    largest = F.max_pool2d
    monkeypatch.setattr(F, "avg_pool2d", lambda x, size, *_: largest(x, size))
    assert_differs(tower()(PIXELS), EXPECTED)


@torch.no_grad()
def test_a_tower_left_in_training_mode_differs():
    assert_differs(tower().train()(PIXELS), EXPECTED)


@pytest.mark.parametrize(
    ("layers", "width", "pixels", "projection", "million"),
    [
        ((3, 4, 6, 3), 64, 224, 1024, 38.3),
        ((3, 4, 23, 3), 64, 224, 512, 56.3),
        ((4, 6, 10, 6), 80, 288, 640, 87.1),
    ],
)
def test_published_sizes(layers: tuple[int, ...], width: int, pixels: int, projection: int, million: float):
    """RN50, RN101 and RN50x4; their parameters as counted in OpenAI's program."""
    config = CLIPResNetConfig(layers, width, pixels, projection)
    with torch.device("meta"):
        model = CLIPResNet(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == million
    state = {f"visual.{theirs(name)}": tensor for name, tensor in model.state_dict().items()}
    assert CLIPResNetConfig.from_state(state) == config


def test_what_is_refused():
    with pytest.raises(InputError, match=r"no convolutional tower of CLIP under 'visual\.'"):
        CLIPResNetConfig.from_state({"visual.conv1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="a multiple of 32 pixels"):
        CLIPResNetConfig(image_size=225)
    with pytest.raises(ValueError, match="64"):
        tower()(torch.zeros(1, 3, 32, 32))
