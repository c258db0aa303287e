"""What nvcc makes of the kernels: nothing spills, and registers stay within the budget that occupancy rests on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu.harness import CSRC, NVCC

ARCHITECTURES = ("sm_80", "sm_90")

REGISTERS = 65536  # of a multiprocessor

# Threads of a block, and how many blocks of a width are to run on a multiprocessor at the same time.
FORWARD = (128, {64: 3, 128: 2})  # AttentionForwardShared::blocks_per_multiprocessor
PREPARE = (128, {64: 16, 128: 16})  # it only waits for memory: as many as a multiprocessor has threads for
BACKWARD = (128, {64: 2, 128: 2})
ATTEND = (32, {64: 8, 128: 4})  # DecodeShared::blocks_per_multiprocessor
LONE_WARPS = (32, {64: 16, 128: 16})
# How many kernels a file compiles, and of which templates: in two formats, two widths, most with cosine or without.
KERNELS = {
    "attention_forward.cu": (8, {"attention_forward": FORWARD}),
    "attention_backward.cu": (
        3 * 8 + 1,
        {
            "attention_backward_prepare": PREPARE,
            "attention_backward_keys": BACKWARD,
            "attention_backward_queries": BACKWARD,
            "attention_backward_head_scales": LONE_WARPS,
        },
    ),
    "next_scale.cu": (8, {"next_scale": FORWARD}),
    "decode.cu": (8, {"decode_attend": ATTEND, "decode_combine": LONE_WARPS}),
}


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_spill_nothing_and_keep_to_their_registers(source: str, tmp_path: Path) -> None:
    count, templates = KERNELS[source]
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
    assert len({name for name, *_ in compiled}) == count
    assert len(compiled) == count * len(ARCHITECTURES)
    for name, arch, *figures in compiled:
        stack, stores, loads, registers = map(int, figures)
        (threads, blocks), width = templates[kernel_of(name)], 128 if "Li128" in name else 64
        assert stack == stores == loads == 0, (name, arch)
        assert registers <= REGISTERS // (threads * blocks[width]) // 8 * 8, (name, arch, registers)


def kernel_of(mangled: str) -> str:
    """The name in _ZN6vargpt13decode_attendI..., which its length precedes."""
    found = re.match(r"_ZN6vargpt(\d+)", mangled)
    assert found is not None
    return mangled[found.end() :][: int(found[1])]
