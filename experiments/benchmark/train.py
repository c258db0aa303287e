"""One training step on one drawing: forward pass, backward pass, optimizer."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from experiments.benchmark.cases import DRAWING, WHOLE, Clock, Options, Spent, Table, random_model
from experiments.benchmark.counting import BACKWARD, FORWARD, OPTIMIZER, Sizes, training_step
from experiments.benchmark.memory import training_memory, weights
from experiments.data.chat import Example, collate
from experiments.optimization import optimizers
from experiments.train import forward, recompute_blocks
from vargpt.config import VargptConfig
from vargpt.kernels import using
from vargpt.losses import IGNORE
from vargpt.model import require
from vargpt.text import IMAGE_GEN

PLAIN, USUAL, RECOMPUTED = "plain: sdpa with a mask", "as it trains", "recomputing blocks"
LONGEST = 256
"""More tokens of text than there are: they are counted where they are read."""


def benchmark_train(options: Options) -> Table:
    """A step in float32 on a drawing whose image tokens are known (they are computed once): plain, as experiments.train
    does it, and with ``recompute``, which keeps fewer activations. Memory is also a share of the plain step's."""
    table, config = Table("train", options), options.config(*DRAWING)
    trained = weights(config, "llm", "var", "gen_in", "gen_out")
    plain = None
    for case in (PLAIN, USUAL, RECOMPUTED):
        needed = training_memory(config, text=LONGEST)
        if (found := table.run(case, needed, measure, config, case, options.repeats)) is not None:
            spent, machine = found
            floors = training_step(config, trained=trained, size=options.size, **spent.facts)
            plain = plain or spent.peaks[WHOLE]
            table.add(case, spent, machine, floors, **{"memory to plain": spent.peaks[WHOLE] / plain})
    return table


def measure(config: VargptConfig, case: str, repeats: int) -> Spent:
    """In a process of its own: steps of AdamW on everything but the image tokenizer."""
    model, clock = random_model(config).train(), Clock()
    vqvae = require(model.vqvae, "image tokenizer")
    assert isinstance(vqvae, nn.Module)
    vqvae.eval().requires_grad_(False)
    if case == RECOMPUTED:
        recompute_blocks(model)
    adamw = optimizers(model, muon=False, weight_decay=0.05)["adamw"]
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = collate(model, [_example(config)])

    def step() -> None:
        adamw.zero_grad(set_to_none=True)
        with clock.part(FORWARD):
            loss = forward(model, batch).loss
        assert loss is not None
        with clock.part(BACKWARD):
            loss.backward()
        with clock.part(OPTIMIZER):
            nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()

    with using("sdpa") if case == PLAIN else nullcontext():
        clock.run(step, repeats)
    everything = model.choices.supervise_drawing_prompts
    labels = batch.input_ids if everything else batch.labels
    words = (labels != IGNORE) & (batch.input_ids != model.tokens.gen_pad)
    return clock.spent(tokens=batch.input_ids.shape[1], supervised=int(words[:, 1:].sum()))


def _example(config: VargptConfig) -> Example:
    """A request, and a drawing of any codes."""
    c, generator = Sizes.of(config).vqvae, torch.Generator().manual_seed(0)
    maps = tuple(torch.randint(c.vocab_size, (side * side,), generator=generator) for side in c.patch_nums)
    messages = [{"role": "user", "content": "a red circle"}, {"role": "assistant", "content": IMAGE_GEN}]
    return Example(messages=messages, drawings=[maps])
