"""Drawing: seconds and memory of every part, for one picture and for several of one prompt."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments.benchmark.cases import DRAWING, Clock, Options, Spent, Table, stored
from experiments.benchmark.counting import DECODING, LLM, REST, VAR, drawing
from experiments.benchmark.memory import drawing_memory
from vargpt.api import draw, encode_messages
from vargpt.checkpoint import load
from vargpt.config import VargptConfig
from vargpt.sampling import Guidance

PROMPT = "a red circle"
BATCHES = (1, 4)
GUIDANCE = Guidance()
LONGEST = 256
"""More tokens than the prompt has: they are counted where it is read."""


def benchmark_draw(options: Options) -> Table:
    """Pictures at the defaults of ``vargpt.draw``, one and four of one prompt; times and floors are a picture's."""
    table, config = Table("draw", options), options.config(*DRAWING)
    with stored(options, config) as folder:
        for batch in BATCHES:
            add_drawing(table, f"batch {batch}, a picture", config, folder, batch)
    return table


def add_drawing(table: Table, case: str, config: VargptConfig, folder: Path, batch: int) -> None:
    """Measure one case, or say in the table why it is not."""
    o = table.options
    needed = drawing_memory(config, batch=batch, prompt=LONGEST, size=o.size)
    if (found := table.run(case, needed, measure, folder, o.dtype, batch, o.repeats)) is not None:
        spent, machine = found
        floors = drawing(config, batch=batch, guidance=GUIDANCE, size=o.size, **spent.facts)
        table.add(case, spent, machine, floors, share=1 / batch)


def measure(folder: Path, dtype: torch.dtype, batch: int, repeats: int) -> Spent:
    """In a process of its own: draw, with every part's calls watched."""
    model, clock = load(folder, dtype=dtype), Clock()
    clock.watch(LLM, model.llm, "forward")
    clock.watch(VAR, model.var, "forward")
    clock.watch(DECODING, model.vqvae, "decode_latent")
    clock.run(lambda: draw(model, [PROMPT], n=batch), repeats)
    prompt, empty = (
        1 + len(encode_messages(model, [{"role": "user", "content": text}], may_be_empty=True)[0])
        for text in (PROMPT, "")
    )
    return clock.spent(rest=REST, prompt=prompt, empty=empty)
