"""Speed and memory, against limits of the machine measured in the same run: ``python -m experiments.benchmark WHAT``.

Every subject prints a table and one line of JSON: medians, the least time that counted work can take (the floor), the
ratio of the two, and the most memory held by a process that did nothing else. The machine is shared with whatever else
runs on it. ``all`` runs every subject with its defaults.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from experiments.benchmark.attention import SCHEDULES, benchmark_attention
from experiments.benchmark.cases import Options
from experiments.benchmark.draw import benchmark_draw
from experiments.benchmark.growth import benchmark_growth
from experiments.benchmark.kernels import SOURCES, benchmark_kernels
from experiments.benchmark.load import benchmark_load
from experiments.benchmark.text import benchmark_text
from experiments.benchmark.tokenizer import benchmark_tokenizer
from experiments.benchmark.train import benchmark_train
from experiments.run import exit_code
from vargpt.config import PRESETS

MODELS = {
    "draw": (benchmark_draw, "pictures, one and four of one prompt, by part"),
    "text": (benchmark_text, "64 greedy tokens of one row and of eight, and transformers' where it is installed"),
    "train": (benchmark_train, "a training step on one drawing, by part"),
    "tokenizer": (benchmark_tokenizer, "the image tokenizer's two ways, by memory format"),
    "load": (benchmark_load, "loading a model's directory"),
}
"""Subjects that take a model and nothing else."""
PLOT = "runs/benchmark-growth.png"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name: str, text: str, repeats: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if repeats:
            sub.add_argument("--repeats", type=int, default=repeats, help=f"runs that a median is taken of ({repeats})")
        return sub

    def preset_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--preset", default="bench-mid", help=f"random weights of {', '.join(PRESETS)} (bench-mid)")

    def model_options(sub: argparse.ArgumentParser) -> None:
        preset_option(sub)
        sub.add_argument("--model", metavar="DIR", help="a model's directory, instead of random weights")
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights (float32)")

    for name, (_, text) in MODELS.items():
        (preset_option if name == "train" else model_options)(command(name, text, 3))
    growth = command("growth", "a drawing at each size of picture, by part; writes a plot", 1)
    preset_option(growth)
    growth.add_argument("--sides", type=int, nargs="+", default=list(SCHEDULES), choices=SCHEDULES, help="pixels (all)")
    growth.add_argument("--plot", default=PLOT, metavar="FILE", help=f"picture to write ({PLOT})")
    backends = command("attention", "every backend of vargpt.kernels.attention", 7)
    backends.add_argument(
        "--sides",
        type=int,
        nargs="+",
        choices=SCHEDULES,
        help="of pictures, pixels: 256 512, on a GPU 1024 too, which on a CPU takes long, and tens of GB",
    )
    backends.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    backends.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, float32 on a CPU"
    )
    kernels = command(
        "kernels", "the CUDA kernels, without a GPU: registers, occupancy, counted work; exits with 1 over budget", 0
    )
    kernels.add_argument("--only", nargs="+", default=SOURCES, choices=SOURCES, help="some of them")
    preset_option(command("all", "all of these, with their defaults", 0))
    return parser


def run(options: argparse.Namespace) -> bool:
    """One subject; returns whether what has a budget keeps to it."""
    if options.what == "kernels":
        return benchmark_kernels(SCHEDULES[256], options.only)
    if options.what == "attention":
        attention(options)
        return True
    common = Options(
        preset=options.preset,
        model=getattr(options, "model", None),
        dtype=getattr(torch, getattr(options, "dtype", "float32")),
        repeats=options.repeats,
    )
    if options.what == "growth":
        benchmark_growth(common, options.sides, Path(options.plot)).show()
    else:
        MODELS[options.what][0](common).show()
    return True


def attention(options: argparse.Namespace) -> None:
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {options.repeats}")
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    sides = options.sides or [side for side in SCHEDULES if gpu or side < 1024]
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    benchmark_attention(sides, device, dtype, options.repeats)


def everything(parser: argparse.ArgumentParser, preset: str) -> bool:
    """Every subject, with its defaults. One that cannot run here says so, and the next one follows."""
    kept = True
    Options(preset=preset)  # an unknown name is a mistake once, not of every subject
    for what in (*MODELS, "growth", "attention", "kernels"):
        chosen = [] if what in ("attention", "kernels") else ["--preset", preset]
        try:
            kept &= run(parser.parse_args([what, *chosen]))
        except ValueError as error:
            print(f"not run: {what}: {' '.join(str(error).split())}")
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    kept = True

    def command() -> None:
        nonlocal kept
        kept = everything(parser, options.preset) if options.what == "all" else run(options)

    return exit_code(command) or int(not kept)


if __name__ == "__main__":
    sys.exit(main())
