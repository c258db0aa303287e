"""What nvcc makes of the kernels: nothing spills, and registers stay within the budget that occupancy rests on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu.harness import CSRC, NVCC

ARCHITECTURES = ("sm_80", "sm_90")

REGISTERS = 65536  # of a multiprocessor

# Threads of a block, and how many blocks of a width are to run at the same time: for every kernel that a file compiles,
# in two formats and two widths.
FORWARD = (128, {64: 3, 128: 2})  # AttentionForwardShared::blocks_per_multiprocessor
ATTEND = (32, {64: 8, 128: 4})  # DecodeShared::blocks_per_multiprocessor
COMBINE = (32, {64: 16, 128: 16})
KERNELS = {
    "attention_forward.cu": {"attention_forward": FORWARD},
    "next_scale.cu": {"next_scale": FORWARD},
    "decode.cu": {"decode_attend": ATTEND, "decode_combine": COMBINE},
}


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_spill_nothing_and_keep_to_their_registers(source: str, tmp_path: Path) -> None:
    assert NVCC is not None
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", *targets, "-c"]
    command += [str(CSRC / source), "-o", str(tmp_path / "compiled.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    compiled = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        result.stderr,
        re.DOTALL,
    )
    assert len({name for name, *_ in compiled}) == 8  # two formats, two widths, and cosine or not, or two kernels
    assert len(compiled) == 8 * len(ARCHITECTURES)
    for name, arch, *figures in compiled:
        stack, stores, loads, registers = map(int, figures)
        (threads, blocks), width = KERNELS[source][kernel_of(name)], 128 if "Li128" in name else 64
        assert stack == stores == loads == 0, (name, arch)
        assert registers <= REGISTERS // (threads * blocks[width]) // 8 * 8, (name, arch, registers)


def kernel_of(mangled: str) -> str:
    """The name in _ZN6vargpt13decode_attendI..., which its length precedes."""
    found = re.match(r"_ZN6vargpt(\d+)", mangled)
    assert found is not None
    return mangled[found.end() :][: int(found[1])]
