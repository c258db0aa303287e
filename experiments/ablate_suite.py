"""What a suite of ablations consists of: rows, seeds, and the jobs that they share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments import train, train_tokenizer, train_vision
from experiments.evaluate import PARTS, Part, Settings
from experiments.run import configured
from vargpt.config_json import from_json, to_json


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture of one measure. Without ``x``, a bar for every row."""

    y: str
    x: str | None = None
    """What runs along: a measure, or a setting of the scoring such as "cfg"."""
    lines: str | None = None
    """The setting of the scoring that tells lines apart."""
    fit: bool = False
    """Fit y = a x^b, both axes logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Changes of one row, by section: ``{"stages.0.schedule.steps": 100}``. ``tokenizer`` or ``vision`` may be None:
    none is trained, and the model starts from what its own settings name."""

    tokenizer: Mapping[str, Any] | None = field(default_factory=dict)
    vision: Mapping[str, Any] | None = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Named rows, each trained and scored with every seed."""

    about: str
    """What is asked, in a sentence or two."""
    rows: Mapping[str, Any]
    """Changes of every row (:class:`Row`)."""
    columns: tuple[str, ...]
    """Measures of the table; the CSV file has all of them."""
    plot: Plot
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: str = "nano"
    """The configuration that rows change, of ``configs/tokenizer``, ``configs/vision`` and ``configs/train``."""
    all: Row = Row()
    """Changes of all rows, before their own."""

    def __post_init__(self) -> None:
        if not self.rows or not self.seeds or not self.columns:
            raise ValueError("a suite needs rows, seeds and columns")


@dataclass(frozen=True, kw_only=True)
class Scoring(Settings):
    """How a trained model is scored."""

    world: Literal["nano", "full"] = "nano"
    parts: tuple[Part, ...] = PARTS
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the model's choices (``vargpt/choices.py``) that need no other training."""


Kind = Literal["tokenizer", "vision", "model", "scores"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to train or to score, named by a hash of its settings and of those of all that it needs."""

    kind: Kind
    settings: Mapping[str, Any]
    """As JSON; names of needed jobs stand for their folders."""
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        content = json.dumps([self.kind, self.settings, self.needs], sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All jobs of a suite."""

    jobs: Mapping[str, Job]
    """By name, what is needed before what needs it."""
    cells: Mapping[tuple[str, int], str]
    """The scores of every row and seed."""


def read_suite(content: Any, name: str) -> Suite:
    """A suite as its YAML file has it.

    Raises:
        ValueError: an unknown field or a wrong value, named with its place.
    """
    return from_json(Suite, content, f"suite {name}")


def plan(suite: Suite, name: str) -> Plan:
    """The jobs of all rows and seeds, those with the same settings once.

    Raises:
        ValueError: a row whose settings do not exist, named.
    """
    jobs: dict[str, Job] = {}
    cells: dict[tuple[str, int], str] = {}
    for row, changes in suite.rows.items():
        for seed in suite.seeds:
            try:
                chain = _jobs(suite, from_json(Row, changes or {}, row), seed)
            except ValueError as error:
                raise ValueError(f"suite {name}, row {row}: {error}") from None
            jobs |= {job.name: job for job in chain}
            cells[row, seed] = chain[-1].name
    return Plan(jobs=jobs, cells=cells)


def _jobs(suite: Suite, row: Row, seed: int) -> list[Job]:
    """What one row needs with one seed; its scores are the last."""
    shared, name = suite.all, suite.settings
    parts: list[Job] = []
    of_model = [*shared.train.items(), *row.train.items(), ("seed", seed)]
    if shared.tokenizer is not None and row.tokenizer is not None:
        changes = [*shared.tokenizer.items(), *row.tokenizer.items(), ("seed", seed)]
        tokenizer = configured("tokenizer", train_tokenizer.TokenizerTraining, name, changes)
        parts.append(Job(kind="tokenizer", settings=to_json(tokenizer)))
        of_model.append(("tokenizer", parts[-1].name))
    training = configured("train", train.Training, name, of_model)
    if shared.vision is not None and row.vision is not None:
        # It is the encoder of the row's model, whatever its sizes.
        sizes = [("model", {"vision": training.model["vision"]})] if "vision" in training.model else []
        changes = [*sizes, *shared.vision.items(), *row.vision.items(), ("seed", seed)]
        vision = configured("vision", train_vision.VisionTraining, name, changes)
        parts.append(Job(kind="vision", settings=to_json(vision)))
        training = dataclasses.replace(training, start=(parts[-1].name,))
    model = Job(kind="model", settings=to_json(training), needs=tuple(job.name for job in parts))
    scoring = from_json(Scoring, {"seed": seed, **shared.evaluate, **row.evaluate}, "evaluate")
    return [*parts, model, Job(kind="scores", settings=to_json(scoring), needs=(model.name,))]
