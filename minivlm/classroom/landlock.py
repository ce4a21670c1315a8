"""Linux: restrict a process, and all that it starts, to changing files below some folders.

With Landlock (https://docs.kernel.org/userspace-api/landlock.html), in the kernel since version 5.13, a
process gives up rights for good, and needs no privilege to do so. What is given up here is every way to
write, create, move and delete files, and, since version 6, to send signals to other processes and to
connect to their abstract sockets. Reading, the network, and the owner, mode and dates of files are not
restricted. The C library has no functions for it, so the system calls are made by number; the numbers are the
same on all processors.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

CREATE, ADD, RESTRICT = 444, 445, 446  # system calls
VERSION = 1  # a flag of the first: return the version
BENEATH = 1  # a kind of rule: a folder and everything in it
NO_NEW_PRIVILEGES = 38  # for prctl: no program may regain what was given up

# Rights, one bit each, from linux/landlock.h.
WRITE_FILE = 1 << 1
FOLDER_RIGHTS = 1 << 4 | 1 << 5 | sum(1 << bit for bit in range(6, 13))  # to remove, and to create any kind
MOVE = 1 << 13  # to another folder; since version 2, and before that never allowed
TRUNCATE = 1 << 14  # since version 3
DEVICES = 1 << 15  # to control them, beyond reading and writing; since version 5
# No abstract sockets of, and no signals to, processes that are not restricted likewise; since version 6.
SCOPES = 1 << 0 | 1 << 1


def version() -> int:
    """The version of Landlock in this kernel; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, _library().syscall(CREATE, None, ctypes.c_size_t(0), VERSION))


def change_only(folders: Sequence[Path]) -> bool:
    """From now on this thread, and what it starts, can change no files outside these, and, where the kernel
    knows scopes, send no signals to others. False: no Landlock.

    Raises OSError: a folder does not exist, or the kernel refuses.
    """
    known = version()
    if not known:
        return False
    of_files = WRITE_FILE | (TRUNCATE if known >= 3 else 0) | (DEVICES if known >= 5 else 0)
    rights = of_files | FOLDER_RIGHTS | (MOVE if known >= 2 else 0)
    library = _library()
    # Files, network, scopes: older kernels know, and expect, a shorter structure.
    attributes = struct.pack("=3Q", rights, 0, SCOPES) if known >= 6 else struct.pack("=Q", rights)
    rules = _checked(library.syscall(CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for folder in folders:
            place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", rights if folder.is_dir() else of_files, place)
                _checked(library.syscall(ADD, rules, BENEATH, rule, 0))
            finally:
                os.close(place)
        _checked(library.prctl(NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0))))
        _checked(library.syscall(RESTRICT, rules, 0))
    finally:
        os.close(rules)
    return True


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    """Raises OSError: the system call failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
