"""What a step of training costs on W devices, as arithmetic: bytes held, bytes sent, and bounds on its time.

Pure functions of numbers, before anything is rented. With P weights, of which Q learn, AdamW in fp32:

                          replicated (DDP)                 divided (FSDP)
    weights               4 P                              4 P / W
    gradients             4 Q                              4 Q / W
    two moments           8 Q                              8 Q / W
    gathered for a block  none                             the largest block, twice: one computes, one arrives
    sent in a step        2 (W-1)/W 4 Q                    (W-1)/W (4 P + 4 P + 4 Q)

A sum over processes in a ring sends every gradient nearly twice (reduce-scatter, then all-gather). Divided
weights are gathered for the forward pass and once more for the backward pass, and gradients are summed once:
half as much again, for memory that falls with the number of devices (ZeRO stage 3, S. Rajbhandari et al.,
2019, https://arxiv.org/abs/1910.02054, section 7). With bf16, what is gathered is half as large.

`bench/scaling.py` compares bytes with those that real processes hold and send. Times are bounds from below.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class Model:
    """Numbers of weights, and the sizes that activations depend on."""

    weights: int
    learning: int  # of them
    block: int  # of the largest block
    blocks: int
    width: int
    vocabulary: int


@dataclass(frozen=True)
class Step:
    """Rows of all devices together, and how they are computed."""

    devices: int
    rows: int
    length: int  # tokens of a row, picture and text
    bf16: bool = True  # in the products; weights, gradients and moments are in fp32

    @property
    def rows_each(self) -> int:
        """Of the device that has most."""
        return -(-self.rows // self.devices)


@dataclass(frozen=True)
class Cost:
    """Of one device, in bytes."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    activations: float
    sent: float

    @property
    def held(self) -> float:
        """All but what is sent."""
        return self.weights + self.gradients + self.moments + self.gathered + self.activations


def activations(model: Model, step: Step) -> int:
    """Bytes of what gradient checkpointing keeps: inputs of blocks, and logits with their gradient in fp32.

    What the block that computes needs for itself comes on top, and so does everything else without it.
    """
    tokens = step.rows_each * step.length
    number = BF16 if step.bf16 else FP32
    return tokens * (model.blocks * model.width * number + 2 * model.vocabulary * FP32)


def replicated(model: Model, step: Step) -> Cost:
    """Every device holds everything. With bf16, a copy of the weights computes, see `training.precision`."""
    copy = BF16 * model.weights if step.bf16 else 0
    number = BF16 if step.bf16 else FP32  # the gradients of the copy are averaged
    return Cost(
        weights=FP32 * model.weights + copy,
        gradients=FP32 * model.learning,
        moments=2 * FP32 * model.learning,
        gathered=0,
        activations=activations(model, step),
        sent=2 * _others(step) * number * model.learning,
    )


def divided(model: Model, step: Step) -> Cost:
    """Every device holds its part, and for a moment whole blocks."""
    number = BF16 if step.bf16 else FP32
    return Cost(
        weights=FP32 * model.weights / step.devices,
        gradients=FP32 * model.learning / step.devices,
        moments=2 * FP32 * model.learning / step.devices,
        gathered=2 * number * model.block,
        activations=activations(model, step),
        sent=_others(step) * (2 * number * model.weights + FP32 * model.learning),
    )


def _others(step: Step) -> float:
    return (step.devices - 1) / step.devices


def operations(model: Model, step: Step) -> int:
    """Of one device in a step: for each weight and token a multiplication and an addition, forward, and twice
    that backward; with checkpointing, forward once more. Attention's own products are not counted.
    """
    return 8 * model.weights * step.rows_each * step.length


def seconds_at_least(cost: Cost, operations: int, per_second: float, bandwidth: float) -> tuple[float, float]:
    """Of computing and of sending, if a device does so many operations, and sends so many bytes, a second.

    The two can overlap, so a step takes at least the longer one.
    """
    return operations / per_second, cost.sent / bandwidth
