"""Pages of a mapped file that are no longer needed, given back to the system.

A loaded model's weights are pages of its file. They come into memory when they are first read, and stay,
since nobody says that they may go. Rounding reads each matrix once, so the process would hold every matrix
twice, rounded and not. Here Linux (from 5.4 on) is told which pages may go. It is advice: what somebody reads
later comes back from the file, and other systems keep everything.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

MADV_PAGEOUT = 21  # Linux's mman.h


def give_back(tensor: Tensor) -> None:
    """Let the pages go that hold nothing but this tensor. Its numbers stay what they are."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT)
