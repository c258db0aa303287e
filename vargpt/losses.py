"""The two losses of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vargpt.interfaces import LanguageModel

IGNORE = -100
"""Label of a position that is not supervised."""


def next_token_loss(
    llm: LanguageModel, hidden: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Cross-entropy of every supervised token given all before it; nats per token.

    Logits are computed at supervised positions only: they are the widest tensors of training.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    if not supervised.any():
        return hidden.sum() * 0.0  # keeps the graph whole for batches without text to learn
    return F.cross_entropy(llm.logits(hidden[:, :-1][supervised]).float(), targets[supervised])


def next_scale_loss(logits: Float[Tensor, "B L V"], indices: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, ""]:
    """Cross-entropy of every image token given all smaller scales; nats per token. Not shifted: the input at a
    position is what is known before its own scale."""
    return F.cross_entropy(logits.flatten(0, 1).float(), torch.cat(tuple(indices), dim=1).flatten())
