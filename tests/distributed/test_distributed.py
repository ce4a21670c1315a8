"""Losses across real processes equal the loss of the whole batch in one, and no process waits forever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
from helpers import assert_differs, assert_equal
from torch import Tensor

import minivlm
from minivlm import distributed, losses
from minivlm.distributed import EXCHANGES, ExchangeError, ProcessError, costs
from minivlm.distributed.example import siglip_step
from minivlm.distributed.exchanges import Exchange

TESTS = Path(__file__).parents[1]
BENCH = TESTS.parent / "bench"
SIZES = (2, 3, 4)
NAMES = [exchange.__name__ for exchange in EXCHANGES]


@pytest.fixture(scope="module", params=SIZES)
def everyone(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each process found in all cases; processes are started once for each group size."""
    return distributed.run(request.param, cases.all_cases)


def assemble(everyone: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    """From all processes: their rows one after the other, and the mean of everything else."""
    shares = [found[name] for found in everyone]
    return {
        key: (torch.cat if key in ("images", "texts") else lambda x: torch.stack(x).mean(dim=0))(
            [one[key] for one in shares]
        )
        for key in shares[0]
    }


def whole(loss: Any, n: int = cases.N, bias: bool = True) -> dict[str, Tensor]:
    """The same in this process."""
    inputs = cases.tensors(n)
    if not bias:
        del inputs["bias"]
    return cases.gradients(loss, inputs)


# ---- SigLIP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", ", chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_siglip_equals_the_whole_batch(everyone: list[dict[str, Any]], name: str, form: str) -> None:
    expected = whole(losses.siglip_loss)
    found = assemble(everyone, name + form)
    for key in ("loss", "scale", "bias"):
        assert_equal(found[key], expected[key])
    for key in ("images", "texts"):  # a sum over processes, where the mean of the losses has a mean
        assert_equal(found[key] / len(everyone), expected[key])
        assert_differs(found[key], expected[key])


@pytest.mark.parametrize("name", NAMES)
def test_texts_without_gradient(everyone: list[dict[str, Any]], name: str) -> None:
    expected = whole(losses.siglip_loss)
    found = assemble(everyone, f"{name}, locked texts")
    assert found.keys() == {"loss", "images", "scale", "bias"}
    assert_equal(found["loss"], expected["loss"])
    assert_equal(found["images"] / len(everyone), expected["images"])


@pytest.mark.parametrize("name", [*NAMES, "clip"])
def test_one_pair_in_each_process(everyone: list[dict[str, Any]], name: str) -> None:
    size = len(everyone)
    clip = name == "clip"
    expected = whole(losses.clip_loss if clip else losses.siglip_loss, size, bias=not clip)
    found = assemble(everyone, f"{name}, one pair each")
    assert_equal(found["loss"], expected["loss"])
    assert_equal(found["texts"] / size, expected["texts"])


def test_a_group_of_some(everyone: list[dict[str, Any]]) -> None:
    size = len(everyone)
    rows = slice(cases.N - 2 * (cases.N // size), cases.N)
    inputs = {name: x[rows] if len(x) == cases.N else x for name, x in cases.tensors().items()}
    expected = cases.gradients(losses.siglip_loss, inputs)
    found = assemble(everyone[-2:], "group")
    assert_equal(found["loss"], expected["loss"])
    assert_equal(found["texts"] / 2, expected["texts"])
    for outside in everyone[:-2]:
        assert "not a member of the group" in outside["group"]


# ---- CLIP --------------------------------------------------------------------------------------------------


def test_clip_with_gathered_gradients_equals_the_whole_batch(everyone: list[dict[str, Any]]) -> None:
    expected = whole(losses.clip_loss, bias=False)
    for local in (False, True):
        found = assemble(everyone, f"clip {local} True")
        for key in ("loss", "scale"):
            assert_equal(found[key], expected[key])
        for key in ("images", "texts"):
            assert_equal(found[key] / len(everyone), expected[key])


def test_clip_without_gathered_gradients(everyone: list[dict[str, Any]]) -> None:
    """The whole loss: the gradient itself, which averaging over processes divides by W. Local: wrong."""
    expected = whole(losses.clip_loss, bias=False)
    full, local = (assemble(everyone, f"clip {local} False") for local in (False, True))
    for key in ("loss", "scale"):
        assert_equal(full[key], expected[key])
        assert_equal(local[key], expected[key])
    for key in ("images", "texts"):
        assert_equal(full[key], expected[key])
        for factor in (1, len(everyone)):
            assert_differs(local[key] / factor, expected[key])
        # No factor would fix it: they do not even point the same way.
        cosine = torch.cosine_similarity(local[key].flatten(), expected[key].flatten(), dim=0)
        assert cosine < 0.99


def test_each_process_sees_the_whole_loss_or_its_share(everyone: list[dict[str, Any]]) -> None:
    expected = whole(losses.clip_loss, bias=False)["loss"]
    for found in everyone:
        assert_equal(found["clip False True"]["loss"], expected)
        assert_differs(found["clip True True"]["loss"], expected)


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_batches_that_differ_are_refused_everywhere(everyone: list[dict[str, Any]]) -> None:
    b = cases.N // len(everyone)
    for found in everyone:
        for name in ("unequal", "unequal, clip"):
            assert found[name].startswith("ValueError: the processes have different batches. process 0: ")
            assert f"process 1: {b - 1} pictures [8, float32] and {b - 1} texts [8, float32]" in found[name]
            assert "drop_last=True" in found[name]
        assert f"process 1: {b - 1} pictures [8, float32] and {b} texts [8, float32]" in found["unpaired"]
        assert "not a matrix of floats" in found["no matrix"]
        assert f"{b} texts [8, bfloat16]" in found["precision"]
        assert f"{b} texts [8, float32, with gradient]" in found["gradients"]
        assert f"{b - 1} pictures and {b} texts in each process" in found["unpaired everywhere"]
        assert "0 pictures and 0 texts" in found["empty"]
        assert "pictures of width 7 and texts of width 8" in found["widths"]
        assert torch.isfinite(found["no_grad"])


def test_a_neighbor_that_does_not_come(everyone: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(everyone):
        if rank == 1:
            continue
        assert found["late"].startswith(f"ExchangeError: process {rank} of {len(everyone)} waited in vain")
        assert "restart all of them" in found["late"]
        assert found["waited"] < 15


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_process_that_dies_stops_the_others(moment: str) -> None:
    start = time.monotonic()
    with pytest.raises(ProcessError, match="process 1 of 3 failed: it ended with exit code 3") as caught:
        distributed.run(3, cases.dies_in_the_middle, moment, exchange_timeout=20.0)
    assert time.monotonic() - start < 60
    assert caught.value.rank == 1
    others = [caught.value.reports[rank] for rank in (0, 2)]
    for rank, report in zip((0, 2), others, strict=True):
        assert f"ExchangeError: process {rank} of 3 waited in vain for a neighbor in the ring" in report


def test_the_first_error_is_named() -> None:
    with pytest.raises(ProcessError, match="process 1 of 2 failed: KeyError: 'the data of this") as caught:
        distributed.run(2, "distributed_cases:fails_alone", 1)
    assert "fails_alone" in str(caught.value)  # where it was
    assert caught.value.rank == 1
    assert caught.value.reports[0].startswith("minivlm.distributed.places.ExchangeError: process 0 of 2")


def test_time_is_limited_and_nobody_stays() -> None:
    start = time.monotonic()
    with pytest.raises(ProcessError, match=r"2 of 3 processes have not finished: 1, 2\. They were stopped"):
        distributed.run(3, cases.hangs, timeout=3.0)
    assert time.monotonic() - start < 30


@pytest.mark.skipif(sys.platform == "win32", reason="Windows stops no process")
def test_a_process_that_breaks_off_while_it_reports() -> None:
    """Stopped: the time-out holds. Killed: its end is told."""
    start = time.monotonic()
    with pytest.raises(ProcessError, match="1 of 2 processes have not finished: 1"):
        distributed.run(2, cases.breaks_off, int(signal.SIGSTOP), timeout=15.0)
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessError, match="process 1 of 2 failed: it ended with exit code -9 and reported"):
        distributed.run(2, cases.breaks_off, int(signal.SIGKILL))


def test_a_result_that_cannot_be_read_here() -> None:
    wanted = (
        "process 0 of 1 failed: its result cannot be read here: ModuleNotFoundError: .*known_in_the_child"
    )
    with pytest.raises(ProcessError, match=wanted):
        distributed.run(1, cases.returns_what_only_it_knows)


def test_arguments_that_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="arguments of distributed_cases:hangs cannot be sent to other proc"):
        distributed.run(1, cases.hangs, lambda: 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_parent_leaves_nobody(tmp_path: Path) -> None:
    code = (
        "import sys; from minivlm import distributed\n"
        "if __name__ == '__main__': distributed.run(2, 'distributed_cases:waits_for_the_end', sys.argv[1])"
    )
    path = os.pathsep.join(str(folder) for folder in (Path(minivlm.__file__).parents[1], TESTS))
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    try:
        _wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    children = [int(entry.name) for entry in tmp_path.iterdir()]
    try:
        _wait_until(lambda: not any(_is_alive(child) for child in children))
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, though nobody has asked for its exit code


def _wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_results_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert distributed.run(3, "torch.distributed:get_rank") == [0, 1, 2]
    assert not list(tmp_path.glob("minivlm-*"))


ORDERS = {
    "bidirectional": [(0, 2, 1), (1, 0, 2), (2, 1, 0)],
    "shift": [(0, 2, 1), (1, 0, 2), (2, 1, 0)],
    "reduce": [(0, 1, 2)] * 3,
    "gather": [(0, 1, 2)] * 3,
}


@pytest.mark.parametrize("exchange", EXCHANGES, ids=NAMES)
def test_the_step_that_a_notebook_starts(exchange: Exchange) -> None:
    expected = whole(losses.siglip_loss)
    steps = distributed.run(3, siglip_step, *cases.tensors().values(), exchange)
    assert [step.owners for step in steps] == ORDERS[exchange.__name__]
    assert_equal(torch.stack([step.loss for step in steps]).mean(), expected["loss"])
    assert_equal(torch.cat([step.images for step in steps]) / 3, expected["images"])
    assert_equal(torch.cat([step.texts for step in steps]) / 3, expected["texts"])
    assert_equal(torch.stack([step.logit_scale for step in steps]).mean(dim=0), expected["scale"])
    assert_equal(torch.stack([step.logit_bias for step in steps]).mean(dim=0), expected["bias"])


def test_pairs_that_cannot_be_shared() -> None:
    with pytest.raises(ProcessError, match="11 pairs for 2 processes: expected a multiple of 2"):
        distributed.run(2, siglip_step, *cases.tensors(11).values())


def test_one_process_is_alone() -> None:
    expected = whole(losses.siglip_loss)
    for found in (*distributed.run(1, cases.alone), whole(distributed.siglip_loss)):
        for key, value in expected.items():
            assert_equal(found[key], value)
    clip = whole(distributed.clip_loss, bias=False)
    assert_equal(clip["texts"], whole(losses.clip_loss, bias=False)["texts"])


def test_several_processes_without_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    for loss, bias in ((distributed.siglip_loss, True), (distributed.clip_loss, False)):
        with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 8, but .*init_process_group"):
            whole(loss, bias=bias)
    monkeypatch.setenv("WORLD_SIZE", "1")
    whole(distributed.siglip_loss)


@pytest.mark.parametrize("name", ["torch", "__main__:main", lambda: 1])
def test_what_cannot_be_imported_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for attribute in ("__file__", "__spec__"):  # which pytest-xdist's processes do not have
        monkeypatch.setattr(sys.modules["__main__"], attribute, None, raising=False)
    with pytest.raises(ValueError, match=r"cannot be imported by a new process: expected"):
        distributed.run(2, name)
    with pytest.raises(ValueError, match="0 processes"):
        distributed.run(0, "os:getpid")


def test_the_error_is_one_of_running() -> None:
    assert issubclass(ExchangeError, RuntimeError)
    assert issubclass(ProcessError, RuntimeError)


# ---- costs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench/exchanges.py, imported as it is run: with its folder on the path."""
    sys.path.insert(0, str(BENCH))
    try:
        import exchanges

        yield exchanges
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("exchanges", None)
        sys.modules.pop("attention", None)


@pytest.fixture(scope="module", params=[(2, 512, 64), (3, 320, 48), (4, 128, 64)], ids=str)
def measured(bench: Any, request: pytest.FixtureRequest) -> list[Any]:
    return list(bench.cases(*request.param))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the bytes of a connection")
def test_bytes_on_the_wire_are_those_of_the_formula(measured: list[Any]) -> None:
    for case in measured:
        found, (forward, backward) = case.found, case.sent
        for size, formula in (
            (found.sent, forward),
            (found.received, forward),
            (found.sent_back, backward),
            (found.received_back, backward),
        ):
            assert 0 <= size - formula <= 0.04 * formula + 2048  # headers, sizes compared, barriers


def test_peak_memory_is_that_of_the_formula(measured: list[Any]) -> None:
    for case in (case for case in measured if case.exchange):
        assert case.found.peak == pytest.approx(case.peak, abs=1024)


def test_table_and_figure(bench: Any, measured: list[Any], tmp_path: Path) -> None:
    lines = [*bench.HEADING.splitlines(), *(case.row() for case in measured)]
    assert len({line.count("|") for line in lines}) == 1
    bench.draw(measured, tmp_path / "exchanges.png")
    assert (tmp_path / "exchanges.png").stat().st_size > 5000


def test_formulas() -> None:
    bidirectional, shift, reduce, gather = EXCHANGES
    assert [costs.rounds(one, 1) for one in EXCHANGES] == [0, 0, 0, 0]
    assert [costs.rounds(one, 2) for one in EXCHANGES] == [1, 1, 2, 1]
    assert [costs.rounds(one, 8) for one in EXCHANGES] == [4, 7, 8, 1]
    assert [costs.bytes_sent(one, 10, 3, 4) for one in EXCHANGES] == [360, 360, 720, 360]
    assert costs.bytes_sent(shift, 10, 3, 4, itemsize=2) == 180
    assert all(costs.bytes_sent(one, 10, 3, 1) == 0 for one in EXCHANGES)
    assert costs.clip_bytes_sent(10, 3, 4) == (720, 720)
    assert costs.clip_bytes_sent(10, 3, 4, gather_with_grad=False) == (720, 0)
    # Chunked blocks grow with the batch, plain ones with its square.
    for exchange, chunk, growth in ((gather, 64, 2.0), (gather, None, 4.0), (bidirectional, 64, 2.0)):
        small, large = (costs.peak_bytes(exchange, b, 64, 2, chunk=chunk) for b in (2**14, 2**15))
        assert large / small == pytest.approx(growth, rel=0.01)
    assert costs.peak_bytes(reduce, 8, 4, 2) > costs.peak_bytes(shift, 8, 4, 2)
