"""From nothing to a trained nano model and its report card: ``python -m experiments.speedrun [--out DIR] [--seed N]``.

Trains the image tokenizer, the vision encoder and the whole model of the easiest world, scores them on unseen scenes,
and writes ``report.md`` with its pictures. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from experiments import train, train_tokenizer, train_vision
from experiments.data.shapes import WORLDS
from experiments.evaluate import Settings, evaluate, sample_grid, table, write_scores
from experiments.run import exit_code, settings
from vargpt.checkpoint import load
from vargpt.files import atomic_file, read_json, write_json
from vargpt.images import save_image

WORLD = "nano"
CURVES = ("l1", "l2", "vq", "covered", "shape", "colour", "x", "start_drawing", "drawing", "answer")
SECTIONS = ("tokenizer", "vision", "train")


def speedrun(out: Path, seed: int, n: int, changes: dict[str, list[str]]) -> Path:
    """Train, score and report; returns the report's path.

    Args:
        n: scenes, questions and prompts to score on.
        changes: settings (``key=value``) other than the configurations', by section.
    """
    out.mkdir(parents=True, exist_ok=True)
    cpu, times = torch.device("cpu"), Times(out / "times.json")
    _, tokenizer = settings(
        "tokenizer", train_tokenizer.TokenizerTraining, [WORLD, f"seed={seed}", *changes["tokenizer"]]
    )
    _, vision = settings("vision", train_vision.VisionTraining, [WORLD, f"seed={seed}", *changes["vision"]])
    places = [f"tokenizer={out / 'tokenizer' / 'model'}", f"start=[{out / 'vision' / 'model'}]"]
    _, training = settings("train", train.Training, [WORLD, *places, f"seed={seed}", *changes["train"]])
    with times.measured("image tokenizer"):
        if not (out / "tokenizer" / "model" / "config.json").is_file():
            train_tokenizer.train(tokenizer, out / "tokenizer", cpu)
    with times.measured("vision encoder"):
        if not (out / "vision" / "model" / "config.json").is_file():
            train_vision.train(vision, out / "vision", cpu)
    with times.measured("model"):
        train.train(training, out / "model", cpu)
    trained = out / "model" / training.stages[-1].name
    with times.measured("scores"):
        if not (out / "scores.json").is_file():
            model, world, chosen = load(trained / "model"), WORLDS[WORLD], Settings(n=n, seed=seed)
            scores = evaluate(model, world, chosen)
            save_image(sample_grid(model, world, chosen), out / "drawings.png")
            (out / "scores.md").write_text(table(scores) + "\n")
            write_scores(scores, chosen, out / "scores.json")
    curves(
        [out / "tokenizer", out / "vision", *(out / "model" / stage.name for stage in training.stages)],
        out / "losses.png",
    )
    prefixes = sorted((out / "tokenizer" / "samples").glob("prefixes-*.png"))[-1]
    report = out / "report.md"
    with atomic_file(report) as file:
        file.write(_report(out, seed, n, times, prefixes).encode())
    return report


class Times:
    """Seconds spent on each part, interruptions not counted."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = read_json(file) if file.is_file() else {}

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
            write_json(self._file, self.seconds)


def curves(runs: list[Path], file: Path) -> None:
    """What each run minimised and, dotted, how it did on what it never saw; a panel per run."""
    figure, panels = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4), squeeze=False)
    for panel, run in zip(panels[0], runs, strict=True):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        names = {name for line in lines for name in line if name.startswith("validation/")}
        names |= {name for line in lines for name in line if name in CURVES}
        for name in sorted(names):
            points = [(line["step"], line[name]) for line in lines if name in line]
            panel.plot(*zip(*points, strict=True), ":" if name.startswith("validation/") else "-", label=name)
        panel.set(title=run.name, xlabel="step", yscale="log")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _report(out: Path, seed: int, n: int, times: Times, prefixes: Path) -> str:
    minutes = "\n".join(f"| {part} | {seconds / 60:.1f} |" for part, seconds in times.seconds.items())
    return f"""# Report card of a nano model

`python -m experiments.speedrun --seed {seed}`: the easiest world ({_world()}), {torch.get_num_threads()} threads of
{_processor()}, Python {platform.python_version()}, torch {torch.__version__}.

| part | minutes |
|---|---|
{minutes}
| all | {sum(times.seconds.values()) / 60:.1f} |

## Scores on scenes it has not seen

n = {n}, seed {seed}, sampling at its defaults. A drawing counts when an exact parser reads from it what was asked for
and nothing else. `tokenizer.codes.s` is the share of reachable codes that scale s uses.

{(out / "scores.md").read_text()}
## Drawings

A row of prompts each: single object, two objects, counting, colours, position, attribution.

![drawings](drawings.png)

## Reconstructions from the first scales

Pictures on top, then what the image tokenizer makes of their first scale, the first two, and so on.

![prefixes]({prefixes.relative_to(out)})

## Losses

![losses](losses.png)
"""


def _world() -> str:
    world = WORLDS[WORLD]
    return f"{len(world.shapes)} shapes, {len(world.colours)} colours, at most {world.max_objects} objects"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/speedrun", help="folder of the run (runs/speedrun)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=1000, help="scenes, questions and prompts to score on (1000)")
    for section in SECTIONS:
        parser.add_argument(f"--{section}", nargs="*", default=[], metavar="key=value", help="changes to its settings")
    options = parser.parse_args(arguments)

    def run() -> None:
        changes = {section: getattr(options, section) for section in SECTIONS}
        print(speedrun(Path(options.out), options.seed, options.n, changes))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
