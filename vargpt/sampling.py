"""Choosing tokens from logits, and the guidance schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vargpt.scales import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from its logits: temperature, then top-k, then top-p. Temperature 0 takes the best."""

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k best tokens; 0 keeps all."""
    top_p: float = 1.0
    """Of those, keep the fewest whose probabilities add up to p."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): logits (1 + t) cond - t uncond.

    t grows linearly from 0 at the first scale to ``scale`` at the last (``ramp="linear"``, VAR), or is ``scale``
    throughout (``"constant"``). Scale 0 leaves the conditional logits alone.
    """

    scale: float = 1.5
    ramp: Literal["linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"cfg must be 0 (off) or more, not {self.scale}")
        if self.ramp not in ("linear", "constant"):
            raise ValueError(f"cfg ramp must be 'linear' or 'constant', not {self.ramp!r}")

    def weight(self, schedule: ScaleSchedule, scale: int) -> float:
        """t at one scale."""
        return self.scale * (schedule.position(scale) if self.ramp == "linear" else 1.0)


def generators(seeds: Sequence[int], device: torch.device | str) -> list[torch.Generator]:
    """One generator per row, so that a row's draw depends on its own seed and not on its neighbours."""
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must lie between -2^63 and 2^64 - 1, not {seed}")
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def sample(
    logits: Float[Tensor, "B N V"], sampling: Sampling, generators: Sequence[torch.Generator]
) -> Int[Tensor, "B N"]:
    """Draw a token for each of N positions of B rows, row b from ``generators[b]`` (greedy needs none)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if len(generators) != len(logits):
        raise ValueError(f"{len(generators)} generators for {len(logits)} rows: give one for each")
    logits = logits.float() / sampling.temperature
    # argmax(p / Exp(1) noise) is an exact draw from p, one pass over the vocabulary, without multinomial's limits.
    noise = torch.stack(
        [torch.empty(logits.shape[1:], device=logits.device).exponential_(generator=g) for g in generators]
    )
    vocabulary = logits.shape[-1]
    count = min(sampling.top_k or vocabulary, vocabulary)
    if count == vocabulary and sampling.top_p == 1:
        return (logits.softmax(-1) / noise).argmax(-1)
    best, tokens = _best(logits, count)
    if sampling.top_p < 1:
        # From the worst up: drop tokens while those dropped together weigh at most 1 - p; the best always stays.
        drop = best.softmax(-1).flip(-1).cumsum(-1).flip(-1) <= 1 - sampling.top_p
        drop[..., 0] = False
        best = best.masked_fill(drop, float("-inf"))
    choice = (best.softmax(-1) / noise.gather(-1, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(-1, choice)[..., 0]


def _best(logits: Float[Tensor, "B N V"], count: int) -> tuple[Float[Tensor, "B N K"], Int[Tensor, "B N K"]]:
    """The best logits and their tokens, best first: ``count`` of them, and all that equal the last of these.

    K is what the position with most equals needs; the others are filled up with -inf.
    """
    best, tokens = logits.topk(count, dim=-1)
    floor = best[..., -1:]
    most = int((logits >= floor).sum(-1).max()) if count < logits.shape[-1] else count
    if most == count:
        return best, tokens
    best, tokens = logits.topk(most, dim=-1)
    return best.masked_fill(best < floor, float("-inf")), tokens
