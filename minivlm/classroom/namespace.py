"""Linux: a process sees every file, but as read-only, and has a /dev/shm of its own.

The files that a process sees are those of its mount namespace (man 7 mount_namespaces). A new one begins as
a copy, and what is mounted there is seen by nobody else. It takes the rights of root, which everybody has
inside a new user namespace, where the system allows those: many containers and some distributions do not.
Unlike Landlock, a read-only mount also keeps the owner, mode and dates of files.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # for unshare
NO_SETUID_NO_DEVICES, BIND, EVERYTHING_BELOW, PRIVATE = 2 | 4, 1 << 12, 1 << 14, 1 << 18  # for mount
MOUNT_SETATTR = 442  # a system call without a function in older C libraries; since Linux 5.12
HERE, RECURSIVE, READ_ONLY = -100, 0x8000, 1  # for mount_setattr
SHARED_MEMORY = Path("/dev/shm")
SIZE = "size=1g"  # of its own /dev/shm


def enter(folder: Path) -> bool:
    """From now on this process, and what it starts, can change files in this folder only. False: the system
    does not allow it, and nothing has changed. Call it while there is one thread.
    """
    if sys.platform != "linux":
        return False
    folder = folder.resolve()
    trial = os.fork()  # since half of it could not be undone
    if trial == 0:
        os._exit(not _entered(folder))
    _, status = os.waitpid(trial, 0)
    return status == 0 and _entered(folder)


def _entered(folder: Path) -> bool:
    writable = [folder, *filter(Path.is_dir, [SHARED_MEMORY])]
    try:
        _new_namespace()
        _mount("none", "/", "", PRIVATE | EVERYTHING_BELOW)  # from here on, nobody else sees what is mounted
        _mount(folder, folder, "", BIND)
        if SHARED_MEMORY in writable:
            _mount("tmpfs", SHARED_MEMORY, "tmpfs", NO_SETUID_NO_DEVICES, SIZE)
        _read_only(Path("/"), RECURSIVE)
        for place in writable:
            _read_only(place, 0, undo=True)
        os.chdir(Path.cwd())  # into the folder as it is mounted now
    except OSError:
        return False
    return True


def _new_namespace() -> None:
    """Raises OSError: the system does not allow it."""
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", NEW_MOUNTS)  # root needs no more
    except PermissionError:
        _call("unshare", NEW_MOUNTS | NEW_USER)
        # Inside, everybody keeps their numbers.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _mount(what: str | Path, where: str | Path, kind: str, flags: int, options: str = "") -> None:
    names = (os.fsencode(what), os.fsencode(where), kind.encode())
    _call("mount", *names, ctypes.c_ulong(flags), options.encode())


def _read_only(where: Path, flags: int, undo: bool = False) -> None:
    attributes = struct.pack("=4Q", *((0, READ_ONLY) if undo else (READ_ONLY, 0)), 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _call("syscall", MOUNT_SETATTR, HERE, os.fsencode(where), flags, attributes, size)


def _call(function: str, *arguments: object) -> None:
    """Raises OSError: the system call failed."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
