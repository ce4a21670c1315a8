"""torch.compile, where it pays: the parts of a model that hold no state and are repeated in every layer.

One norm, one MLP and one int8 product are compiled once and serve all layers, in seconds; compiling the
whole decoder would take minutes, for every length of the cache anew. Attention stays as it is: its cache
grows, and its fast forms are ready-made kernels. Nothing is computed differently, only in fewer passes over
memory, so that results agree up to rounding.
"""

from __future__ import annotations

from shutil import which

import torch
from torch import nn

from minivlm.errors import InputError
from minivlm.layers import MLP, GatedMLP, LlamaRMSNorm, RMSNorm
from minivlm.speed.int8 import Int8Linear
from minivlm.speed.packing import PackedLinear
from minivlm.speed.pieces import GatedMLPInPieces, MLPInPieces

COMPILERS = ("c++", "g++", "clang++", "cl")  # one of which PyTorch looks for
PARTS = (RMSNorm, LlamaRMSNorm, MLP, GatedMLP, Int8Linear)


def compile_parts(model: nn.Module) -> None:
    """Compile these parts in place, when each is first used.

    Raises:
        InputError: on a CPU, when there is no C++ compiler; the model is packed, in a form that the compiler
            cannot read.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("a packed model cannot be compiled: choose one of the two")
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if on_cpu and not any(which(name) for name in COMPILERS):
        raise InputError("torch.compile needs a C++ compiler and finds none: install one, or do without")
    for module in model.modules():
        if isinstance(module, MLPInPieces | GatedMLPInPieces):
            # A piece, and not the loop over pieces, whose number differs from prompt to prompt.
            module.at_once = torch.compile(module.at_once, dynamic=True)  # type: ignore[method-assign]
        elif isinstance(module, PARTS):
            module.compile(dynamic=True)
