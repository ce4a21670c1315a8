"""What an exchange costs: bytes sent and tensors held by one process, as functions of batch and processes.

Pure functions of numbers. `bench/exchanges.py` holds them beside what the kernel and PyTorch count in 2 to 4
real processes, and draws them for more than a machine has. W processes, b pairs in each, width D, and `texts`
for b * D numbers in bytes:

    exchange        rounds           sent forward    sent backward
    bidirectional   ceil((W-1)/2)    (W-1) texts     (W-1) texts
    shift           W - 1            (W-1) texts     (W-1) texts
    reduce          W                2(W-1) texts    2(W-1) texts
    gather          1                (W-1) texts     (W-1) texts

Each process receives as much as it sends. Sums and gathers are counted as rings carry them out (gloo, and
NCCL for large tensors): a sum of x bytes sends 2 (W-1)/W x. Not counted are headers and the 64 bytes to
each other process with which sizes are compared.
"""

from __future__ import annotations

from minivlm.distributed.exchanges import Exchange, bidirectional, gather, reduce, shift


def rounds(exchange: Exchange, processes: int) -> int:
    """Exchanges one after the other in the forward pass, and as many in the backward pass."""
    others = processes - 1
    if others == 0:
        return 0
    of: dict[Exchange, int] = {bidirectional: (others + 1) // 2, shift: others, reduce: processes, gather: 1}
    return of[exchange]


def bytes_sent(exchange: Exchange, batch: int, width: int, processes: int, itemsize: int = 4) -> int:
    """By one process in the forward pass. Backward as many, if the texts take gradients.

    Args:
        exchange: one of `EXCHANGES`.
        batch, width: texts [b, D] of one process.
        processes: W.
        itemsize: bytes of a number.
    """
    texts = batch * width * itemsize
    return (2 if exchange is reduce else 1) * (processes - 1) * texts


def clip_bytes_sent(
    batch: int, width: int, processes: int, itemsize: int = 4, *, gather_with_grad: bool = True
) -> tuple[int, int]:
    """By one process in the forward and in the backward pass of `clip_loss`: pictures and texts travel."""
    both = 2 * (processes - 1) * batch * width * itemsize
    return both, both if gather_with_grad else 0


def logits_held(batch: int, processes: int, itemsize: int = 4, chunk: int | None = None) -> int:
    """Bytes of logits, and of what is made of them, where `peak_bytes` is reached.

    Plain blocks: autograd keeps four matrices [b, b] of each for the backward pass (the cosines, the labels,
    their product with the logits, and a buffer that log-sigmoid has on the CPU and not on a GPU); while the
    last one is made, there are two more. So the ring does not save memory by itself: it is W times b * b.

    Chunked blocks: nothing is kept, five matrices [b, chunk] are at work.
    """
    if chunk is None:
        return (4 * processes + 2) * batch * batch * itemsize
    return 5 * batch * min(chunk, batch) * itemsize


def peak_bytes(
    exchange: Exchange, batch: int, width: int, processes: int, itemsize: int = 4, chunk: int | None = None
) -> int:
    """The most bytes of tensors that one process holds for `siglip_loss` and its backward pass, on a CPU.

    Its own embeddings are not counted: they are there before.

    Args:
        exchange, batch, width, processes, itemsize: as in `bytes_sent`.
        chunk: of the chunked loss in `minivlm.speed.chunked_loss`, if that is the loss of a block (at least
            as large as `width`); None: `minivlm.losses.siglip_loss`.
    """
    texts = batch * width * itemsize
    arrived = (
        processes if exchange in (reduce, gather) else processes - 1
    )  # with or without a copy of the own
    # Of each block, plain: pictures and texts of length 1. Chunked: the gradients of both; and while the last
    # one is made, also pictures and texts of length 1.
    made = 2 * processes if chunk is None else 2 * processes + 2
    lengths = 4 * processes * batch * itemsize  # of pictures and texts, before and after `clamp`
    return logits_held(batch, processes, itemsize, chunk) + (arrived + made) * texts + lengths
