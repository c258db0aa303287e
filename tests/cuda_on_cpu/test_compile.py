"""What nvcc makes of the kernels: nothing spills, and registers stay within the budget that occupancy rests on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu.harness import CSRC, NVCC

ARCHITECTURES = ("sm_80", "sm_90")

REGISTERS = 65536  # of a multiprocessor
THREADS = 128
BLOCKS = {64: 3, 128: 2}  # AttentionForwardShared::blocks_per_multiprocessor


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_forward_kernels_spill_nothing_and_keep_to_their_registers(tmp_path: Path) -> None:
    assert NVCC is not None
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", *targets, "-c"]
    command += [str(CSRC / "attention_forward.cu"), "-o", str(tmp_path / "attention_forward.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        result.stderr,
        re.DOTALL,
    )
    assert len({name for name, *_ in kernels}) == 8  # two formats, two widths, cosine or not
    assert len(kernels) == 8 * len(ARCHITECTURES)
    for name, arch, *figures in kernels:
        stack, stores, loads, registers = map(int, figures)
        width = 128 if "Li128" in name else 64
        assert stack == stores == loads == 0, (name, arch)
        assert registers <= REGISTERS // (THREADS * BLOCKS[width]) // 8 * 8, (name, arch, registers)
