"""What nvcc makes of the kernels: registers, what spills, how many blocks a multiprocessor runs at the same time."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cuda_on_cpu.backward import AttentionBackward
from tests.cuda_on_cpu.calls import Shape
from tests.cuda_on_cpu.decode import Decode
from tests.cuda_on_cpu.forward import AttentionForward
from tests.cuda_on_cpu.harness import CSRC, NVCC, build, unavailable
from tests.cuda_on_cpu.next_scale import NextScale

BUDGETS: dict[str, dict[str, dict[int | None, int]]] = {
    "attention_forward": {"attention_forward": {64: 3, 128: 2}},
    "attention_backward": {
        # It only waits for memory: as many as a multiprocessor has threads for.
        "attention_backward_prepare": {64: 16, 128: 16},
        "attention_backward_keys": {64: 2, 128: 2},
        "attention_backward_queries": {64: 2, 128: 2},
        "attention_backward_head_scales": {None: 16},
    },
    "next_scale": {"next_scale": {64: 3, 128: 2}},
    "decode": {"decode_attend": {64: 8, 128: 4}, "decode_combine": {64: 16, 128: 16}},
}
"""The kernels of each source, and how many blocks of a width are to run on a multiprocessor at the same time."""


def rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """What one has for all the blocks that it runs at the same time: CUDA Programming Guide, "Compute Capabilities",
    technical specifications; in which portions it hands that out: cuda_occupancy.h of the toolkit."""

    shared_bytes: int
    blocks: int = 32
    warps: int = 64
    registers: int = 65536

    def blocks_at_once(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many blocks fit, if each asks for so much."""
        warps = rounded_up(threads, 32) // 32
        quarter = self.registers // 4  # a warp belongs to one of four parts, and takes registers by 256
        by_registers = 4 * (quarter // rounded_up(32 * registers, 256)) // warps
        by_shared = self.shared_bytes // rounded_up(shared_bytes + 1024, 128)  # 1 KiB is the system's
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 * 1024),
    "sm_90": Multiprocessor(shared_bytes=228 * 1024),
    "sm_100": Multiprocessor(shared_bytes=228 * 1024),
}
"""What an installation compiles for (setup.py), and one for which drivers compile its PTX."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel on one architecture; of its template arguments, those that it does not have are None."""

    kernel: str
    format: str | None
    width: int | None
    cosine: bool | None
    arch: str
    registers: int
    stack_bytes: int
    spilled_bytes: int
    """Written to local memory, and read from it, for want of registers; by one thread, where it goes by once."""
    shared_bytes: int
    """Known to the compiler; what a launch asks for comes on top."""

    @property
    def name(self) -> str:
        cosine = {None: None, True: "cosine", False: "no cosine"}[self.cosine]
        return ", ".join(str(part) for part in (self.kernel, self.format, self.width, cosine) if part is not None)


def parse_ptxas(text: str) -> list[Compiled]:
    """What ``ptxas -v`` says of each kernel."""
    found = []
    for part in text.split("Compiling entry function ")[1:]:
        name, arch = _only(r"^'(\w+)' for '(\w+)'", part)
        (stack,) = _only(r"(\d+) bytes stack frame", part)
        stores, loads = _only(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        (registers,) = _only(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        kernel, format, width, cosine = _demangled(name)
        found.append(
            Compiled(
                kernel=kernel,
                format=format,
                width=width,
                cosine=cosine,
                arch=arch,
                registers=int(registers),
                stack_bytes=int(stack),
                spilled_bytes=int(stores) + int(loads),
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return found


def _only(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that must occur."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"ptxas says nothing like {pattern!r} in {text!r}")
    return found.groups()


def _demangled(name: str) -> tuple[str, str | None, int | None, bool | None]:
    """A kernel, its format, width, and whether with cosine: of _ZN6vargpt10next_scaleILNS_6FormatE0ELi64ELb1EEE..."""
    length, rest = _only(r"^_ZN6vargpt(\d+)(\w+)$", name)
    kernel, rest = rest[: int(length)], rest[int(length) :]
    arguments = re.match(r"ILNS_6FormatE([01])ELi(\d+)E(?:Lb([01])E)?", rest)
    if arguments is None:
        return kernel, None, None, None
    number, width, cosine = arguments.groups()
    return kernel, ("bf16", "fp16")[int(number)], int(width), None if cosine is None else cosine == "1"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A kernel, what a launch of it asks for, and how many blocks a multiprocessor then runs at the same time."""

    compiled: Compiled
    threads: int
    shared_bytes: int
    blocks: int
    budget: int

    @property
    def warps(self) -> int:
        return self.blocks * self.threads // 32

    @property
    def occupancy(self) -> float:
        return self.warps / MULTIPROCESSORS[self.compiled.arch].warps

    @property
    def faults(self) -> list[str]:
        """What it does, and must not do."""
        c, found = self.compiled, []
        if c.spilled_bytes or c.stack_bytes:
            found.append(f"spills {c.spilled_bytes} bytes, and has a stack of {c.stack_bytes}")
        if self.blocks < self.budget:
            each = f"{self.threads} threads of {c.registers} registers, {self.shared_bytes} bytes of shared memory"
            found.append(f"a multiprocessor runs {self.blocks} of its blocks, not {self.budget}: each takes {each}")
        return [f"{c.name}, {c.arch}: {fault}" for fault in found]


def cannot_compile() -> str | None:
    """Why nothing can be said of kernels here; None where it can."""
    if (reason := unavailable()) is not None:
        return f"kernels cannot be run on this CPU: {reason}"
    return None if NVCC else "there is no nvcc, on the path or in /usr/local/cuda/bin"


def known_architectures() -> list[str]:
    """Those of ``MULTIPROCESSORS`` that this nvcc compiles for."""
    assert NVCC is not None
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in MULTIPROCESSORS if arch in known]


def compile_kernels(source: str, architectures: Sequence[str]) -> list[Placed]:
    """All kernels of a source, in the order of their names and arguments. Any warning is an error."""
    assert NVCC is not None
    targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in architectures]
    command = [NVCC, "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", *targets, "-c"]
    with TemporaryDirectory() as work:
        command += [str(CSRC / f"{source}.cu"), "-o", str(Path(work) / "kernels.o")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    kernels = list(BUDGETS[source])

    def order(compiled: Compiled) -> tuple[object, ...]:
        c = compiled
        return kernels.index(c.kernel), c.format, c.width, c.cosine is False, architectures.index(c.arch)

    return [placed(source, compiled) for compiled in sorted(parse_ptxas(result.stderr), key=order)]


def placed(source: str, compiled: Compiled) -> Placed:
    shape = launch_shape(source, compiled.kernel, compiled.width or 64)
    shared_bytes = shape.shared_bytes + compiled.shared_bytes
    return Placed(
        compiled=compiled,
        threads=shape.threads,
        shared_bytes=shared_bytes,
        blocks=MULTIPROCESSORS[compiled.arch].blocks_at_once(shape.threads, compiled.registers, shared_bytes),
        budget=BUDGETS[source][compiled.kernel][compiled.width],
    )


def launch_shape(source: str, kernel: str, width: int) -> Shape:
    """The threads and the shared memory of a block, from the kernels' own headers."""
    defines = {"FORMAT": "bf16", "WIDTH": width, **({} if source == "decode" else {"COSINE": "true"})}
    library, shape = build(f"{source}.cpp", defines), Shape()
    if source == "attention_backward":
        part = kernel.removeprefix(f"{source}_").encode()
        library.function(f"{source}_shape")(ctypes.byref(AttentionBackward()), part, ctypes.byref(shape))
    else:
        call = {"attention_forward": AttentionForward, "next_scale": NextScale, "decode": Decode}[source]()
        library.function(f"{kernel}_shape")(ctypes.byref(call), 1, ctypes.byref(shape))
    return shape
