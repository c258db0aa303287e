"""Doing one job of a suite: training a part or a model, or scoring a model, in a folder that is resumed."""

from __future__ import annotations

import json
import platform
import subprocess
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments import train, train_tokenizer, train_vision
from experiments.ablate_suite import Job, Plan, Scoring
from experiments.compute import training_flops
from experiments.data.shapes import WORLDS
from experiments.evaluate import evaluate, sample_grid
from experiments.speedrun import Times
from vargpt.build import preset
from vargpt.checkpoint import load
from vargpt.choices import Choices
from vargpt.config_json import changed, from_json, to_json
from vargpt.files import atomic_file, read_json, write_json
from vargpt.images import save_image
from vargpt.model import VARGPT

DONE, ERROR, TIMES = "done.json", "error.txt", "times.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the jobs of a suite leave what they make."""

    scores: Path
    trained: Path

    def of(self, job: Job) -> Path:
        return (self.scores / "scores" if job.kind == "scores" else self.trained) / job.name

    def model(self, job: Job) -> Path:
        """What ``vargpt.load`` reads."""
        last = [job.settings["stages"][-1]["name"]] if job.kind == "model" else []
        return self.of(job).joinpath(*last, "model")

    def done(self, job: Job) -> bool:
        return (self.of(job) / DONE).is_file()

    def error(self, plan: Plan, job: Job) -> str | None:
        """Why a job is not done, in one line: what it needs comes first. None where it is."""
        if self.done(job):
            return None
        for name in job.needs:
            if (error := self.error(plan, plan.jobs[name])) is not None:
                return error
        file = self.of(job) / ERROR
        return file.read_text().splitlines()[0] if file.is_file() else f"{job.name} was not finished"


def perform(job: Job, plan: Plan, place: Place, device: torch.device) -> None:
    """Do a job, or go on with it. If it fails, its folder says why, and nothing else stops."""
    folder = place.of(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", asdict(job))
    (folder / ERROR).unlink(missing_ok=True)
    times = Times(folder / TIMES)
    try:
        with times.measured("seconds"):
            found = _train(job, plan, place, device) if job.kind != "scores" else _score(job, plan, place, device)
    except Exception as error:  # noqa: BLE001 (one row of many: whatever it is, the others go on)
        line = " ".join(str(error).split()) or type(error).__name__
        line = line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"
        with atomic_file(folder / ERROR) as file:
            file.write(f"{line}\n\n{''.join(traceback.format_exception(error))}".encode())
        return
    write_json(folder / DONE, {"measures": found, "minutes": times.seconds["seconds"] / 60, **environment()})


def _train(job: Job, plan: Plan, place: Place, device: torch.device) -> dict[str, float]:
    """Train; returns what is known of the training afterwards."""
    folder = place.of(job)
    if job.kind == "tokenizer":
        train_tokenizer.train(from_json(train_tokenizer.TokenizerTraining, job.settings), folder, device)
        return {}
    if job.kind == "vision":
        train_vision.train(from_json(train_vision.VisionTraining, job.settings), folder, device)
        return {}
    config = _training(job, plan, place)
    train.train(config, folder, device)
    model = load(place.model(job), device)
    measures = {"compute": training_flops(config, model, folder), "parameters": float(_decoders(model))}
    lines = [json.loads(line) for line in (place.model(job).parent / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if any(name.startswith("validation/") for name in line)]
    losses = {name.replace("validation/", "loss."): value for name, value in validated[-1].items() if "/" in name}
    return measures | losses


def _training(job: Job, plan: Plan, place: Place) -> train.Training:
    """The settings of a model's training, with folders for the names of jobs."""
    config = from_json(train.Training, job.settings)
    made = {name: str(place.model(plan.jobs[name])) for name in job.needs}
    start = tuple(made.get(name, name) for name in config.start)
    return replace(config, tokenizer=made.get(config.tokenizer, config.tokenizer), start=start)


def _decoders(model: VARGPT) -> int:
    """Parameters of the decoders' blocks, without embeddings and heads, which small models consist of."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(("llm.blocks", "var.blocks")))


def _score(job: Job, plan: Plan, place: Place, device: torch.device) -> dict[str, float]:
    """Score a trained model and leave a sheet of its drawings."""
    scoring, needed = from_json(Scoring, job.settings), plan.jobs[job.needs[0]]
    training = _training(needed, plan, place)
    train.import_parts(changed(preset(training.preset), training.model))
    folder = place.model(needed)
    own = to_json(load(folder).choices)
    model = load(folder, device, choices=from_json(Choices, {**own, **scoring.choices}, "choices"))
    world = WORLDS[scoring.world]
    shares = evaluate(model, world, scoring, scoring.parts)
    save_image(sample_grid(model, world, scoring), place.of(job) / "drawings.png")
    return read_json(place.of(needed) / DONE)["measures"] | {name: share.value for name, share in shares.items()}


def environment() -> dict[str, Any]:
    """What a result may depend on besides its settings."""

    def git(*command: str) -> str:
        root = Path(__file__).parents[1]
        found = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=False)
        return found.stdout.strip()

    edited = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "revision": git("rev-parse", "HEAD") + edited or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
