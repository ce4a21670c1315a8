"""What fits is loaded; what does not is refused before it is read, with numbers that can be checked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_paligemma
from safetensors.torch import load_file

from minivlm import InputError, PaliGemma
from minivlm.checkpoints import devices
from minivlm.checkpoints.devices import bytes_needed, check_dtype, free_memory, require_memory
from minivlm.checkpoints.weights import WEIGHTS

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"

# What is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_cpu_computes_in(dtype: torch.dtype):
    check_dtype(dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_no_floating_point(dtype: torch.dtype):
    with pytest.raises(InputError, match=rf"dtype is {dtype}: models compute in torch.float32"):
        check_dtype(dtype, "cpu")


def test_a_dtype_that_only_stores():
    with pytest.raises(InputError, match=r"cpu cannot compute in torch.float8_e4m3fn .*: use torch.float32"):
        check_dtype(torch.float8_e4m3fn, "cpu")


@pytest.mark.parametrize("device", ["cuda", "mps", "nowhere"])
def test_a_device_that_is_not_there(device: str):
    if device != "nowhere" and getattr(torch, device).is_available():
        pytest.skip("it is there")
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here .*: use device 'cpu'"):
        check_dtype(torch.float32, device)


# How much is needed


def test_only_copies_need_memory():
    half = torch.zeros(10, 10, dtype=torch.bfloat16)
    single = torch.zeros(5)
    assert bytes_needed([half, single], None, "cpu") == 0
    assert bytes_needed([half, single], torch.bfloat16, "cpu") == 2 * 5
    assert bytes_needed([half, single], torch.float32, "cpu") == 4 * 100
    assert bytes_needed([half, single], None, "cuda") == 2 * 100 + 4 * 5
    assert bytes_needed([half, single], torch.float32, "cuda") == 4 * 105
    assert bytes_needed([half, single], None, "cpu", bytes_per_weight=1) == 105


# How much there is


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write the files of a Linux system that has 600 KiB available and no groups."""
    monkeypatch.setattr(devices, "PROC", tmp_path / "proc")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path / "groups")

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", MEMINFO)
    return write


def test_what_the_system_has(system: Callable[[str, str], None]):
    assert free_memory("cpu") == 600 * 1024


@pytest.mark.parametrize("place", ["job/step", "job", "."], ids=["own", "outer", "root"])
def test_a_group_of_version_2(system: Callable[[str, str], None], place: str):
    """The limit may be that of an outer group. File pages can be dropped, so they do not count as used."""
    system("proc/self/cgroup", "0::/job/step\n")
    system("groups/job/step/memory.max", "max\n")
    system("groups/job/step/memory.current", "70000\n")
    system(f"groups/{place}/memory.max", "100000\n")
    system(f"groups/{place}/memory.current", "70000\n")
    system(f"groups/{place}/memory.stat", "anon 40000\nactive_file 10000\ninactive_file 20000\n")
    assert free_memory("cpu") == 100000 - (70000 - 30000)


def test_a_group_of_version_1(system: Callable[[str, str], None]):
    system("proc/self/cgroup", "5:cpuset:/\n4:memory:/seen/from/outside\n1:name=systemd:/\n0::/\n")
    system("groups/memory/memory.limit_in_bytes", "100000\n")
    system("groups/memory/memory.usage_in_bytes", "70000\n")
    system("groups/memory/memory.stat", "total_active_file 0\ntotal_inactive_file 20000\ncache 5\n")
    assert free_memory("cpu") == 100000 - 50000
    system("groups/memory/memory.limit_in_bytes", "9223372036854771712\n")  # none
    assert free_memory("cpu") == 600 * 1024


def test_the_limit_of_a_process():
    pytest.importorskip("resource")
    code = (
        "import resource, torch; from minivlm.checkpoints.devices import free_memory\n"
        "size = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 10**8, size + 10**8))\n"
        "print(free_memory('cpu'))"
    )
    if sys.platform != "linux":
        pytest.skip("the size of a process is read from /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9e8 < int(result.stdout) <= 1e8


def test_nothing_known_nothing_refused(system: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch):
    (devices.PROC / "meminfo").unlink()
    monkeypatch.setattr(devices.os, "sysconf_names", {"SC_PHYS_PAGES": 0})
    monkeypatch.setattr(devices.os, "sysconf", {"SC_PHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory("cpu") == 7 * 4096  # as on macOS
    monkeypatch.delattr(devices.os, "sysconf_names")
    assert free_memory("cpu") is None  # as on Windows
    require_memory(10**15, "cpu", "the weights", "")
    assert free_memory("meta") is None


# Loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiny, in bfloat16."""
    tiny_paligemma().bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_that_does_not_fit(folder: Path, system: Callable[[str, str], None]):
    weights = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    short = int(4 * weights * 1.1) // 1024
    system("proc/meminfo", MEMINFO.replace("600", str(short)))
    with pytest.raises(InputError) as caught:
        PaliGemma.from_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(f"the weights of {folder} as torch.float32 take 0.0 GB of memory on cpu, ")
    assert message.endswith(
        "is free: load it as bfloat16 (dtype=torch.bfloat16, --dtype bfloat16), which stays in the file and "
        "needs no memory; or use a smaller checkpoint, or a machine with more memory"
    )
    for dtype in (torch.bfloat16, None):
        PaliGemma.from_pretrained(folder, dtype=dtype)
    system("proc/meminfo", MEMINFO.replace("600", str(short + 1)))
    PaliGemma.from_pretrained(folder)


def test_the_numbers_of_a_refusal(system: Callable[[str, str], None]):
    system("proc/meminfo", "MemAvailable: 8000000 kB\n")
    message = "it takes? 11.7 GB of memory on cpu, 12.9 GB with room to work, but only 8.2 GB is free: rest"
    with pytest.raises(InputError, match=message.replace("takes?", "take")):
        require_memory(11_700_000_000, "cpu", "it", "rest")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu():
    free = free_memory("cuda")
    assert free is not None
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
    held = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    assert free - (free_memory("cuda") or 0) >= 2**27
    del held
