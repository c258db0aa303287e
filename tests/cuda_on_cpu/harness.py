"""Builds kernels for the CPU with g++, and runs them on torch tensors. See README.md."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "vargpt" / "kernels" / "csrc"
TORCH = Path(torch.__file__).parent
CACHE = HERE.parents[1] / "build" / "cuda_on_cpu"

RUNTIME = ("runtime.cpp", "checker.cpp", "instructions.cpp")
COMMON = ["-std=c++17", "-fPIC", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
EXACT = ["-ffp-contract=off"]  # a product and a sum are fused where the source says so, and nowhere else
HOOKED = ["-fsanitize=thread", "-fno-strict-aliasing"]
ONE_CALL_ONE_ADDRESS = ["-fno-thread-jumps", "-fno-crossjumping"]
"""A barrier is known by its return address, so the compiler may neither copy nor merge calls."""


class Counters(ctypes.Structure):
    """What one launch took."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("switches", "mma", "ldmatrix", "bank_conflicts"),
            *("copied_bytes", "loaded_bytes", "stored_bytes"),
        )
    ]
    switches: int
    mma: int
    ldmatrix: int
    bank_conflicts: int
    copied_bytes: int
    loaded_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Run:
    """What the checker said about one launch, and what the launch took."""

    reports: tuple[str, ...]
    counters: Counters


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why kernels cannot be run on this machine's CPU; None where they can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "fibers are written for Linux on x86-64"
    if shutil.which("g++") is None:
        return "there is no g++"
    program = b"int read(int* p) { return *p; }"
    command = ["g++", "-fsanitize=thread", "-x", "c++", "-c", "-", "-o", os.devnull]
    tried = subprocess.run(command, input=program, capture_output=True)
    return None if tried.returncode == 0 else "g++ does not know -fsanitize=thread here"


@lru_cache(maxsize=8)
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _cached(name: str, suffix: str, command: list[str], sources: Iterable[Path]) -> Path:
    """Where the result of a compilation lies, or will lie: a name that changes with all that it is made from."""
    digest = hashlib.sha256("\0".join([_version(command[0]), *command]).encode())
    for source in sorted(sources, key=lambda path: path.name):
        digest.update(source.name.encode() + source.read_bytes())
    return CACHE / f"{name}-{digest.hexdigest()[:20]}{suffix}"


def _compile(command: list[str], inputs: list[Path], output: Path) -> None:
    """Run a compiler. Other processes may be at the same; whoever comes last replaces a file by an equal one."""
    if output.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        made = Path(work) / output.name
        whole = [*command, *map(str, inputs), "-o", str(made)]
        result = subprocess.run(whole, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(whole)}\n{result.stderr}")
        made.replace(output)


@lru_cache(maxsize=1)
def _runtime() -> list[Path]:
    command = ["g++", *COMMON, *EXACT, "-O2", "-c"]
    objects = []
    for name in RUNTIME:
        objects.append(_cached(name.removesuffix(".cpp"), ".o", command, [HERE / name, *HERE.glob("*.h")]))
        _compile(command, [HERE / name], objects[-1])
    return objects


@lru_cache(maxsize=1024)
def _library(entry: Path, defines: tuple[str, ...], csrc: Path) -> Library:
    command = ["g++", *COMMON, *EXACT, *HOOKED, *ONE_CALL_ONE_ADDRESS, "-O1", "-c", *defines]
    objects = _runtime()
    sources = [entry, *HERE.glob("*.h"), *csrc.glob("*.cuh"), *objects]
    path = _cached(entry.stem, ".so", command, sources)
    if not path.exists():
        made = _cached(entry.stem, ".o", command, sources)
        _compile([*command, f"-I{HERE}", f"-I{csrc}"], [entry], made)
        _compile(["g++", "-shared", "-Wl,-Bsymbolic", "-ldl"], [*objects, made], path)
    return Library(path)


TORCH_ABI = "0x020a000000000000"
"""The oldest torch whose stable ABI has all that the ops use, as TORCH_TARGET_VERSION wants it: 2.10."""


def ops_unavailable() -> str | None:
    """Why the operators cannot be built for this machine's CPU; None where they can."""
    if (reason := unavailable()) is not None:
        return reason
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return None if version >= (2, 10) else f"torch {torch.__version__} is older than 2.10, and has no stable ABI"


@lru_cache(maxsize=1)
def build_ops() -> Path:
    """The library that an installation builds for GPUs, built for the CPU: the same ops, around emulated kernels."""
    ours = [f"-I{HERE}", f"-I{CSRC}", "-x", "c++"]
    torchs = [f"-isystem{TORCH / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-fvisibility=hidden"]
    sources = [*HERE.glob("*.h"), *CSRC.glob("*.cuh")]
    objects = [*_runtime()]
    for source in sorted(CSRC.glob("*.cu")):
        op = source.stem.endswith("_op")  # runs on the host, unwatched
        command = ["g++", *COMMON, *EXACT, *([*torchs, "-O1"] if op else [*HOOKED, *ONE_CALL_ONE_ADDRESS, "-O1"]), "-c"]
        objects.append(_cached(source.stem, ".o", [*command, torch.__version__], [source, *sources]))
        _compile([*command, *ours], [source], objects[-1])
    link = ["g++", "-shared", "-Wl,-Bsymbolic", "-ldl", f"-L{TORCH / 'lib'}"]
    path = _cached("ops", ".so", link, objects)
    _compile(link, [*objects, Path("-ltorch"), Path("-ltorch_cpu")], path)
    return path


def build(entry: str, defines: Mapping[str, object] | None = None, csrc: Path = CSRC) -> Library:
    """The kernel that a .cpp file of this folder launches, compiled from the sources in ``csrc``."""
    return _library(HERE / entry, _flags(defines), csrc)


def _flags(defines: Mapping[str, object] | None) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in (defines or {}).items())


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def emit_ptx(entry: str, defines: Mapping[str, object] | None = None, csrc: Path = CSRC, arch: str = "sm_80") -> str:
    """What nvcc makes of a .cu file of this folder."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-ptx", f"-arch={arch}", *_flags(defines)]
    path = _cached(Path(entry).stem, ".ptx", command, [HERE / entry, *csrc.glob("*.cuh")])
    _compile([*command, f"-I{csrc}"], [HERE / entry], path)
    return path.read_text()


class Library:
    """A kernel with an emulator of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.cuda_on_cpu_reports.restype = ctypes.c_char_p

    def launch(
        self,
        name: str,
        *arguments: object,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        seed: int = 0,
    ) -> Run:
        """Call an exported function, whose last argument is the seed of the schedule. The kernel may touch the
        memory of these tensors and no other; between the numbers of a view lies memory that it may touch, too."""
        for tensor in reads:
            self._register(tensor, writable=False)
        for tensor in writes:
            self._register(tensor, writable=True)
        reports = getattr(self._library, name)(*arguments, ctypes.c_uint64(seed))
        counters = Counters()
        self._library.cuda_on_cpu_counters(ctypes.byref(counters))
        lines = self._library.cuda_on_cpu_reports().decode().splitlines()
        assert reports == len(lines)
        return Run(tuple(re.sub(r"@0x(\w+)", self._place, line) for line in lines), counters)

    def function(self, name: str) -> Any:
        """An exported function that launches nothing."""
        return getattr(self._library, name)

    def _register(self, tensor: Tensor, *, writable: bool) -> None:
        pointer, span = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(span_of(tensor))
        self._library.cuda_on_cpu_tensor(pointer, span, int(writable))

    def _place(self, offset: re.Match[str]) -> str:
        """Lines of source, innermost first."""
        command = ["addr2line", "-s", "-i", "-e", str(self.path), offset[1]]
        found = subprocess.run(command, capture_output=True, text=True)
        return "at " + " < ".join(line.split(" ")[0] for line in found.stdout.splitlines())


def span_of(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def planted(to: Path, file: str, old: str, new: str) -> Path:
    """A copy of the kernels' sources with a mistake in it: ``old``, which must stand there exactly once, is ``new``."""
    text = (CSRC / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} must hold {old!r} once, not {text.count(old)} times")
    shutil.copytree(CSRC, to, dirs_exist_ok=True)
    (to / file).write_text(text.replace(old, new))
    return to


@dataclass(frozen=True)
class Mistake:
    """One place of the source changed, and what must be noticed: a part of a report, or what of the result is wrong."""

    file: str
    old: str
    new: str
    noticed: str

    def planted(self, to: Path) -> Path:
        return planted(to, self.file, self.old, self.new)


DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
