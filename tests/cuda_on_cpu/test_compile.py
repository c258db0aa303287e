"""What nvcc makes of the kernels: nothing spills, and as many blocks run at the same time as their budget says."""

from __future__ import annotations

import ctypes
import re
import subprocess
from itertools import product
from pathlib import Path

import pytest

from tests.cuda_on_cpu.compiled import (
    BUDGETS,
    MULTIPROCESSORS,
    Compiled,
    Placed,
    cannot_compile,
    compile_kernels,
    known_architectures,
    parse_ptxas,
)
from tests.cuda_on_cpu.harness import CSRC, NVCC

# How many kernels a source compiles: in two formats, two widths, most with cosine or without.
COUNTS = {"attention_forward": 8, "attention_backward": 3 * 8 + 1, "next_scale": 8, "decode": 2 * 4}
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(cannot_compile() is not None, reason=f"{cannot_compile()}")
@pytest.mark.parametrize("source", BUDGETS)
def test_kernels_spill_nothing_and_keep_to_their_budgets(source: str) -> None:
    architectures = known_architectures()
    kernels = compile_kernels(source, architectures)
    found = {(kernel.compiled.name, kernel.compiled.arch) for kernel in kernels}
    assert len(found) == len(kernels) == COUNTS[source] * len(architectures)
    assert {kernel.compiled.kernel for kernel in kernels} == set(BUDGETS[source])
    assert [fault for kernel in kernels for fault in kernel.faults] == []


def test_there_is_a_budget_for_every_source_and_it_holds_where_kernels_are_built_for() -> None:
    assert {f"{source}.cu" for source in BUDGETS} == {
        path.name for path in CSRC.glob("*.cu") if not path.stem.endswith("_op")
    }
    (built,) = re.findall(r'^ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert {f"sm_{arch.replace('.', '').removesuffix('+PTX')}" for arch in built.split(";")} < set(MULTIPROCESSORS)


SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6vargpt10next_scaleILNS_6FormatE1ELi128ELb0EEEvNS_9NextScaleE' for 'sm_80'
ptxas info    : Function properties for _ZN6vargpt10next_scaleILNS_6FormatE1ELi128ELb0EEEvNS_9NextScaleE
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem, 528 bytes cmem[0]
ptxas info    : Compile time = 100.062 ms
ptxas info    : Compiling entry function '_ZN6vargpt14decode_combineILNS_6FormatE0ELi64EEEvNS_6DecodeE' for 'sm_100'
ptxas info    : Function properties for _ZN6vargpt14decode_combineILNS_6FormatE0ELi64EEEvNS_6DecodeE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 528 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6vargpt30attention_backward_head_scalesILi32EEEvNS_8BackwardE' for 'sm_90'
ptxas info    : Function properties for _ZN6vargpt30attention_backward_head_scalesILi32EEEvNS_8BackwardE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 0 barriers, 592 bytes cmem[0]
"""


def compiled(**changes: object) -> Compiled:
    fields: dict[str, object] = {
        "kernel": "next_scale",
        "format": "fp16",
        "width": 128,
        "cosine": False,
        "arch": "sm_80",
        "registers": 255,
        "stack_bytes": 8,
        "spilled_bytes": 28,
        "shared_bytes": 1024,
    }
    return Compiled(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def test_what_ptxas_says_is_understood() -> None:
    nothing = {"stack_bytes": 0, "spilled_bytes": 0, "shared_bytes": 0}
    assert parse_ptxas(SAID) == [
        compiled(),
        compiled(kernel="decode_combine", format="bf16", width=64, cosine=None, arch="sm_100", registers=40, **nothing),
        compiled(
            kernel="attention_backward_head_scales",
            format=None,
            width=None,
            cosine=None,
            arch="sm_90",
            registers=42,
            **nothing,
        ),
    ]
    with pytest.raises(ValueError, match="ptxas says nothing like"):
        parse_ptxas(SAID.replace("spill loads", "loads"))


def test_faults_are_what_spills_and_what_misses_its_budget() -> None:
    def faults(blocks: int, **changes: int) -> list[str]:
        whole = compiled(**{"spilled_bytes": 0, "stack_bytes": 0, **changes})
        return Placed(compiled=whole, threads=128, shared_bytes=81920, blocks=blocks, budget=2).faults

    name = "next_scale, fp16, 128, no cosine, sm_80: "
    assert faults(2) == faults(3) == []
    assert faults(2, spilled_bytes=24, stack_bytes=8) == [name + "spills 24 bytes, and has a stack of 8"]
    assert faults(2, stack_bytes=16) == [name + "spills 0 bytes, and has a stack of 16"]
    assert faults(1) == [
        name + "a multiprocessor runs 1 of its blocks, not 2: "
        "each takes 128 threads of 255 registers, 81920 bytes of shared memory"
    ]


def test_blocks_at_once() -> None:
    ampere, hopper = MULTIPROCESSORS["sm_80"], MULTIPROCESSORS["sm_90"]
    assert ampere.blocks_at_once(128, 32, 0) == 16  # threads
    assert ampere.blocks_at_once(32, 32, 0) == 32  # blocks
    assert ampere.blocks_at_once(128, 168, 0) == 3  # registers
    assert ampere.blocks_at_once(128, 169, 0) == 2  # handed out by 8 a thread
    assert ampere.blocks_at_once(128, 32, 81 * 1024) == 2  # shared memory, to the last
    assert ampere.blocks_at_once(128, 32, 81 * 1024 + 1) == 1
    assert hopper.blocks_at_once(128, 32, 81 * 1024 + 1) == 2


NVIDIAS = r"""
#include <cuda_occupancy.h>
extern "C" int blocks_at_once(int major, int shared_of_all, int threads, int registers, int shared_bytes) {
  cudaOccDeviceProp device;
  device.computeMajor = major;
  device.computeMinor = 0;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerMultiprocessor = shared_of_all;
  device.reservedSharedMemPerBlock = 1024;
  device.sharedMemPerBlockOptin = shared_of_all - 1024;
  device.numSms = 108;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared_of_all - 1024;
  kernel.numBlockBarriers = 1;
  kernel.virtualResourceCount = 0;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared_bytes);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}
"""


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_blocks_at_once_are_those_that_nvidias_own_header_computes(tmp_path: Path) -> None:
    source, library = tmp_path / "nvidias.cpp", tmp_path / "nvidias.so"
    source.write_text(NVIDIAS)
    assert NVCC is not None
    subprocess.run([NVCC, "-shared", "-Xcompiler", "-fPIC", str(source), "-o", str(library)], check=True)
    nvidias = ctypes.CDLL(str(library))
    for arch, multiprocessor in MULTIPROCESSORS.items():
        major, of_all = int(arch.removeprefix("sm_")) // 10, multiprocessor.shared_bytes
        threads, shared = (32, 64, 96, 128, 160, 256, 512), (0, 1, 18432, 36864, 41216, 82176, 83000, of_all - 1024)
        for case in product(threads, range(8, 256, 3), shared):
            assert multiprocessor.blocks_at_once(*case) == nvidias.blocks_at_once(major, of_all, *case), (arch, case)
