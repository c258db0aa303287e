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

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]


def registers(source: str, tmp_path: Path) -> dict[tuple[str, str], int]:
    """Of every kernel of a .cu file, for every architecture; nothing may spill."""
    assert NVCC is not None
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", *targets, "-c"]
    command += [str(CSRC / source), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        result.stderr,
        re.DOTALL,
    )
    for name, arch, *spilled, _ in kernels:
        assert spilled == ["0", "0", "0"], (name, arch)
    assert {arch for _, arch, *_ in kernels} == set(ARCHITECTURES)
    return {(name, arch): int(used) for name, arch, *_, used in kernels}


def budget(blocks: int) -> int:
    """How many registers a thread may have, if so many blocks are to run on a multiprocessor."""
    return REGISTERS // (THREADS * blocks) // 8 * 8


def test_forward_kernels_spill_nothing_and_keep_to_their_registers(tmp_path: Path) -> None:
    used = registers("attention_forward.cu", tmp_path)
    assert len(used) == 8 * len(ARCHITECTURES)  # two formats, two widths, cosine or not
    for (name, arch), number in used.items():
        assert number <= budget(BLOCKS[128 if "Li128" in name else 64]), (name, arch)


def test_backward_kernels_spill_nothing_and_keep_to_their_registers(tmp_path: Path) -> None:
    used = registers("attention_backward.cu", tmp_path)
    assert len(used) == (3 * 8 + 1) * len(ARCHITECTURES)
    for (name, arch), number in used.items():
        # The prepare kernel only waits for memory: of it, as many blocks run as a multiprocessor has threads for.
        assert number <= budget(16 if "_prepare" in name else 2), (name, arch)
