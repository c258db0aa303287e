"""Drawing with small models: contexts, recorded drawings, and the same logits from one pass of teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tests.models import TOKENS, close
from vargpt.generate import Context, draw, pad_left
from vargpt.interfaces import TokenMaps
from vargpt.model import VARGPT, require
from vargpt.next_scale import ScaleStep
from vargpt.sampling import Guidance, Sampling, generators

CPU = torch.device("cpu")
ROOM = 64
SAMPLING = Sampling(temperature=1.2, top_k=8, top_p=0.9)

Prompt = list[int]
Null = Literal["noise", "class", "prompt"]


def read(model: VARGPT, rows: Sequence[Sequence[int]], room: int = ROOM) -> tuple[Context, Tensor]:
    """A context that has read the rows, and the hidden states."""
    ids, mask = pad_left(rows, TOKENS.pad, CPU)
    context = Context(require(model.llm, ""), len(rows), ids.shape[1] + room, CPU)
    with torch.no_grad():
        return context, context.extend_tokens(ids, mask)


def before_drawing(model: VARGPT, rows: Sequence[Prompt]) -> Context:
    return read(model, [[*row, TOKENS.gen_start] for row in rows])[0]


def empty_prompt(model: VARGPT, rows: int) -> Context:
    return before_drawing(model, [[TOKENS.bos]]).select(torch.zeros(rows, dtype=torch.long))


class Record:
    """The steps of one drawing."""

    def __init__(self) -> None:
        self.steps: list[ScaleStep] = []

    def __call__(self, step: ScaleStep) -> None:
        self.steps.append(step)

    @property
    def logits(self) -> Tensor:
        return torch.cat([step.logits for step in self.steps], dim=1)


def drawn(
    model: VARGPT,
    context: Context,
    first_seed: int = 0,
    *,
    null: Null = "class",
    cfg: float = 1.5,
    sampling: Sampling = SAMPLING,
    **options: Any,
) -> tuple[TokenMaps, Record]:
    record, rows = Record(), context.batch
    maps = draw(
        model,
        context,
        null=null,
        empty=empty_prompt(model, rows) if null == "prompt" else None,
        generators=generators(range(first_seed, first_seed + rows), CPU),
        guidance=Guidance(scale=cfg),
        sampling=sampling,
        on_scale=record,
        **options,
    )
    return maps, record


def same_maps(ours: TokenMaps, theirs: TokenMaps, rows: slice = slice(None)) -> None:
    assert all(torch.equal(a[rows], b) for a, b in zip(ours.indices, theirs.indices, strict=True))
    close(ours.f_hat[rows], theirs.f_hat)


def teacher_forced(model: VARGPT, rows: Sequence[Prompt], maps: TokenMaps, *, dropped: bool) -> Tensor:
    """Logits of drawn pictures, from one training forward without a cache."""
    total = require(model.var, "").schedule.total
    ids, mask = pad_left([[*row, TOKENS.gen_start, *[TOKENS.gen_pad] * total] for row in rows], TOKENS.pad, CPU)
    drop = torch.full((len(rows),), dropped)
    with torch.no_grad():
        logits = model(ids, draw_images=maps.indices, attention_mask=mask, drop_condition=drop).image_logits
    assert logits is not None
    return logits
