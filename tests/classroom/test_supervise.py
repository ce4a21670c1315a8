"""A supervised process ends with all that it has started. Every test signals its own processes only."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")

# It prints the numbers of three processes that try to get away: a child in a session of its own, without the
# environment; a grandchild whose parent has ended; and what that one starts.
ESCAPE = """
import os, subprocess, sys, time
from minivlm.classroom.supervise import supervise
supervise()
print(subprocess.Popen(["sleep", "600"], start_new_session=True, env={}).pid, flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
    os._exit(0)
time.sleep(1)
print("ready", flush=True)
"""


def start(end: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A supervised process that ends so, and the numbers of what it has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", ESCAPE + end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    words = []
    while "ready" not in words:
        words += process.stdout.readline().split()
    return process, [int(word) for word in words if word != "ready"]


def alive(numbers: list[int]) -> list[int]:
    return [number for number in numbers if Path(f"/proc/{number}").exists()]


@pytest.mark.parametrize(
    ("end", "code"), [("os._exit(3)", 3), ("os.abort()", 128 + signal.SIGABRT), ("sys.exit()", 0)]
)
def test_all_end_when_it_ends(end: str, code: int) -> None:
    process, started = start(end)
    assert len(started) == 3
    assert process.wait(60) == code
    assert alive(started) == []


def test_all_end_when_nobody_waits_any_more() -> None:
    process, started = start("time.sleep(600)")
    time.sleep(0.2)
    assert alive(started) == started
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 128 + signal.SIGKILL
    assert alive(started) == []
