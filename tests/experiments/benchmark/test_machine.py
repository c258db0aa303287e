"""What the machine gives and a process holds, and cases apart from each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from experiments.benchmark import machine
from experiments.benchmark.cases import WHOLE, Clock, apart
from experiments.benchmark.machine import (
    Machine,
    bandwidth,
    forget_peak,
    free_bytes,
    matrix_rate,
    peak_bytes,
    peak_resident,
    too_large,
)
from vargpt.build import preset

CPU = torch.device("cpu")


def test_peak_memory_is_what_a_call_holds() -> None:
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert peak is None or 0.9 * size < peak < 1.5 * size


def test_a_peak_is_kept_until_it_is_forgotten() -> None:
    size = 256 * 2**20
    torch.ones(size // 4).sum()
    before = peak_resident()
    if forget_peak():
        assert peak_resident() < before - size / 2


def test_rates_are_those_of_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix_rate(CPU, torch.float32, size=16) > 0
    assert bandwidth(CPU, size=2**12) > 0

    def slow(run: Callable[[], object], device: torch.device, repeats: int) -> float:
        run()
        return 0.5

    monkeypatch.setattr(machine, "median_seconds", slow)
    assert matrix_rate(CPU, torch.float32, size=16) == 4 * 16**3
    assert bandwidth(CPU, size=2**12) == 2**13


def test_the_rate_is_that_of_the_faster_format(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 2.0, torch.bfloat16: 3.0}
    monkeypatch.setattr(machine, "matrix_rate", lambda device, dtype: rates[dtype])
    monkeypatch.setattr(machine, "bandwidth", lambda device: 1.0)
    assert Machine.measured(torch.float32) == Machine(rate=2.0, bandwidth=1.0)
    assert Machine.measured(torch.bfloat16) == Machine(rate=3.0, bandwidth=1.0)


def test_memory_that_is_not_free_is_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes()
    assert free is None or too_large(free / 2) is None
    assert free is None or too_large(1e18) is not None
    monkeypatch.setattr(machine, "free_bytes", lambda: 2 * 10**9)
    assert too_large(2.5e9) == "it needs about 2.5 GB of memory, and 2.0 GB are free"
    monkeypatch.setattr(machine, "free_bytes", lambda: None)
    assert too_large(1e18) is None


def test_a_case_has_a_process_of_its_own() -> None:
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="unknown preset 'none'"):
        apart(preset, "none")


def test_a_clock_tells_parts_from_the_rest() -> None:
    class Sleeper:
        def sleep(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    sleeper, clock = Sleeper(), Clock()
    clock.watch("sleep", sleeper, "sleep")

    def run() -> None:
        assert sleeper.sleep(0.01) == 0.01
        sleeper.sleep(0.01)
        time.sleep(0.005)

    clock.run(run, 3)
    spent = clock.spent(rest="rest", tokens=7)
    assert spent.facts == {"tokens": 7}
    assert spent.seconds.keys() == {"sleep", "rest", WHOLE}
    assert spent.seconds["sleep"] >= 0.02
    assert spent.seconds["rest"] >= 0.005
    assert spent.seconds[WHOLE] >= 0.025
    assert max(spent.peaks.values()) == spent.peaks[WHOLE]
