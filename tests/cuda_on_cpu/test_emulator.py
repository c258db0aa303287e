"""The emulator itself: every rule that it knows is broken once, and numbers are rounded as torch rounds them."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.cuda_on_cpu.harness import DTYPES, Library, Run, build, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels on this CPU: {unavailable()}")


class Toy(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p)]


@pytest.fixture(scope="module")
def toys() -> Library:
    return build("toys.cpp")


def play(toys: Library, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, Run]:
    x, y = torch.arange(128.0), torch.full((128,), -1.0)
    toy = Toy(x.data_ptr(), y.data_ptr())
    run = toys.launch("toy_on_cpu", ctypes.byref(toy), name.encode(), reads=[x], writes=[y], seed=seed)
    return x, y, run


@pytest.mark.parametrize("seed", range(6))
def test_what_is_within_the_rules_is_not_reported(toys: Library, seed: int) -> None:
    index = torch.arange(64)
    for name, partner in (("barrier_orders", index ^ 63), ("syncwarp_orders", index ^ 31)):
        x, y, run = play(toys, name, seed)
        assert run.reports == ()
        assert torch.equal(y, torch.cat([x[:64][partner], x[64:][partner]]))
    x, y, run = play(toys, "copies_arrive", seed)
    expected = x[4 * ((index ^ 32) % 32) + 1].masked_fill((index ^ 32) % 32 == 0, 0)  # one chunk does not exist
    assert run.reports == ()
    assert torch.equal(y, torch.cat([expected, expected]))


def test_what_is_loaded_stored_and_copied_is_counted(toys: Library) -> None:
    _, _, run = play(toys, "barrier_orders", 1)
    assert (run.counters.copied_bytes, run.counters.loaded_bytes, run.counters.stored_bytes) == (0, 512, 512)
    _, _, run = play(toys, "copies_arrive", 1)  # 62 of 64 threads copy, in each of two blocks
    assert (run.counters.copied_bytes, run.counters.loaded_bytes, run.counters.stored_bytes) == (2 * 62 * 16, 0, 512)


BROKEN = {
    "no_barrier": "race in shared memory, reads after an unordered write",
    "syncwarp_across_warps": "race in shared memory, reads after an unordered write",
    "write_after_read": "race in shared memory, writes after an unordered read",
    "nobody_wrote": "reads shared memory that nobody wrote",
    "barrier_in_a_branch": "divergence: waits in __syncthreads",
    "barrier_for_some": "deadlock: waits for ever in __syncthreads",
    "shuffle_of_half_a_warp": "deadlock: waits for ever in shfl",
    "copy_not_awaited": "reads where a cp.async has not arrived",
    "copy_of_another_thread": "race in shared memory, reads after an unordered write",
    "copy_outlives_its_thread": "ends while a cp.async is on its way",
    "copy_off_its_grid": "no multiple of 16",
    "reads_too_far": "reads outside of all tensors",
    "writes_too_far": "writes outside of all that it may write",
    "writes_its_input": "writes outside of all that it may write",
    "beyond_shared_memory": "writes outside of all that it may write",
    "threads_write_one_place": "race in a tensor, writes after an unordered write",
    "blocks_write_one_place": "race in a tensor, writes after an unordered write: of block",
    "blocks_read_each_other": "race in a tensor",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_rule_is_reported_under_every_schedule(toys: Library, name: str) -> None:
    for seed in range(6):
        _, _, run = play(toys, name, seed)
        assert any(BROKEN[name] in report for report in run.reports), (seed, run.reports)


def test_reports_say_where(toys: Library) -> None:
    assert all("at toys.cpp:" in report for report in play(toys, "no_barrier", 0)[2].reports)
    (report,) = play(toys, "copy_off_its_grid", 0)[2].reports
    assert re.search(r"at ptx.cuh:\d+ < toys.cpp:\d+$", report)  # the inline function, and where it was called


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bit_numbers_are_those_of_torch(toys: Library, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    widened = torch.empty(2**16)
    call = toys.function("unpack_on_cpu")
    call(ctypes.c_void_p(every.data_ptr()), ctypes.c_void_p(widened.data_ptr()), 2**16, int(dtype == torch.float16))
    torch.testing.assert_close(widened, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    # All bit patterns of the upper half of a float, and what lies at, just below and just above ties of rounding.
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    floats = (upper[:, None] + lower).flatten().to(torch.int32).view(torch.float32)
    packed = torch.empty(len(floats), dtype=torch.int16)
    call = toys.function("pack_on_cpu")
    call(
        ctypes.c_void_p(floats.data_ptr()), ctypes.c_void_p(packed.data_ptr()), len(floats), int(dtype == torch.float16)
    )
    torch.testing.assert_close(packed.view(dtype), floats.to(dtype), rtol=0, atol=0, equal_nan=True)
