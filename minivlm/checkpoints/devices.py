"""What a device can compute and hold, checked before gigabytes are downloaded and read.

Weights on the CPU in the file's own dtype need no memory of their own: they are pages of a memory-mapped
file, which the system drops and reads again as needed. If the file is larger than memory, answering is slow,
since every token reads every weight, but nothing breaks. A copy cannot be dropped: weights in another dtype
or on another device must fit, or the system kills the process in the middle of loading, without a message. So
copies are counted, mapped weights are not, and what does not fit is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.errors import InputError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Activations, the key/value cache and the logits come on top of the weights, and depend on pictures and
# prompts: for a picture of 224 pixels and 3 billion weights they are well below this fraction of the weights.
HEADROOM = 0.1


def check_device(device: torch.device | str) -> torch.device:
    """Raises InputError: there is no such device here, or one that cannot hold numbers."""
    try:
        one = torch.ones(1, device=device)
        one.item()  # the meta device has shapes alone
        return one.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here ({_reason(error)}): use device 'cpu' (--device cpu)"
        ) from error


def check_dtype(dtype: torch.dtype, device: torch.device | str) -> None:
    """Raises InputError: there is no such device here, or it cannot run a model in this dtype.

    What a device supports changes from one version of PyTorch to the next, so a few operations are tried.
    """
    if not dtype.is_floating_point:
        raise InputError(
            f"dtype is {dtype}: models compute in torch.float32, torch.bfloat16 or torch.float16"
        )
    if str(device) != "meta":  # on which a model can be built and counted, though not run
        check_device(device)
    try:
        x = torch.ones(1, 1, 2, 2, dtype=dtype, device=device)
        x = F.conv2d(x, x[..., :1, :1])
        x = F.layer_norm((x @ x).softmax(dim=-1), (2,))
        F.gelu(x, approximate="tanh")
    except (RuntimeError, TypeError) as error:  # MPS raises TypeError for float64
        raise InputError(
            f"{device} cannot compute in {dtype} ({_reason(error)}): use torch.float32 or torch.bfloat16"
        ) from error


def bytes_needed(
    tensors: Iterable[Tensor],
    dtype: torch.dtype | None,
    device: torch.device | str,
    bytes_per_weight: float | None = None,
) -> int:
    """Memory for copies of tensors from mapped files; tensors that stay in their file need none.

    Args:
        dtype: what they are converted to; None keeps the file's.
        bytes_per_weight: of a format that is not a PyTorch dtype, in which everything is a copy.
    """
    if bytes_per_weight is not None:
        return round(bytes_per_weight * sum(tensor.numel() for tensor in tensors))
    stays = torch.device(device).type == "cpu"
    return sum(
        tensor.numel() * (dtype or tensor.dtype).itemsize
        for tensor in tensors
        if not (stays and dtype in (None, tensor.dtype))
    )


def require_memory(needed: int, device: torch.device | str, what: str, advice: str) -> None:
    """Raises InputError: the device does not have that many bytes free, plus headroom for the work itself.

    If the system does not say what is free, nothing is refused.

    Args:
        what: what needs the memory, as the start of a sentence.
        advice: what to do instead.
    """
    free = free_memory(device) if needed else None
    if free is not None and needed * (1 + HEADROOM) > free:
        raise InputError(
            f"{what} take {gigabytes(needed)} of memory on {device}, {gigabytes(needed * (1 + HEADROOM))} "
            f"with room to work, but only {gigabytes(free)} is free: {advice}"
        )


def gigabytes(number: float) -> str:
    """Bytes for people to read, in units of 10^9."""
    return f"{number / 1e9:.1f} GB"


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a process can use on a device without anything being killed or swapped; None if unknown.

    On Linux, the smallest of what the system has, what its control groups leave (the limits of containers and
    batch systems) and what `ulimit -v` leaves; file pages in memory count as free. On other systems, the
    total memory, if they report it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + ours
    if device.type != "cpu":
        return None
    return min([*_of_the_system(), *_of_control_groups(), *_of_the_process()], default=None)


def _of_the_system() -> Iterator[int]:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])
            return
    names = getattr(os, "sysconf_names", {})  # not on Windows
    if "SC_PHYS_PAGES" in names:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_control_groups() -> Iterator[int]:
    """The limit of a group applies to all groups inside it together."""
    for line in _read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:  # version 2
            root, limit, usage, prefix = CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdecimal() and used.isdecimal():  # no limit is "max", or a very large number
                pages = (f"{prefix}active_file", f"{prefix}inactive_file")
                stat = (entry.split() for entry in _read(folder / "memory.stat").splitlines())
                files = sum(int(value) for name, value in stat if name in pages)
                yield max(int(most) - int(used) + files, 0)
            if folder == root:
                break


def _of_the_process() -> Iterator[int]:
    if sys.platform != "linux":
        return
    import resource  # not on Windows

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    size = _read(PROC / "self/statm").split()
    if most != resource.RLIM_INFINITY and size:
        yield max(most - int(size[0]) * os.sysconf("SC_PAGE_SIZE"), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]
