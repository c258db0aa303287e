"""Loading a model's directory, from a cold and from a warm disk cache."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments.benchmark.cases import PARTS, WHOLE, Options, Spent, Table, stored
from experiments.benchmark.counting import Work
from experiments.benchmark.machine import peak_resident
from experiments.benchmark.memory import PROCESS, weights
from vargpt.checkpoint import load

READING = "reading the files"
CHUNK = 2**24
"""Bytes read at a time."""


def benchmark_load(options: Options) -> Table:
    """Every load in a fresh process. The floor of a cold one is the time to read the files' bytes from the disk, taken
    just before; of a warm one, to read as many bytes from memory."""
    table, o, config = Table("load", options), options, options.config(*PARTS)
    with stored(options, config) as folder:
        size = sum(file.stat().st_size for file in weight_files(folder))
        needed = PROCESS + o.size * weights(config)
        for case in ("cold", "warm"):
            if case == "cold" and not hasattr(os, "posix_fadvise"):
                table.missing[case] = "this system cannot be told to forget what it holds of files"
                continue
            runs = [table.run(case, needed, measure, folder, o.dtype, case == "cold") for _ in range(o.repeats)]
            found = [run for run in runs if run is not None]
            if not found:
                continue
            spent, machine = together([spent for spent, _ in found]), found[-1][1]
            if case == "cold":
                machine = replace(machine, bandwidth=size / spent.seconds[READING])
            more = {"peak to files": spent.peaks[WHOLE] / size}
            table.add(case, spent, machine, {WHOLE: [Work(bytes=size)]}, **more)
    return table


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        ValueError: there are none.
    """
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise ValueError(f"{folder} has no safetensors: name the directory of a model")
    return files


def together(spents: Sequence[Spent]) -> Spent:
    """Runs of several processes as one."""
    return Spent(
        seconds={name: statistics.median(s.seconds[name] for s in spents) for name in spents[0].seconds},
        peaks={WHOLE: max(s.peaks[WHOLE] for s in spents)},
    )


def measure(folder: Path, dtype: torch.dtype, cold: bool) -> Spent:
    """In a process of its own: read the files, and then load the model."""
    files = weight_files(folder)
    if cold:
        forget(files)
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(CHUNK):
                pass
    reading = time.perf_counter() - started
    if cold:
        forget(files)
    started = time.perf_counter()
    load(folder, dtype=dtype)
    return Spent(seconds={WHOLE: time.perf_counter() - started, READING: reading}, peaks={WHOLE: peak_resident()})


def forget(files: Sequence[Path]) -> None:
    """Let the system drop what it holds of these files in memory; what is not yet on the disk is written first."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
