"""Cases measured in processes of their own, so that none holds what another one left, and the table of them all."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from experiments.benchmark.counting import Work, floor
from experiments.benchmark.machine import Machine, forget_peak, peak_resident, too_large
from experiments.benchmark.memory import PROCESS, weights
from vargpt.build import build, preset
from vargpt.checkpoint import find, read, read_tokenizer, save
from vargpt.config import VargptConfig
from vargpt.model import VARGPT

Result = TypeVar("Result")
WHOLE = "all"
"""The name of all parts together."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a process found: medians over its runs."""

    seconds: Mapping[str, float]
    """By part; ``WHOLE`` is all of a run."""
    peaks: Mapping[str, int]
    """Most resident bytes, by part, where the system tells; ``WHOLE`` is the process's, loading included."""
    facts: Mapping[str, int] = field(default_factory=dict)
    """Sizes that only the run could tell, such as tokens of a prompt."""


class Clock:
    """Times of the parts of a run, and memory at their peaks, over several runs."""

    def __init__(self) -> None:
        self._runs: list[dict[str, float]] = []
        self._peaks: dict[str, int] = {}
        self._whole = 0

    def run(self, call: Callable[[], object], repeats: int) -> None:
        """Call ``repeats`` times; a first call is not counted."""
        call()
        for _ in range(repeats):
            self._runs.append({})
            started = time.perf_counter()
            call()
            self._runs[-1][WHOLE] = time.perf_counter() - started

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part. Parts do not contain each other."""
        self._whole = max(self._whole, peak_resident())
        known, started = forget_peak(), time.perf_counter()
        yield
        spent, peak = time.perf_counter() - started, peak_resident()
        self._whole = max(self._whole, peak)
        if known:
            self._peaks[name] = max(self._peaks.get(name, 0), peak)
        if self._runs:
            self._runs[-1][name] = self._runs[-1].get(name, 0.0) + spent

    def watch(self, name: str, owner: Any, method: str) -> None:
        """Let all calls of a method belong to a part."""
        call = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return call(*arguments, **options)

        setattr(owner, method, timed)

    def spent(self, *, rest: str | None = None, **facts: int) -> Spent:
        """The medians; ``rest`` names what is left of a run beside its parts."""
        if rest is not None:
            for run in self._runs:
                run[rest] = run[WHOLE] - sum(seconds for name, seconds in run.items() if name != WHOLE)
        return Spent(
            seconds={name: statistics.median(run.get(name, 0.0) for run in self._runs) for name in self._runs[0]},
            peaks={**self._peaks, WHOLE: max(self._whole, peak_resident())},
            facts=facts,
        )


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """A call in a fresh process, which ends with it. What it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- Models ----

PARTS = ("llm", "vision", "projector", "var", "vqvae", "gen_in", "gen_out")
DRAWING = ("llm", "var", "vqvae", "gen_in", "gen_out")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all subjects have in common."""

    preset: str = "bench-mid"
    model: str | None = None
    """A model's directory, instead of random weights of the preset."""
    dtype: torch.dtype = torch.float32
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, not {self.repeats}")
        preset(self.preset)

    def config(self, *parts: str) -> VargptConfig:
        """Of a preset with these parts alone; a model that was named is loaded whole."""
        if self.model is not None:
            return read(find(self.model))[0]
        return dataclasses.replace(preset(self.preset), **{name: None for name in PARTS if name not in parts})

    @property
    def name(self) -> str:
        return self.model or self.preset

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize


def random_model(config: VargptConfig) -> VARGPT:
    """A model that has learned nothing. It reads text as bytes: there are no tokenizer's files beside this one."""
    return build(config, tokenizer=read_tokenizer(Path(__file__).parent, config)).eval()


@contextmanager
def stored(options: Options, config: VargptConfig) -> Iterator[Path]:
    """The folder of the model to measure: the one that was named, or else random weights of the configuration, written
    for as long as they are needed. Cases load it as a user would, with all that loading makes faster."""
    if options.model is not None:
        yield find(options.model)
        return
    if (reason := too_large(PROCESS + 4 * weights(config))) is not None:
        raise ValueError(f"{options.preset} cannot be filled with random weights here: {reason}; name a --model")
    with TemporaryDirectory(prefix="vargpt-benchmark-") as folder:
        apart(_write, config, Path(folder))
        yield Path(folder)


def _write(config: VargptConfig, folder: Path) -> None:
    save(random_model(config), folder)


# ---- Tables ----


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: seconds (medians), the floor under them, and the most memory held."""

    case: str
    part: str
    seconds: float
    floor: float
    peak: int | None
    machine: Machine
    more: Mapping[str, float] = field(default_factory=dict)
    """Columns of one subject alone."""

    @property
    def ratio(self) -> float | None:
        """Times the floor; None where nothing was counted."""
        return self.seconds / self.floor if self.floor else None


class Table:
    """The cases of one subject, measured one after the other."""

    def __init__(self, what: str, options: Options) -> None:
        self.what, self.options = what, options
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}

    def run(
        self, case: str, needed: float, function: Callable[..., Spent], *arguments: Any
    ) -> tuple[Spent, Machine] | None:
        """What a fresh process finds, and the machine's limits just before; None, with a reason, where it cannot be."""
        if (reason := too_large(needed)) is not None:
            self.missing[case] = reason
            return None
        print(f"{self.what}: {case}", file=sys.stderr)
        machine = Machine.measured(self.options.dtype)
        try:
            return apart(function, *arguments), machine
        except BrokenProcessPool:
            self.missing[case] = "its process was killed, perhaps for want of memory"
        return None

    def add(
        self,
        case: str,
        spent: Spent,
        machine: Machine,
        floors: Mapping[str, Sequence[Work]],
        *,
        share: float = 1.0,
        **more: float,
    ) -> Row:
        """A row for every part with a floor, and then one for all of them, which is returned.

        Args:
            share: of a run's time that the table is to show: that of one picture of several.
            more: further columns of the row for all.
        """
        for part, works in floors.items():
            if part in spent.seconds and len(floors) > 1:
                self._row(case, part, spent, floor(works, machine), machine, share, {})
        whole = floor([work for works in floors.values() for work in works], machine)
        return self._row(case, WHOLE, spent, whole, machine, share, more)

    def _row(
        self,
        case: str,
        part: str,
        spent: Spent,
        least: float,
        machine: Machine,
        share: float,
        more: Mapping[str, float],
    ) -> Row:
        self.rows.append(
            Row(
                case=case,
                part=part,
                seconds=share * spent.seconds[part],
                floor=share * least,
                peak=spent.peaks.get(part),
                machine=machine,
                more=more,
            )
        )
        return self.rows[-1]

    def markdown(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.more))
        head = ["case", "part", "seconds", "floor", "ratio", "peak, MB", *names]
        lines = ["| " + " | ".join(head) + " |", "|" + len(head) * "---|"]
        for row in self.rows:
            cells = [row.case, row.part, f"{row.seconds:.3f}", f"{row.floor:.3f}"]
            cells.append("-" if row.ratio is None else f"{row.ratio:.2f}")
            cells.append("-" if row.peak is None else f"{row.peak / 1e6:.0f}")
            cells += [f"{row.more[name]:.2f}" if name in row.more else "-" for name in names]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def json(self) -> str:
        rows = [
            {
                "case": row.case,
                "part": row.part,
                "seconds": row.seconds,
                "floor": row.floor,
                "ratio": row.ratio,
                "peak_bytes": row.peak,
                "rate": row.machine.rate,
                "bandwidth": row.machine.bandwidth,
                **row.more,
            }
            for row in self.rows
        ]
        about = {
            "benchmark": self.what,
            "model": self.options.name,
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "repeats": self.options.repeats,
        }
        return json.dumps({**about, "rows": rows, "not_run": self.missing})

    def show(self) -> None:
        """Print all: what was measured, in a table and as a line of JSON, and what was not."""
        o = self.options
        print(f"{self.what}: {o.name}, {o.dtype}, {torch.get_num_threads()} threads, medians of {o.repeats}")
        if self.rows:
            rate, read = (
                statistics.median(getattr(row.machine, name) for row in self.rows) for name in ("rate", "bandwidth")
            )
            print(f"floors from {rate / 1e9:.0f} GFLOP/s of products and {read / 1e9:.1f} GB/s read (medians)")
            print(self.markdown())
        for case, reason in self.missing.items():
            print(f"not run: {case}: {reason}")
        print(self.json())
