"""What can be said of the CUDA kernels without a GPU: what nvcc makes of them, and what they do, counted on a CPU.

Two tables. The first one is of every kernel with all its template arguments: registers, and how many blocks these, and
shared memory, let a multiprocessor run at the same time. The second one is of the shapes that the project runs, as the
emulator of tests/cuda_on_cpu counts them: tensor-core work, and bytes between memory and multiprocessors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from tests.cuda_on_cpu.compiled import Placed
    from tests.cuda_on_cpu.harness import Run

SOURCES = ("attention_forward", "attention_backward", "next_scale", "decode")
FLOPS = 2 * 16 * 8 * 16
"""Of one mma.sync of a warp."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What launches of a kernel do at one shape, and what they cannot do without."""

    kernel: str
    shape: str
    flops: int
    exact_flops: int
    """Of the same products, but only for pairs of a query and a key that it sees."""
    read: int
    must_read: int
    """Bytes, if everything is read once. More is what several blocks read: the cache of level 2 may serve that."""
    written: int
    must_write: int
    ldmatrix: int
    bank_conflicts: int


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def counted(
    kernel: str, shape: str, run: Run, exact_flops: int, reads: Iterable[Tensor], writes: Iterable[Tensor]
) -> Counted:
    """One launch, which must read and write these."""
    assert not run.reports, run.reports
    counters = run.counters
    return Counted(
        kernel=kernel,
        shape=shape,
        flops=FLOPS * counters.mma,
        exact_flops=exact_flops,
        read=counters.copied_bytes + counters.loaded_bytes,
        must_read=bytes_of(reads),
        written=counters.stored_bytes,
        must_write=bytes_of(writes),
        ldmatrix=counters.ldmatrix,
        bank_conflicts=counters.bank_conflicts,
    )


def together(
    kernel: str, parts: Sequence[Counted], exact_flops: int, launches: Iterable[tuple[list[Tensor], list[Tensor]]]
) -> Counted:
    """Launches that follow one another, and what each of them must read and write. All together need neither write nor
    read what one leaves for the next."""
    read, written = ({id(x): x for tensors in side for x in tensors} for side in zip(*launches, strict=True))
    sums = ("flops", "read", "written", "ldmatrix", "bank_conflicts")
    return Counted(
        kernel=kernel,
        shape=parts[0].shape,
        exact_flops=exact_flops,
        must_read=bytes_of(x for key, x in read.items() if key not in written),
        must_write=bytes_of(x for key, x in written.items() if key not in read),
        **{name: sum(getattr(part, name) for part in parts) for name in sums},
    )


# ---- The shapes: those of the published models, in bfloat16 ----

WIDTH, HEADS = 64, 16  # of the visual decoder
LLM_WIDTH, LLM_HEADS, PAST = 128, 32, 2047
MULTIPROCESSORS = 108  # of an A100: among so many the keys of a cache are split


def count_forward(patch_nums: Sequence[int]) -> list[Counted]:
    from tests.cuda_on_cpu.forward import Launch, attention_forward
    from tests.cuda_on_cpu.problems import problem, visible_keys

    case = problem(torch.bfloat16, WIDTH, visible_keys(patch_nums), key_heads=HEADS)
    launch, run = Launch(case), attention_forward(case).run
    flops = 4 * WIDTH * HEADS * sum(case.limits)
    shape = f"{len(case.limits)} tokens, {HEADS} heads"
    return [counted("attention_forward", shape, run, flops, launch.reads, launch.writes)]


def count_backward(patch_nums: Sequence[int]) -> list[Counted]:
    from tests.cuda_on_cpu.backward import Launch, attention_backward
    from tests.cuda_on_cpu.problems import Learning, problem, visible_keys

    learning = Learning.of(problem(torch.bfloat16, WIDTH, visible_keys(patch_nums), key_heads=HEADS))
    case = learning.problem
    launch, runs = Launch(learning), attention_backward(learning).runs
    product = 2 * WIDTH * HEADS * sum(case.limits)
    products = {"keys": 4, "queries": 3}  # two of them are the same in both
    shape = f"{len(case.limits)} tokens, {HEADS} heads"
    parts = [
        counted(f"attention_backward_{name}", shape, run, products.get(name, 0) * product, *launch.kernels[name])
        for name, run in runs.items()
    ]
    return [*parts, together("attention_backward, all", parts, 5 * product, launch.kernels.values())]


def count_next_scale(patch_nums: Sequence[int]) -> list[Counted]:
    from tests.cuda_on_cpu.next_scale import Case, Launch, next_scale
    from tests.cuda_on_cpu.problems import problem

    total, count = sum(side * side for side in patch_nums), patch_nums[-1] ** 2
    past = total - count
    case = Case(problem(torch.bfloat16, WIDTH, [total] * count, key_heads=HEADS))
    launch, run = Launch(case), next_scale(case).run
    caches = launch.keys, launch.values
    return [
        counted(
            "next_scale",
            f"{count} tokens after {past}, {HEADS} heads",
            run,
            4 * WIDTH * HEADS * count * total,
            [*launch.reads, *(cache[:, :, :past] for cache in caches)],
            [launch.output, *(cache[:, :, past:] for cache in caches)],
        )
    ]


def count_decode(key_heads: int) -> list[Counted]:
    from tests.cuda_on_cpu.decode import Launch, decode, random_case
    from tests.cuda_on_cpu.harness import CSRC

    case = random_case(
        torch.bfloat16,
        LLM_WIDTH,
        PAST,
        key_heads=key_heads,
        share=LLM_HEADS // key_heads,
        multiprocessors=MULTIPROCESSORS,
    )
    launch, result = Launch(case, CSRC), decode(case)
    assert result.attend is not None
    caches = launch.keys, launch.values
    old, new = [x[:, :, :PAST] for x in caches], [x[:, :, PAST:] for x in caches]
    others = [x for x in launch.attend_reads if not any(x is cache for cache in caches)]
    attend, combine = ([*others, *old], launch.workspace), (launch.combine_reads, [launch.output, *new])
    flops = 4 * LLM_WIDTH * LLM_HEADS * PAST
    shape = f"after {PAST} tokens, {LLM_HEADS} heads, {key_heads} key heads"
    parts = [
        counted("decode_attend", shape, result.attend, flops, *attend),
        counted("decode_combine", shape, result.combine, 0, *combine),
    ]
    return [*parts, together("decode, both", parts, flops, [attend, combine])]


# ---- Tables ----


def compiled_table(kernels: Sequence[Placed]) -> str:
    """As markdown, a line for all architectures: one figure where it is the same for all."""
    architectures = " / ".join(dict.fromkeys(kernel.compiled.arch for kernel in kernels))
    lines = [
        f"| kernel | format | width | cosine | registers, {architectures} | spilled, bytes | shared, bytes | threads "
        "| blocks | budget | warps | occupancy |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for _, group in groupby(kernels, key=lambda k: k.compiled.name):
        same = list(group)
        first, compiled = same[0], same[0].compiled
        arguments = [compiled.format, compiled.width, {None: None, True: "yes", False: "no"}[compiled.cosine]]
        cells = [
            [compiled.kernel],
            *([("-" if argument is None else argument)] for argument in arguments),
            [k.compiled.registers for k in same],
            [k.compiled.spilled_bytes for k in same],
            [first.shared_bytes],
            [first.threads],
            [k.blocks for k in same],
            [first.budget],
            [k.warps for k in same],
            [f"{100 * k.occupancy:.1f} %" for k in same],
        ]
        lines.append("| " + " | ".join(" / ".join(map(str, c if len(set(c)) > 1 else c[:1])) for c in cells) + " |")
    return "\n".join(lines)


def counted_table(rows: Sequence[Counted]) -> str:
    """As markdown, with ratios to what it would take at least."""
    lines = [
        "| kernel | shape | MFLOP | to exact | ldmatrix | bank conflicts | read, MB | written, MB | to least |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        flops = "- | -"
        if row.exact_flops:
            flops = f"{row.flops / 1e6:.1f} | {row.flops / row.exact_flops:.2f}"
        moved = (row.read + row.written) / (row.must_read + row.must_write)
        lines.append(
            f"| {row.kernel} | {row.shape} | {flops} | {row.ldmatrix} | {row.bank_conflicts} "
            f"| {row.read / 1e6:.3f} | {row.written / 1e6:.3f} | {moved:.2f} |"
        )
    return "\n".join(lines)


# ---- The command ----


def why_not() -> str | None:
    """What is missing here; None where nothing is."""
    try:
        from tests.cuda_on_cpu.compiled import cannot_compile
    except ImportError as error:
        return (
            f"the emulator in tests/cuda_on_cpu cannot be imported ({error}): "
            "run this from the root of a clone, with the extra 'test' installed"
        )
    return cannot_compile()


def benchmark_kernels(patch_nums: Sequence[int], sources: Sequence[str]) -> bool:
    """Print what is found of these sources; returns whether no kernel spills and all keep to their budgets."""
    if (reason := why_not()) is not None:
        raise ValueError(reason)
    from tests.cuda_on_cpu.compiled import compile_kernels, known_architectures

    architectures = known_architectures()
    runs: dict[str, list[Callable[[], list[Counted]]]] = {
        "attention_forward": [lambda: count_forward(patch_nums)],
        "attention_backward": [lambda: count_backward(patch_nums)],
        "next_scale": [lambda: count_next_scale(patch_nums)],
        "decode": [lambda: count_decode(8), lambda: count_decode(32)],
    }
    kernels: list[Placed] = []
    rows: list[Counted] = []
    with tqdm(total=sum(1 + len(runs[s]) for s in sources), desc="kernels", leave=False, file=sys.stderr) as bar:
        for source in sources:
            kernels += compile_kernels(source, architectures)
            bar.update()
            for run in runs[source]:
                rows += run()
                bar.update()

    print("What nvcc makes of the kernels. Blocks and warps: what one multiprocessor runs at the same time, and must.")
    print(compiled_table(kernels))
    print(
        "Whole launches in bfloat16, a batch of 1. Exact: products of visible pairs, each once. "
        "Read: by all blocks, from memory or the cache of level 2. Least: every input and output once."
    )
    print(counted_table(rows))
    faults = [fault for kernel in kernels for fault in kernel.faults]
    for fault in faults:
        print(f"fault: {fault}")
    compiled = [{**asdict(k), "warps": k.warps, "occupancy": k.occupancy, "faults": k.faults} for k in kernels]
    print(json.dumps({"compiled": compiled, "counted": [asdict(row) for row in rows]}))
    return not faults
