"""Ablations: rows share what they can, resume, outlive one that fails, and no figure is typed by hand."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vargpt
from experiments import ablate, ablate_jobs
from experiments.ablate_jobs import Place
from experiments.ablate_suite import Job, Plan, plan, read_suite
from vargpt.build import build
from vargpt.config_json import changed
from vargpt.images import save_image

SUITE = """
about: Does it run?
seeds: [0, 1, 2]
columns: [drawing.mean, loss.drawing]
plot: {y: drawing.mean, x: cfg, lines: "null"}
rows:
  plain: {}
  guided: {evaluate: {cfg: 3.0, "null": class}}
  shallow: {train: {model: {llm: {depth: 1}, vision: {width: 32, num_heads: 1}}}}
"""
SHIPPED = ["null", "quirks", "stages", "condition", "parts", "scaling", "ladder"]


def command(folder: Path, *more: str, suite: str = "micro") -> int:
    """The suite of ``folder/configs/suite``, its results in ``folder/out``."""
    places = [f"hydra.searchpath=[file://{folder / 'configs'}]", f"out={folder / 'out'}", f"trained={folder / 'made'}"]
    return ablate.main([f"suite={suite}", *places, *more])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "configs" / "suite").mkdir(parents=True)
    (tmp_path / "configs" / "suite" / "micro.yaml").write_text(SUITE)
    return tmp_path


Fake = Callable[[Job], dict[str, float]]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that were done, in their order; nothing is computed, and the scores follow from the settings."""
    jobs: list[Job] = []

    def fake(job: Job, _: Plan, place: Place, __: torch.device) -> dict[str, float]:
        jobs.append(job)
        if job.kind == "scores":
            save_image(Image.new("RGB", (8, 8), "red"), place.of(job) / "drawings.png")
        s = job.settings
        return {"drawing.mean": s["cfg"] / 10 + s["seed"] / 100} if job.kind == "scores" else {}

    monkeypatch.setattr(ablate_jobs, "_train", fake)
    monkeypatch.setattr(ablate_jobs, "_score", fake)
    return jobs


def failing(monkeypatch: pytest.MonkeyPatch, name: str, fails: Callable[[Job], BaseException | None]) -> None:
    """Let ``name`` of the jobs raise what ``fails`` gives for some of them."""
    own = getattr(ablate_jobs, name)

    def perform(job: Job, *arguments: Any) -> dict[str, float]:
        if (error := fails(job)) is not None:
            raise error
        return own(job, *arguments)

    monkeypatch.setattr(ablate_jobs, name, perform)


def test_rows_share_what_they_have_in_common(folder: Path, done: list[Job]) -> None:
    assert command(folder) == 0
    kinds = [job.kind for job in done]
    # Three seeds; only the shallow row has another model, and another vision encoder.
    assert {kind: kinds.count(kind) for kind in kinds} == {"tokenizer": 3, "vision": 6, "model": 6, "scores": 9}
    assert kinds == sorted(kinds, key=["tokenizer", "vision", "model", "scores"].index) or kinds.index("model") == 9
    assert len({job.name for job in done}) == len(done)
    encoders = [job.settings["model"] for job in done if job.kind == "vision"]
    assert encoders.count({"vision": {"width": 32, "num_heads": 1}}) == encoders.count({}) == 3


def test_the_table_is_right(folder: Path, done: list[Job]) -> None:
    assert command(folder) == 0
    report = (folder / "out" / "report.md").read_text()
    spread = statistics.stdev([0.0, 0.01, 0.02])
    assert f"| plain | 0.160 ± {spread:.3f} |  | 3 |  |" in report  # cfg is 1.5 by default; no loss was measured
    assert f"| guided | 0.310 ± {spread:.3f} |  | 3 |  |" in report
    rows = list(csv.DictReader((folder / "out" / "table.csv").read_text().splitlines()))
    assert [row["row"] for row in rows] == ["plain", "guided", "shallow"]
    assert float(rows[1]["drawing.mean mean"]) == pytest.approx(0.31)
    assert float(rows[1]["drawing.mean std"]) == pytest.approx(spread)
    assert "revision " in report
    configs = json.loads((folder / "out" / "configs.json").read_text())
    assert configs.keys() == {job.name for job in done}
    for picture in ("plot.png", "drawings.png"):
        assert (folder / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_report_comes_out_the_same_from_its_folder_alone(folder: Path, done: list[Job]) -> None:
    assert command(folder) == 0
    names = ("report.md", "table.csv", "plot.png", "drawings.png")
    before = {name: (folder / "out" / name).read_bytes() for name in names}
    for name in names:
        (folder / "out" / name).unlink()
    (folder / "configs" / "suite" / "micro.yaml").write_text(SUITE.replace("plain:", "other:"))
    jobs = len(done)
    assert command(folder, "report_only=true") == 0
    assert len(done) == jobs
    assert {name: (folder / "out" / name).read_bytes() for name in names} == before


def test_an_interrupted_suite_goes_on_and_repeats_nothing(
    folder: Path, done: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "_score", lambda _: KeyboardInterrupt() if len(done) == 17 else None)
        assert command(folder) == 2
    assert "error: interrupted" in capsys.readouterr().err
    assert "was not finished" in (folder / "out" / "report.md").read_text()
    before = {job.name for job in done}
    assert len(before) == 17
    assert command(folder) == 0
    assert len(done) == 24
    assert before.isdisjoint(job.name for job in done[17:])
    assert command(folder) == 0
    assert len(done) == 24
    assert "was not finished" not in (folder / "out" / "report.md").read_text()


def test_a_failing_row_is_told_and_the_others_go_on(
    folder: Path, done: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(job: Job) -> BaseException | None:
        shallow = job.kind == "model" and bool(job.settings["model"])
        return RuntimeError("out of | memory\nat layer 3") if shallow and job.settings["seed"] < 2 else None

    with monkeypatch.context() as patch:
        failing(patch, "_train", fails)
        assert command(folder) == 1
    report = (folder / "out" / "report.md").read_text()
    assert "| plain | 0.160 ± 0.010 |  | 3 |  |" in report
    told = "error (seed 0, 1): RuntimeError: out of \\| memory at layer 3"
    assert f"| shallow | 0.170 |  | 1 | {told} |" in report  # of seed 2 alone
    assert command(folder, "report_only=true") == 1
    assert command(folder) == 0  # what failed is tried again
    assert "error (seed" not in (folder / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["suite=nothing"], "Could not find 'suite/nothing'"),
        (["suite=micro", "+suite.rows.wrong={trian: {}}"], "row wrong: wrong has no field 'trian'"),
        (["suite=micro", "+suite.rows.wrong={train: {stages.0.steps: 1}}"], "row wrong: nano.stages[0] has no field"),
        (["suite=micro", "+suite.rows.wrong={train: {model: {llm: {deep: 1}}}}"], "config.llm has no field 'deep'"),
        (["suite=micro", "suite.seeds=[]"], "a suite needs rows, seeds and columns"),
        (["suite=micro", "colour=red"], "colour"),
        (["suite=micro", "report_only=true"], "results.json does not exist"),
        ([], "You must specify 'suite'"),
    ],
)
def test_mistakes_get_one_line_before_anything_trains(
    folder: Path, done: list[Job], capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    places = [f"hydra.searchpath=[file://{folder / 'configs'}]", f"out={folder / 'out'}"]
    assert ablate.main([*arguments, *places]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert not done


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_suites_name_settings_that_exist(name: str, tmp_path: Path) -> None:
    cfg, found = ablate.composed([f"suite='{name}'", f"out={tmp_path}"])
    assert found == name
    suite = read_suite(ablate.plain(cfg.suite), name)
    jobs = plan(suite, name)
    assert len(jobs.cells) == 3 * len(suite.rows)
    assert len(set(jobs.cells.values())) == len(jobs.cells)  # no row is another one by another name
    for job in jobs.jobs.values():
        if job.kind == "model":
            build(changed(vargpt.preset(job.settings["preset"]), job.settings["model"]))


PROJECTOR = """
from torch import nn

class Gated(nn.Module):
    def __init__(self, in_width, out_width, *, hidden):
        super().__init__()
        self.value, self.gate = nn.Linear(in_width, hidden), nn.Linear(in_width, hidden)
        self.out = nn.Linear(hidden, out_width)

    def forward(self, x):
        return self.out(self.value(x) * self.gate(x).sigmoid())
"""
OWN = """
about: Does a gate help?
seeds: [0]
columns: [tokenizer.exact, loss.drawing, compute]
plot: {y: compute}
all:
  tokenizer: {vqvae.channels: 16, schedule.steps: 1, batch: 2, validation: 4}
  vision: {schedule.steps: 1, batch: 2, validation: 4}
  train:
    plan: false
    validation: 1
    stages: [{name: joint, schedule: {steps: 1, lr: 0.001}, rows: {drawing: 1, question: 1}}]
  evaluate: {n: 6, parts: [tokenizer]}
rows:
  gated: {train: {model: {projector: {kind: "newcomer:Gated", options: {hidden: 8}}}}}
  impossible: {train: {model: {projector: {kind: "newcomer:Gated", options: {depth: 8}}}}}
"""


def test_a_newcomers_projector_runs_from_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs" / "suite").mkdir(parents=True)
    (tmp_path / "configs" / "suite" / "own.yaml").write_text(OWN)
    assert command(tmp_path, suite="own") == 2
    assert "newcomer:Gated cannot be imported" in capsys.readouterr().err
    (tmp_path / "newcomer.py").write_text(PROJECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert command(tmp_path, suite="own") == 1
        report = (tmp_path / "out" / "report.md").read_text()
        assert "newcomer:Gated cannot be built" in report
        gated, impossible = csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines())
        assert "unexpected keyword argument 'depth'" in impossible["error"]
        assert float(gated["compute mean"]) > 1e8
        assert float(gated["loss.drawing mean"]) > 0
        (model,) = (path.parent for path in (tmp_path / "made").glob("model-*/joint/model/config.json"))
        assert type(vargpt.load(model).projector).__name__ == "Gated"
        monkeypatch.delitem(sys.modules, "newcomer")
        with pytest.raises(ValueError, match="a part of 'newcomer', code that is not this package's: import it first"):
            vargpt.load(model)  # nothing that a file names is ever run
        assert "newcomer" not in sys.modules
    finally:
        sys.modules.pop("newcomer", None)
