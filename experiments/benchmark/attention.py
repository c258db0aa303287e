"""Speed and memory, against limits of the machine measured in the same run: ``python -m experiments.benchmark WHAT``.

Prints a table, and one line of JSON. Times are medians; the machine is shared with whatever else runs on it. Of CUDA
kernels, where there is no GPU, what can be counted: experiments/benchmark_kernels.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.benchmark_kernels import SOURCES, benchmark_kernels
from experiments.run import exit_code
from vargpt.kernels import BACKENDS, KVCache, attention
from vargpt.scales import Limits, ScaleSchedule

SCHEDULES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32, 48, 64),
}
"""Patch numbers by the picture's side in pixels: VAR's published ones, and their continuation."""
REFERENCE = "sdpa"
"""Ratios are to this backend: one fused call, with a mask where something is hidden."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One case: what attends to what. Of the keys, the first ``past`` are in a cache; the others join it."""

    name: str
    batch: int
    heads: int
    groups: int
    width: int
    queries: int
    keys: int
    limits: Limits | None = None
    causal: bool = False
    past: int = 0
    cosine: bool = False
    rotary: bool = False

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees."""
        if self.limits is not None:
            return sum(queries * keys for queries, keys in self.limits.runs)
        if self.causal:
            return self.queries * self.keys - self.queries * (self.queries - 1) // 2
        return self.queries * self.keys

    @property
    def flops(self) -> int:
        """Of a forward pass that computes no more than it must."""
        return 4 * self.batch * self.heads * self.width * self.visible


def attention_shapes(sides: Sequence[int]) -> list[AttentionShape]:
    """The visual decoder's and the language model's attention, at their published head widths."""
    schedules = [(side, ScaleSchedule(SCHEDULES[side])) for side in sides]
    decoder = [
        AttentionShape(
            name=f"VAR {side} px, {schedule.total} tokens, {heads} heads",
            batch=1,
            heads=heads,
            groups=heads,
            width=64,
            queries=schedule.total,
            keys=schedule.total,
            limits=schedule.visible_limits(),
        )
        for side, schedule in schedules
        for heads in (16, 30)
    ]
    drawing = [
        AttentionShape(
            name=f"VAR {side} px, {schedule.lengths[-1]} after {schedule.offsets[-2]} cached, cosine, {heads} heads",
            batch=1,
            heads=heads,
            groups=heads,
            width=64,
            queries=schedule.lengths[-1],
            keys=schedule.total,
            past=schedule.offsets[-2],
            cosine=True,
        )
        for side, schedule in schedules
        for heads in (16, 30)
    ]
    language = [
        AttentionShape(
            name=f"LLaMA {what}, {groups} key heads",
            batch=1,
            heads=32,
            groups=groups,
            width=128,
            queries=queries,
            keys=keys,
            causal=True,
            past=past,
            rotary=past > 0,
        )
        for what, queries, keys, past in (
            ("prefill of 1024", 1024, 1024, 0),
            ("decode after 2047", 1, 2048, 0),
            ("decode after 2047 cached, rotary", 1, 2048, 2047),
        )
        for groups in (32, 8)
    ]
    return decoder + drawing + language


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds (medians) and bytes of one case on one backend; None where it has no such pass, or no memory for it."""

    shape: str
    backend: str
    forward: float
    both: float | None
    memory: int | None
    reached: float
    """Share of the machine's rate of matrix products, forward, counting visible pairs only."""


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


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call needs at its peak, above what was held before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def field(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name + ":"))
        return int(line.split()[1]) * 1024

    reset.write_text("5")  # VmHWM, the most memory held, counts from now
    before = field("VmRSS")
    run()
    return max(0, field("VmHWM") - before)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 5)


def bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes/s of reading a large tensor."""
    x = torch.ones(size // 4, device=device)
    return size / median_seconds(x.sum, device, 5)


def measure_attention(
    shape: AttentionShape, backend: str, device: torch.device, dtype: torch.dtype, repeats: int, rate: float
) -> Measured | str:
    """Forward, forward and backward, and memory of both; or why the backend cannot compute this."""
    s = shape
    if (reason := too_large(s, backend, device)) is not None:
        return reason
    torch.compiler.reset()  # after a few shapes it would compile no further ones, and compute them as they stand
    sizes = [(s.batch, h, n, s.width) for h, n in ((s.heads, s.queries), (s.groups, s.keys), (s.groups, s.keys))]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    options: dict[str, Any] = {"limits": s.limits, "causal": s.causal, "backend": backend}
    if s.cosine:
        options["cosine"] = torch.full((s.heads,), 4.0, device=device)
    if s.rotary:
        angles = torch.rand(1, 1, s.queries, s.width, generator=generator).to(device)
        options["rotary"] = (angles.cos(), angles.sin())
    if s.past:  # never advanced: every run stores the same new keys after the same old ones
        cache = KVCache(1, s.batch, s.groups, s.keys, s.width, device=device, dtype=dtype)
        cache.append(0, k[:, :, : s.past], v[:, :, : s.past])
        cache.advance(s.past)
        k, v, options["cache"] = k[:, :, s.past :], v[:, :, s.past :], cache

    def forward() -> Tensor:
        return attention(q, k, v, **options)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = attention(*leaves, **options)
        y.backward(torch.ones_like(y))

    try:
        with torch.no_grad():
            seconds = median_seconds(forward, device, repeats)
    except (ValueError, RuntimeError) as error:  # not enough memory, or what torch's compiler wrote does not compile
        return str(error).splitlines()[0]
    try:
        learned = median_seconds(both, device, repeats) if s.queries > 1 and not s.past else None
    except (ValueError, torch.OutOfMemoryError):  # no backward pass here, or not enough memory
        learned = None
    return Measured(
        shape=s.name,
        backend=backend,
        forward=seconds,
        both=learned,
        memory=peak_bytes(both if learned else forward, device),
        reached=s.flops / seconds / rate,
    )


PLAIN = ("reference", "matmul")
"""Backends that write all products of queries and keys into memory: four times, with those of the backward pass."""


def too_large(shape: AttentionShape, backend: str, device: torch.device) -> str | None:
    """Why memory will not do: where there is too little for a CPU, no error tells, but the process is killed."""
    needed = 4 * 4 * shape.batch * shape.heads * shape.queries * shape.keys
    if device.type != "cpu" or backend not in PLAIN or not hasattr(os, "sysconf"):
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"it needs about {needed / 1e9:.0f} GB of memory, more than is free" if needed > free else None


def attention_table(rows: Sequence[Measured]) -> str:
    """The measurements as markdown, with ratios to ``REFERENCE``."""
    base = {row.shape: row for row in rows if row.backend == REFERENCE}
    lines = [
        f"| shape | backend | forward, ms | to {REFERENCE} | of product rate "
        f"| forward + backward, ms | to {REFERENCE} | peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        to = base.get(row.shape)
        forward = times(row.forward, None if to is None else to.forward)
        both = times(row.both, None if to is None else to.both)
        memory = "-" if row.memory is None else f"{row.memory / 1e6:.1f}"
        lines.append(f"| {row.shape} | {row.backend} | {forward} | {row.reached:.2f} | {both} | {memory} |")
    return "\n".join(lines)


def times(seconds: float | None, to: float | None) -> str:
    """Two columns: milliseconds, and how many times another time that is."""
    if seconds is None:
        return "- | -"
    return f"{1e3 * seconds:.2f} | " + ("-" if to is None else f"{seconds / to:.2f}")


def benchmark_attention(sides: Sequence[int], device: torch.device, dtype: torch.dtype, repeats: int) -> None:
    """Every backend that runs here, at the shapes of both decoders."""
    rate, read = matrix_rate(device, dtype), bandwidth(device)
    cases = [(shape, backend) for shape in attention_shapes(sides) for backend in BACKENDS]
    found = [
        measure_attention(shape, backend, device, dtype, repeats, rate)
        for shape, backend in tqdm(cases, desc="attention", leave=False, file=sys.stderr)
    ]
    rows = [row for row in found if isinstance(row, Measured)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}, medians of {repeats}: {rate / 1e9:.0f} GFLOP/s of products, {read / 1e9:.1f} GB/s read")
    print(attention_table(rows))
    missing: dict[tuple[str, str], list[str]] = {}
    for (shape, backend), reason in zip(cases, found, strict=True):
        if isinstance(reason, str):
            missing.setdefault((backend, reason), []).append(shape.name)
    for (backend, reason), names in missing.items():
        print(f"not computed by {backend}: {'; '.join(names)}: {reason}")
    print(json.dumps({"rate": rate, "bandwidth": read, "rows": [asdict(row) for row in rows]}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    backends = commands.add_parser("attention", help="every backend of vargpt.kernels.attention")
    backends.add_argument(
        "--sides",
        type=int,
        nargs="+",
        choices=SCHEDULES,
        help="of pictures, pixels: 256 512, on a GPU 1024 too, which on a CPU takes long, and tens of GB",
    )
    backends.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    backends.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, float32 on a CPU"
    )
    backends.add_argument("--repeats", type=int, default=7, help="runs that a median is taken of (7)")
    kernels = commands.add_parser(
        "kernels", help="the CUDA kernels, without a GPU: registers, occupancy, counted work; exits with 1 over budget"
    )
    kernels.add_argument("--only", nargs="+", default=SOURCES, choices=SOURCES, help="some of them")
    options = parser.parse_args(arguments)
    kept = True

    def run() -> None:
        nonlocal kept
        if options.what == "kernels":
            kept = benchmark_kernels(SCHEDULES[256], options.only)
            return
        if options.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, not {options.repeats}")
        device = torch.device(options.device)
        gpu = device.type == "cuda"
        sides = options.sides or [side for side in SCHEDULES if gpu or side < 1024]
        dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
        benchmark_attention(sides, device, dtype, options.repeats)

    return exit_code(run) or int(not kept)


if __name__ == "__main__":
    sys.exit(main())
