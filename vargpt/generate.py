"""Text loop, drawing and the interleaved loop. Tensors in, tensors out: no files, no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vargpt.choices import NullBranch
from vargpt.interfaces import Cache, LanguageModel, TokenMaps
from vargpt.model import VARGPT, require
from vargpt.next_scale import ScaleStep, draw_scales
from vargpt.sampling import GREEDY, Guidance, Sampling, sample


class Context:
    """A batch of conversations as the language model holds them: its cache, and which tokens are padding."""

    def __init__(self, llm: LanguageModel, batch: int, capacity: int, device: torch.device) -> None:
        self.llm = llm
        self.cache: Cache = llm.new_cache(batch, capacity)
        self.mask = torch.ones(batch, 0, dtype=torch.bool, device=device)

    @property
    def batch(self) -> int:
        return self.mask.shape[0]

    def extend(
        self, x_BTD: Float[Tensor, "B T D"], mask_BT: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Read more tokens; returns their hidden states."""
        new = torch.ones_like(x_BTD[..., 0], dtype=torch.bool) if mask_BT is None else mask_BT
        self.mask = torch.cat((self.mask, new), dim=1)
        # Rows without padding need no mask, and attention without a mask is faster.
        mask = None if bool(self.mask.all()) else self.mask
        return self.llm(x_BTD, attention_mask=mask, cache=self.cache)

    def extend_tokens(self, ids_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"] | None = None) -> Tensor:
        return self.extend(self.llm.embed(ids_BT), mask_BT)

    def select(self, rows: Int[Tensor, " R"]) -> Context:
        """A copy whose row i continues row ``rows[i]``."""
        new = object.__new__(Context)
        new.llm, new.cache, new.mask = self.llm, self.cache.select(rows), self.mask[rows]
        return new


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows of different lengths as one batch: ids and mask, padding first so that all rows end together."""
    longest = max(len(row) for row in rows)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """One generated reply."""

    ids: list[int]
    """Without the token that stopped it."""
    stop: int | None
    """The token that stopped it; None at the length limit, or when ``on_token`` asked for it."""


@torch.no_grad()
def generate_text(
    model: VARGPT,
    context: Context,
    hidden: Float[Tensor, "B T D"],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    forbid: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    generators: Sequence[torch.Generator] = (),
    on_token: Callable[[int, int], bool] | None = None,
) -> list[TextRow]:
    """Continue a batch of conversations, token by token.

    Args:
        context: what has been read; it is extended by what is generated (not by the stopping token).
        hidden: hidden states of what was read last.
        stop: tokens that end a row; forbid: tokens that are never chosen.
        sampling, generators: how to choose; one generator per row unless greedy.
        on_token: called with (row, token) after every choice; returning True ends that row after it.
    """
    llm = require(model.llm, "language model")
    rows: list[list[int]] = [[] for _ in range(context.batch)]
    stopped: list[int | None] = [None] * context.batch
    active = [True] * context.batch
    last = hidden[:, -1]
    for step in range(max_new_tokens):
        logits = llm.logits(last).float()
        if forbid:
            logits[:, list(forbid)] = float("-inf")
        chosen = sample(logits[:, None], sampling, generators)[:, 0].tolist()
        for row, token in enumerate(chosen):
            if active[row] and token in stop:
                active[row], stopped[row] = False, token
            elif active[row]:
                rows[row].append(token)
        fed = torch.tensor(active, device=last.device)
        if on_token is not None:
            for row, token in enumerate(chosen):
                if active[row] and on_token(row, token):
                    active[row] = False
        if not any(active) or step + 1 == max_new_tokens:
            # The last tokens still belong to the conversation that may go on from here.
            if fed.any():
                context.extend_tokens(torch.tensor(chosen, device=last.device)[:, None], fed[:, None])
            break
        last = context.extend_tokens(torch.tensor(chosen, device=last.device)[:, None], fed[:, None])[:, -1]
    return [TextRow(ids=ids, stop=token) for ids, token in zip(rows, stopped, strict=True)]


Noise = Callable[[int, torch.Size], Tensor]
"""Maps a scale and the shape of the language model's states to the noise that replaces them."""


@torch.no_grad()
def draw(
    model: VARGPT,
    context: Context,
    *,
    null: NullBranch | None = None,
    empty: Context | None = None,
    generators: Sequence[torch.Generator],
    guidance: Guidance,
    sampling: Sampling,
    on_scale: Callable[[ScaleStep], None] | None = None,
    noise: Noise | None = None,
) -> TokenMaps:
    """Draw one picture per row of a context that has just read ``image_gen_start``.

    The L image tokens pass through the language model, whose context is extended by them, and then through the
    visual decoder, scale by scale.

    Args:
        null: the unconditional branch; the model's own choice by default.
        empty: for ``null="prompt"``, a context of as many rows that has read the empty prompt.
        generators: one per row; they draw the tokens and, for ``null="noise"``, the noise.
        noise: for ``null="noise"``, replaces the generators' noise (recorded noise, in tests).
    """
    var, gen_in = require(model.var, "visual decoder"), require(model.gen_in, "generation projector")
    vqvae, gen_out = require(model.vqvae, "image tokenizer"), require(model.gen_out, "generation projector")
    null = model.choices.null if null is None else null
    if null not in get_args(NullBranch):
        raise ValueError(f"null must be 'noise', 'class' or 'prompt', not {null!r}")
    guided, batch = guidance.scale > 0, context.batch
    unconditional = None
    if guided and null == "class":
        unconditional = context.select(torch.arange(batch, device=model.device))
    elif guided and null == "prompt":
        if empty is None or empty.batch != batch:
            raise ValueError('null="prompt" needs a context of the empty prompt, with as many rows')
        unconditional = empty
    elif guided and noise is None and len(generators) != batch:
        raise ValueError(f'null="noise" needs a generator for each of {batch} rows, not {len(generators)}')

    image_class = var.image_class if model.choices.condition_class == "image" else var.null_class
    classes = torch.full((batch,), image_class, device=model.device)
    condition = var.condition(classes)
    null_condition = var.condition(torch.full_like(classes, var.null_class))

    def inputs(scale: int, next_input: Tensor | None) -> Tensor:
        states = context.extend(gen_in(var.embed_scale(scale, next_input, condition)))
        if not guided:
            return gen_out(states)
        if unconditional is not None:
            null_states = unconditional.extend(gen_in(var.embed_scale(scale, next_input, null_condition)))
        elif noise is not None:
            null_states = noise(scale, states.shape)
        else:
            rows = [torch.randn(states.shape[1:], generator=g, device=states.device) for g in generators]
            null_states = torch.stack(rows).to(states.dtype)
        return gen_out(torch.cat((states, null_states)))

    return draw_scales(
        var,
        vqvae,
        inputs,
        torch.cat((condition, null_condition)) if guided else condition,
        generators=generators,
        guidance=guidance,
        sampling=sampling,
        on_scale=on_scale,
    )


def read_token(context: Context, token: int) -> Float[Tensor, "B 1 D"]:
    """Let every row read the same token."""
    return context.extend_tokens(torch.full((context.batch, 1), token, device=context.mask.device))
