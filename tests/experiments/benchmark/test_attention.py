"""The attention benchmark runs, counts what it says it counts, and refuses what it cannot do. No times are tested."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.benchmark import __main__ as command
from experiments.benchmark import attention as benchmark
from experiments.benchmark import machine
from experiments.benchmark.attention import SCHEDULES, AttentionShape, attention_shapes
from vargpt.kernels import attention, cuda
from vargpt.kernels.call import Call
from vargpt.scales import Limits, ScaleSchedule


def test_the_attention_table_has_every_backend_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ScaleSchedule((1, 2, 3))
    shape = AttentionShape(
        name="small", batch=1, heads=2, groups=2, width=8, queries=14, keys=14, limits=schedule.visible_limits()
    )
    monkeypatch.setattr(benchmark, "attention_shapes", lambda sides: [shape])
    assert command.main(["attention", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[1] for line in lines if line.startswith("| small")]
    assert rows == ["reference", "matmul", "sdpa", "scales"]
    assert any(line.startswith("not computed by flex: small: ") and "not 8" in line for line in lines)
    measured = json.loads(lines[-1])
    assert measured["rate"] > 0
    assert all(row["forward"] > 0 and row["both"] > 0 for row in measured["rows"])


def test_only_visible_pairs_are_counted() -> None:
    whole = AttentionShape(name="", batch=2, heads=3, groups=3, width=4, queries=3, keys=5)
    assert whole.visible == 15
    assert whole.flops == 2 * 3 * 15 * 4 * 4
    assert replace(whole, causal=True).visible == 3 + 4 + 5
    assert replace(whole, limits=Limits.of([3, 5, 5])).visible == 13


def test_the_shapes_are_the_published_ones() -> None:
    totals = [ScaleSchedule(SCHEDULES[side]).total for side in (256, 512, 1024)]
    assert totals == [680, 2240, 8640]
    assert {(s.heads, s.width) for s in attention_shapes([256])} == {(16, 64), (30, 64), (32, 128)}


def test_cached_rows_are_what_fused_kernels_take_and_every_run_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = [shape for shape in attention_shapes([256]) if shape.past]
    assert [(s.queries, s.past, s.width, s.groups, s.cosine, s.rotary) for s in cached] == [
        (256, 424, 64, 16, True, False),
        (256, 424, 64, 30, True, False),
        (1, 2047, 128, 32, False, True),
        (1, 2047, 128, 8, False, True),
    ]
    seen = []

    def watched(q: Tensor, k: Tensor, v: Tensor, *, backend: str, **options: Any) -> Tensor:
        call = Call(q, k, v, **{"key_mask": None, "scale": 1.0, "limits": None, **options})
        call.check()
        seen.append((cuda.appends(call), cuda.decodes(call), options["cache"].length))
        return attention(q, k, v, backend=backend, **options)

    monkeypatch.setattr(benchmark, "attention", watched)
    for shape in cached[::2]:
        measured = benchmark.measure_attention(shape, "sdpa", torch.device("cpu"), torch.float32, 2, 1.0)
        assert isinstance(measured, benchmark.Measured)
        assert measured.both is None
    assert len(seen) > len(set(seen))
    assert set(seen) == {(True, False, 424), (True, True, 2047)}


def test_products_larger_than_memory_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 8 * 10**9)
    huge = AttentionShape(name="huge", batch=1, heads=1, groups=1, width=8, queries=10**6, keys=10**6)
    cpu = torch.device("cpu")
    assert benchmark.measure_attention(huge, "reference", cpu, torch.float32, 1, 1.0) == (
        "it needs about 16000.0 GB of memory, and 8.0 GB are free"
    )
    assert benchmark.cannot_hold(huge, "sdpa", cpu) is None
    assert benchmark.cannot_hold(replace(huge, queries=4, keys=4), "matmul", cpu) is None


def test_what_does_not_fit_into_memory_is_not_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*inputs: Tensor, backend: str, **options: Any) -> Tensor:
        if backend == "sdpa" or (backend == "matmul" and inputs[0].requires_grad):
            raise torch.OutOfMemoryError("out of memory\n(and more)")
        return attention(*inputs, backend=backend, **options)

    shape = AttentionShape(name="small", batch=1, heads=1, groups=1, width=8, queries=4, keys=4)
    monkeypatch.setattr(benchmark, "attention_shapes", lambda sides: [shape])
    monkeypatch.setattr(benchmark, "attention", full)
    assert command.main(["attention", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not computed by sdpa: small: out of memory" in lines
    reference, matmul = ([c.strip() for c in line.split("|")] for line in lines if line.startswith("| small"))
    assert float(reference[3]) > 0
    assert reference[4] == reference[7] == "-"  # there is nothing to compare with
    assert matmul[6] == "-"


@pytest.mark.parametrize(
    ("options", "sides", "dtype"),
    [
        (["--device", "cpu"], [256, 512], torch.float32),
        (["--device", "cuda"], [256, 512, 1024], torch.bfloat16),
        (["--device", "cuda", "--sides", "256", "--dtype", "float32"], [256], torch.float32),
    ],
)
def test_a_gpu_is_measured_in_its_own_format_and_at_all_sizes(
    options: list[str], sides: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(command, "benchmark_attention", lambda *arguments: asked.append(arguments))
    assert command.main(["attention", *options]) == 0
    assert asked == [(sides, torch.device(options[1]), dtype, 7)]


def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["attention", "--repeats", "0"]) == 2
    assert capsys.readouterr().err == "error: --repeats must be at least 1, not 0\n"
