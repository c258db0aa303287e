"""What the machine can do, and what a run takes of it: time, memory, and the rates that floors are made of."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RUNS = 5
"""Of which the rates are medians."""


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call; the first one is not counted."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


# ---- Rates ----


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, RUNS)


def bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes/s of reading a large tensor."""
    x = torch.ones(size // 4, device=device)
    return size / median_seconds(x.sum, device, RUNS)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The limits of a processor and its memory, which other programs share: measured anew for every case."""

    rate: float
    """FLOP/s of products, in float32 or in the format of the weights, whichever is faster."""
    bandwidth: float
    """Bytes/s read."""

    @classmethod
    def measured(cls, dtype: torch.dtype) -> Machine:
        cpu = torch.device("cpu")
        return cls(rate=max(matrix_rate(cpu, each) for each in {torch.float32, dtype}), bandwidth=bandwidth(cpu))


# ---- Memory ----


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call needs at its peak, above what was held before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if not forget_peak():
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def peak_resident() -> int:
    """Most bytes of memory that this process held since its start, or since :func:`forget_peak`.

    Linux's own count of the process image: what ``getrusage`` calls a maximum survives ``exec``, so that a fresh
    process would begin with that of the process it was started by.
    """
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    import resource  # not on Windows, and only needed where there is no /proc

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if os.uname().sysname == "Darwin" else 1024 * most


def forget_peak() -> bool:
    """Count the most memory held from now on; false where the system cannot."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return False
    reset.write_text("5")
    return True


def free_bytes() -> int | None:
    """Memory that programs can still have, what only caches files included; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    return _field(meminfo, "MemAvailable") if meminfo.exists() else None


def too_large(needed: float) -> str | None:
    """Why memory will not do: where there is too little for a CPU, no error tells, but the process is killed."""
    free = free_bytes()
    if free is None or needed <= free:
        return None
    return f"it needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def _status(name: str) -> int:
    return _field(Path("/proc/self/status"), name)


def _field(file: Path, name: str) -> int:
    (line,) = (line for line in file.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
