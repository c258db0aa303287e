"""The image tokenizer alone: one picture to tokens and back, in the memory formats of its convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from experiments.benchmark.cases import WHOLE, Clock, Options, Spent, Table, stored
from experiments.benchmark.counting import Work, smoothing, tokenizer_work
from experiments.benchmark.memory import PROCESS, tokenizer_memory, weights
from vargpt.checkpoint import load
from vargpt.model import require

FORMATS: dict[str, torch.memory_format | None] = {
    "as loaded": None,
    "contiguous": torch.contiguous_format,
    "channels last": torch.channels_last,
}
"""Of the weights; activations follow theirs, unless the tokenizer itself says otherwise."""
Job = Literal["encode", "decode"]


def benchmark_tokenizer(options: Options) -> Table:
    """One picture encoded and one decoded, weights in every format."""
    table, config, o = Table("tokenizer", options), options.config("vqvae"), options
    c = require(config.vqvae, "image tokenizer")
    jobs: dict[Job, list[Work]] = {
        "encode": tokenizer_work(c, "encode", 1, o.size),
        "decode": tokenizer_work(c, "decode", 1, o.size) + smoothing(c, 1, o.size),
    }
    needed = PROCESS + o.size * weights(config) + tokenizer_memory(c, batch=1)
    with stored(options, config) as folder:
        for job, works in jobs.items():
            for name in FORMATS:
                case = f"{job}, {name}"
                if (found := table.run(case, needed, measure, folder, o.dtype, job, name, o.repeats)) is not None:
                    table.add(case, *found, {WHOLE: works})
    return table


@torch.no_grad()
def measure(folder: Path, dtype: torch.dtype, job: Job, name: str, repeats: int) -> Spent:
    """In a process of its own: one job in one format."""
    model = load(folder, dtype=dtype)
    vqvae = require(model.vqvae, "image tokenizer")
    if (chosen := FORMATS[name]) is not None:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=chosen)
    generator, side = torch.Generator().manual_seed(0), vqvae.image_size
    picture = torch.rand(1, 3, side, side, generator=generator).to(dtype) * 2 - 1
    maps = [torch.randint(vqvae.vocab_size, (1, n), generator=generator) for n in vqvae.schedule.lengths]
    clock = Clock()
    clock.run(lambda: vqvae.encode(picture) if job == "encode" else vqvae.decode(maps), repeats)
    return clock.spent()
