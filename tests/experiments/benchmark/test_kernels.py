"""What is said of the CUDA kernels without a GPU: registers and counted work, and how misses of a budget show."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark import kernels as benchmark_kernels
from experiments.benchmark.kernels import (
    Counted,
    compiled_table,
    count_backward,
    count_decode,
    count_forward,
    count_next_scale,
    counted_table,
)
from tests.cuda_on_cpu import compiled
from tests.cuda_on_cpu.compiled import Compiled, Placed, cannot_compile
from tests.cuda_on_cpu.harness import unavailable

counts = pytest.mark.skipif(unavailable() is not None, reason=f"no kernels on this CPU: {unavailable()}")
compiles = pytest.mark.skipif(cannot_compile() is not None, reason=f"{cannot_compile()}")


def placed(arch: str = "sm_80", *, registers: int = 168, spilled: int = 0, blocks: int = 3) -> Placed:
    kernel = Compiled(
        kernel="next_scale",
        format="bf16",
        width=64,
        cosine=False,
        arch=arch,
        registers=registers,
        stack_bytes=0,
        spilled_bytes=spilled,
        shared_bytes=0,
    )
    return Placed(compiled=kernel, threads=128, shared_bytes=41216, blocks=blocks, budget=3)


def test_kernels_have_a_line_for_all_architectures() -> None:
    decode = replace(placed().compiled, kernel="decode_attend", cosine=None)
    kernels = [placed(), placed("sm_90", registers=160, spilled=24, blocks=4), replace(placed(), compiled=decode)]
    assert compiled_table(kernels).splitlines() == [
        "| kernel | format | width | cosine | registers, sm_80 / sm_90 | spilled, bytes | shared, bytes | threads "
        "| blocks | budget | warps | occupancy |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        "| next_scale | bf16 | 64 | no | 168 / 160 | 0 / 24 | 41216 | 128 | 3 / 4 | 3 | 12 / 16 | 18.8 % / 25.0 % |",
        "| decode_attend | bf16 | 64 | - | 168 | 0 | 41216 | 128 | 3 | 3 | 12 | 18.8 % |",
    ]


def test_counted_work_is_compared_with_the_least() -> None:
    row = Counted(
        kernel="k",
        shape="s",
        flops=3_000_000,
        exact_flops=2_000_000,
        read=5_000,
        must_read=1_000,
        written=1_000,
        must_write=1_000,
        ldmatrix=7,
        bank_conflicts=1,
    )
    _, _, *lines = counted_table([row, replace(row, flops=0, exact_flops=0)]).splitlines()
    assert lines == [f"| k | s | {flops} | 7 | 1 | 0.005 | 0.001 | 3.00 |" for flops in ("3.0 | 1.50", "- | -")]


@counts
def test_where_every_query_sees_all_of_whole_tiles_nothing_is_computed_in_vain() -> None:
    """64 tokens of one scale: every tile is of visible pairs. Limits alone are read more than once: by every head."""
    limits = 4 * 64
    (forward,) = count_forward((8,))
    assert forward.flops == forward.exact_flops == 4 * 64 * 64 * 64 * 16
    assert (forward.read, forward.written) == (forward.must_read + 15 * limits, forward.must_write)

    prepare, keys, queries, scales, whole = count_backward((8,))
    assert (prepare.flops, scales.flops) == (0, 0)
    assert keys.flops == keys.exact_flops == 2 * forward.flops
    assert queries.flops == queries.exact_flops == 1.5 * forward.flops
    assert whole.flops == 7 / 5 * whole.exact_flops
    assert whole.written == sum(part.written for part in (prepare, keys, queries, scales)) > whole.must_write
    tensor = 2 * 16 * 64 * 64  # bytes
    log_sum_exp = 4 * 16 * 64
    assert whole.must_read == 5 * tensor + log_sum_exp + limits + 4 * 16  # of the output, the gradient too
    assert whole.must_write == 3 * tensor + 4 * 16

    (new,) = count_next_scale((8, 8))
    assert new.flops == new.exact_flops == 4 * 64 * 64 * 128 * 16
    assert (new.read, new.written) == (new.must_read, new.must_write) == (5 * tensor + 4 * 16, 3 * tensor)


@counts
def test_a_new_token_reads_the_cache_once() -> None:
    attend, combine, both = count_decode(key_heads=8)
    assert attend.flops == both.flops == 4 * 128 * 2048 * 16 * 8  # rows of queries, key heads
    assert attend.exact_flops == 4 * 128 * 2047 * 32
    caches = 2 * 8 * 2047 * 128 * 2
    assert caches < both.must_read < both.read < 1.15 * caches
    assert both.must_write == 2 * 128 * (32 + 2 * 8) < both.written == attend.written + combine.written
    assert attend.bank_conflicts == 0


@pytest.mark.parametrize(
    ("kernel", "code", "line"),
    [
        (placed(), 0, None),
        (placed(spilled=24), 1, "fault: next_scale, bf16, 64, no cosine, sm_80: spills 24 bytes, and has a stack of 0"),
        (placed(blocks=2), 1, "fault: next_scale, bf16, 64, no cosine, sm_80: a multiprocessor runs 2 of its blocks"),
        (placed("sm_100", spilled=24), 1, "fault: next_scale, bf16, 64, no cosine, sm_100: spills 24 bytes"),
    ],
)
def test_what_spills_or_misses_its_budget_fails(
    kernel: Placed,
    code: int,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compiled, "cannot_compile", lambda: None)
    monkeypatch.setattr(compiled, "known_architectures", lambda: ["sm_80", "sm_100"])
    monkeypatch.setattr(compiled, "compile_kernels", lambda source, architectures: [kernel])
    monkeypatch.setattr(benchmark_kernels, "count_next_scale", lambda patch_nums: [])
    assert command.main(["kernels", "--only", "next_scale"]) == code
    lines = capsys.readouterr().out.splitlines()
    said = [each for each in lines if each.startswith("fault")]
    assert len(said) == (line is not None)
    assert all(line is not None and each.startswith(line) for each in said)
    (written,) = json.loads(lines[-1])["compiled"]
    assert written["faults"] == kernel.faults
    assert written["compiled"]["registers"] == 168


@pytest.mark.slow
@compiles
def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kernels", "--only", "decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| decode")]
    attend, combine = "decode_attend", "decode_combine"
    assert rows == [attend] * 4 + [combine] * 4 + [attend, combine, "decode, both"] * 2
    found = json.loads(lines[-1])
    assert len(found["compiled"]) == 8 * len(compiled.known_architectures())
    assert [row["kernel"] for row in found["counted"]] == rows[8:]


def test_without_what_it_needs_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        assert command.main(["kernels"]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    monkeypatch.setattr(compiled, "NVCC", None)
    assert said() == "error: there is no nvcc, on the path or in /usr/local/cuda/bin\n"
    monkeypatch.setattr(compiled, "unavailable", lambda: "there is no g++")
    assert said() == "error: kernels cannot be run on this CPU: there is no g++\n"
    monkeypatch.setitem(sys.modules, "tests.cuda_on_cpu.compiled", None)
    message = said()
    assert message.startswith("error: the emulator in tests/cuda_on_cpu cannot be imported (")
    assert message.count("\n") == 1
