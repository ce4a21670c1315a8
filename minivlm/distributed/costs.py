"""What an exchange costs: bytes sent and held by one process, as functions of batch and processes.

Pure functions of numbers. `bench/exchanges.py` compares them with what the kernel and PyTorch count in 2 to 4
real processes, and plots them for more processes than one machine has. There are W processes with b pairs
each, embeddings have width D, and `texts` stands for the bytes of b * D numbers:

    exchange        rounds           sent forward    sent backward
    bidirectional   ceil((W-1)/2)    (W-1) texts     (W-1) texts
    shift           W - 1            (W-1) texts     (W-1) texts
    reduce          W                2(W-1) texts    2(W-1) texts
    gather          1                (W-1) texts     (W-1) texts

Each process receives as much as it sends. Sums and gathers are counted as ring algorithms (gloo, and NCCL for
large tensors): a sum of x bytes sends 2 (W-1)/W x. Not counted are headers, and the 64 bytes to each other
process for comparing sizes.
"""

from __future__ import annotations

from minivlm.distributed.exchanges import Exchange, bidirectional, gather, reduce, shift


def rounds(exchange: Exchange, processes: int) -> int:
    """Sequential exchanges in the forward pass; the backward pass has as many."""
    others = processes - 1
    if others == 0:
        return 0
    of: dict[Exchange, int] = {bidirectional: (others + 1) // 2, shift: others, reduce: processes, gather: 1}
    return of[exchange]


def bytes_sent(exchange: Exchange, batch: int, width: int, processes: int, itemsize: int = 4) -> int:
    """Bytes sent by one process in the forward pass, and in the backward pass if the texts need gradients.

    Args:
        exchange: one of `EXCHANGES`.
        batch, width: texts [b, D] of one process.
        processes: W.
        itemsize: bytes per number.
    """
    texts = batch * width * itemsize
    return (2 if exchange is reduce else 1) * (processes - 1) * texts


def clip_bytes_sent(
    batch: int, width: int, processes: int, itemsize: int = 4, *, gather_with_grad: bool = True
) -> tuple[int, int]:
    """Bytes sent by one process in the forward and in the backward pass of `clip_loss`, for both towers."""
    both = 2 * (processes - 1) * batch * width * itemsize
    return both, both if gather_with_grad else 0


def logits_held(batch: int, processes: int, itemsize: int = 4, chunk: int | None = None) -> int:
    """Bytes of logits, and of what is computed from them, at the moment of `peak_bytes`.

    Plain blocks: autograd keeps four matrices [b, b] per block for the backward pass (the cosines, the
    labels, their product with the logits, and a buffer that log-sigmoid has on the CPU but not on a GPU);
    while the last block is computed, there are two more. So the ring alone saves no memory: it keeps W times
    b * b.

    Chunked blocks: nothing is kept; five matrices [b, chunk] are in use.
    """
    if chunk is None:
        return (4 * processes + 2) * batch * batch * itemsize
    return 5 * batch * min(chunk, batch) * itemsize


def peak_bytes(
    exchange: Exchange, batch: int, width: int, processes: int, itemsize: int = 4, chunk: int | None = None
) -> int:
    """Peak bytes of tensors that one process holds during `siglip_loss` and its backward pass, on a CPU.

    Its own embeddings are not counted: they already exist.

    Args:
        exchange, batch, width, processes, itemsize: as in `bytes_sent`.
        chunk: chunk size (at least `width`), if blocks use the chunked loss of `minivlm.speed.chunked_loss`;
            None if they use `minivlm.losses.siglip_loss`.
    """
    texts = batch * width * itemsize
    # Texts: of the others, and with `reduce` and `gather` also a copy of its own.
    arrived = processes if exchange in (reduce, gather) else processes - 1
    # Plain: each block keeps normalized pictures and texts. Chunked: each keeps the gradients of both, and
    # while the last is computed, there are normalized pictures and texts as well.
    made = 2 * processes if chunk is None else 2 * processes + 2
    lengths = 4 * processes * batch * itemsize  # norms of pictures and texts, before and after `clamp`
    return logits_held(batch, processes, itemsize, chunk) + (arrived + made) * texts + lengths
