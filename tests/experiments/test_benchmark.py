"""Benchmarks run, count what they say they count, and refuse what they cannot do. No times are tested."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from experiments import benchmark
from experiments.benchmark import SCHEDULES, AttentionShape, attention_shapes
from vargpt.scales import Limits, ScaleSchedule


def test_the_attention_table_has_every_backend_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ScaleSchedule((1, 2, 3))
    shape = AttentionShape(
        name="small", batch=1, heads=2, groups=2, width=8, queries=14, keys=14, limits=schedule.visible_limits()
    )
    monkeypatch.setattr(benchmark, "attention_shapes", lambda sides: [shape])
    assert benchmark.main(["attention", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[1] for line in lines if line.startswith("| small")]
    assert rows == ["reference", "matmul", "sdpa", "scales"]
    assert any(line.startswith("not computed: small, flex: ") and "not 8" in line for line in lines)
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


def test_peak_memory_is_what_a_call_holds() -> None:
    size = 64 * 2**20
    peak = benchmark.peak_bytes(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))
    assert peak is None or 0.9 * size < peak < 1.5 * size


def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["attention", "--repeats", "0"]) == 2
    assert capsys.readouterr().err == "error: --repeats must be at least 1, not 0\n"
