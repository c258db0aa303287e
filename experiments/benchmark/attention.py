"""Every backend of ``vargpt.kernels.attention`` that runs here, at the shapes of both decoders."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.benchmark.machine import bandwidth, matrix_rate, median_seconds, peak_bytes, too_large
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


def measure_attention(
    shape: AttentionShape, backend: str, device: torch.device, dtype: torch.dtype, repeats: int, rate: float
) -> Measured | str:
    """Forward, forward and backward, and memory of both; or why the backend cannot compute this."""
    s = shape
    if (reason := cannot_hold(s, backend, device)) is not None:
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


def cannot_hold(shape: AttentionShape, backend: str, device: torch.device) -> str | None:
    """Why a CPU's memory will not do, if it will not."""
    needed = 4 * 4 * shape.batch * shape.heads * shape.queries * shape.keys
    return too_large(needed) if device.type == "cpu" and backend in PLAIN else None


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
