"""What was read from a mapped file goes back to the system when nobody needs it, and can be read again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

READ = """
import sys
from pathlib import Path
from minivlm.checkpoints.weights import read_tensors
from minivlm.speed.pages import give_back

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "RssFile" in line)

tensors = read_tensors(Path(sys.argv[1]))
start = held()
total = tensors["weight"].sum()
read = held()
give_back(tensors["weight"])
print(read - start, held() - start, bool(tensors["weight"].sum() == total))
"""


def in_memory(path: Path) -> bool:
    """Whether a path's files are memory themselves, as those of a tmpfs, which cannot be given back."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    *_, kind = max((len(point), kind) for point, kind in mounts if path.is_relative_to(point))
    return kind in ("tmpfs", "ramfs", "overlay")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about Linux")
def test_pages_of_a_file_go_back(tmp_path: Path) -> None:
    if in_memory(tmp_path):
        pytest.skip(f"{tmp_path} is in memory")
    save_file({"weight": torch.randn(2**22)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], check=True, capture_output=True, text=True
    )
    before, after, same = done.stdout.split()
    assert int(before) >= 2**14  # KiB: the whole tensor
    assert int(after) < 2**10
    assert same == "True"
