"""What a suite found: a table, a plot and drawings side by side, all of them from the results in its folder."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from experiments.ablate_jobs import DONE, Place
from experiments.ablate_suite import Plan, Plot, Suite
from vargpt.config_json import from_json, to_json
from vargpt.files import atomic_file, read_json, write_json

RESULTS = "results.json"
ENVIRONMENT = ("revision", "python", "torch", "machine", "threads")


def collect(suite: Suite, plan: Plan, place: Place, arguments: Sequence[str]) -> None:
    """Write down what is there of every row and seed, and with which settings: ``results.json``, ``configs.json``."""
    done = {name: read_json(place.of(job) / DONE) for name, job in plan.jobs.items() if place.done(job)}
    cells = []
    for (row, seed), name in plan.cells.items():
        job = plan.jobs[name]
        found = done.get(name, {})
        cells.append(
            {
                "row": row,
                "seed": seed,
                "job": name,
                "settings": job.settings,
                "measures": found.get("measures", {}),
                "error": place.error(plan, job),
            }
        )
    environments = {tuple(str(found[key]) for key in ENVIRONMENT) for found in done.values()}
    content = {
        "command": " ".join(["python -m experiments.ablate", *arguments]),
        "about": suite.about,
        "columns": suite.columns,
        "plot": to_json(suite.plot),
        "cells": cells,
        "environments": [dict(zip(ENVIRONMENT, values, strict=True)) for values in sorted(environments)],
        "minutes": sum(found["minutes"] for found in done.values()),
    }
    write_json(place.scores / RESULTS, content)
    write_json(
        place.scores / "configs.json",
        {name: {"settings": job.settings, "needs": job.needs} for name, job in plan.jobs.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of one row."""

    name: str
    seeds: list[int]
    """Those that have scores."""
    values: Mapping[str, list[float]]
    """Of every measure, in the order of the seeds."""
    settings: Mapping[str, Any]
    """Of the scoring."""
    errors: Mapping[int, str]
    drawings: Path | None
    """A sheet of the first seed's."""

    def mean(self, measure: str) -> float:
        return statistics.fmean(self.values[measure]) if self.values.get(measure) else math.nan

    def deviation(self, measure: str) -> float:
        """The sample standard deviation over the seeds; NaN of fewer than two."""
        values = self.values.get(measure, [])
        return statistics.stdev(values) if len(values) > 1 else math.nan


def report(out: Path) -> bool:
    """Write ``report.md``, ``table.csv``, ``plot.png`` and ``drawings.png`` from ``results.json`` and the sheets of
    drawings; returns whether any row lacks scores.

    Raises:
        ValueError: a folder without results.
    """
    results = read_json(out / RESULTS)
    rows = _rows(results["cells"], out)
    plot = from_json(Plot, results["plot"])
    with atomic_file(out / "table.csv") as file:
        file.write(_csv(rows).encode())
    law = _draw_plot(rows, plot, out / "plot.png")
    _draw_sheets(rows, out / "drawings.png")
    with atomic_file(out / "report.md") as file:
        file.write(_markdown(results, rows, law).encode())
    return any(row.errors for row in rows)


def _rows(cells: Sequence[Mapping[str, Any]], out: Path) -> list[Found]:
    rows = []
    for name in dict.fromkeys(cell["row"] for cell in cells):
        own = [cell for cell in cells if cell["row"] == name]
        scored = [cell for cell in own if cell["error"] is None]
        measures = dict.fromkeys(measure for cell in scored for measure in cell["measures"])
        rows.append(
            Found(
                name=name,
                seeds=[cell["seed"] for cell in scored],
                values={m: [cell["measures"][m] for cell in scored if m in cell["measures"]] for m in measures},
                settings=own[0]["settings"],
                errors={cell["seed"]: cell["error"] for cell in own if cell["error"] is not None},
                drawings=out / "scores" / scored[0]["job"] / "drawings.png" if scored else None,
            )
        )
    return rows


def table(rows: Sequence[Found], columns: Sequence[str]) -> str:
    """Mean and standard deviation of every column, in markdown; what failed has its reason in the last column."""
    lines = [f"| row | {' | '.join(columns)} | seeds | |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for seed, error in row.errors.items():
            reasons.setdefault(error.replace("|", "\\|"), []).append(str(seed))
        told = "; ".join(f"error (seed {', '.join(seeds)}): {error}" for error, seeds in reasons.items())
        values = " | ".join(_shown(row.mean(c), row.deviation(c)) for c in columns)
        lines.append(f"| {row.name} | {values} | {len(row.seeds)} | {told} |")
    return "\n".join(lines)


def _shown(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return ""
    digits = "{:.3g}" if abs(mean) >= 100 else "{:.3f}"
    return digits.format(mean) + ("" if math.isnan(deviation) else f" ± {digits.format(deviation)}")


def _csv(rows: Sequence[Found]) -> str:
    measures = list(dict.fromkeys(measure for row in rows for measure in row.values))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "seeds", *(f"{m} {what}" for m in measures for what in ("mean", "std")), "error"])
    for row in rows:
        numbers = [x for m in measures for x in (row.mean(m), row.deviation(m))]
        shown = ["" if math.isnan(x) else repr(x) for x in numbers]
        writer.writerow([row.name, len(row.seeds), *shown, "; ".join(dict.fromkeys(row.errors.values()))])
    return file.getvalue()


def _draw_plot(rows: Sequence[Found], plot: Plot, file: Path) -> str | None:
    """Returns the fitted law, in words, where one was asked for."""
    figure, axes = plt.subplots(figsize=(7, 4))
    rows = [row for row in rows if row.seeds and plot.y in row.values]
    law = None
    if plot.x is None:
        deviations = [0.0 if math.isnan(d := row.deviation(plot.y)) else d for row in rows]
        axes.barh([row.name for row in rows], [row.mean(plot.y) for row in rows], xerr=deviations)
        axes.invert_yaxis()
        axes.set_xlabel(plot.y)
    else:
        for line in dict.fromkeys(row.settings.get(plot.lines or "") for row in rows):
            some = [row for row in rows if row.settings.get(plot.lines or "") == line]
            points = sorted((_x(row, plot.x), row.mean(plot.y), row.deviation(plot.y)) for row in some)
            x, y, deviation = zip(*points, strict=True)
            style = "o" if plot.fit else "o-"
            axes.errorbar(x, y, np.nan_to_num(deviation), fmt=style, capsize=3, label=None if line is None else line)
        axes.set(xlabel=plot.x, ylabel=plot.y)
        if plot.fit and len(rows) > 1:
            x, y = [_x(row, plot.x) for row in rows], [row.mean(plot.y) for row in rows]
            slope, offset = np.polyfit(np.log(x), np.log(y), 1)
            law = f"{plot.y} = {np.exp(offset):.3g} · {plot.x}^{slope:.3f}"
            ends = np.array([min(x), max(x)])
            axes.plot(ends, np.exp(offset) * ends**slope, "--", label=law)
            axes.set(xscale="log", yscale="log")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(title=plot.lines)
    figure.tight_layout()
    with atomic_file(file) as out:
        figure.savefig(out, dpi=100, format="png")
    plt.close(figure)
    return law


def _x(row: Found, name: str) -> float:
    """Where a row lies along x: by a measure, or by a setting of its scoring."""
    return row.mean(name) if name in row.values else float(row.settings[name])


def _draw_sheets(rows: Sequence[Found], file: Path, columns: int = 3) -> None:
    """The rows' sheets of drawings side by side, each under the row's name."""
    sheets = [(row.name, row.drawings) for row in rows if row.drawings is not None]
    lines = max(1, math.ceil(len(sheets) / columns))
    figure, panels = plt.subplots(lines, columns, squeeze=False, figsize=(4 * columns, 4 * lines))
    for panel in panels.flat:
        panel.axis("off")
    for panel, (name, sheet) in zip(panels.flat, sheets, strict=False):
        with Image.open(sheet) as picture:
            panel.imshow(np.asarray(picture))
        panel.set_title(name)
    figure.tight_layout()
    with atomic_file(file) as out:
        figure.savefig(out, dpi=100, format="png")
    plt.close(figure)


def _markdown(results: Mapping[str, Any], rows: Sequence[Found], law: str | None) -> str:
    used = "\n".join("- " + ", ".join(f"{k} {v}" for k, v in found.items()) for found in results["environments"])
    fitted = f"\nFitted to the rows' means: {law}\n" if law else ""
    return f"""# {results["about"]}

`{results["command"]}`: {results["minutes"]:.1f} minutes of training and scoring in all. Mean and standard deviation
over seeds; `configs.json` has all settings, `table.csv` all measures.

{table(rows, results["columns"])}
{fitted}
![plot](plot.png)

Drawings of the first seed, a row of prompts each: single object, two objects, counting, colours, position, attribution.

![drawings](drawings.png)

Made with:

{used}
"""
