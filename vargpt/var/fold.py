"""Conditions that are known beforehand, folded into constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vargpt.var.layers import Block
from vargpt.var.model import NextScaleTransformer


class FoldedConditions(nn.Module):
    """The modulations of a few conditions, looked up instead of computed."""

    def __init__(self, conditions: Float[Tensor, "K C"], modulations: Sequence[Float[Tensor, "_ K 1 C"]]) -> None:
        super().__init__()
        self.register_buffer("conditions", conditions, persistent=False)
        for i, modulation in enumerate(modulations):
            self.register_buffer(f"modulation{i}", modulation, persistent=False)
        self._count = len(modulations)

    conditions: Tensor

    def forward(self, condition: Float[Tensor, "B C"]) -> list[Float[Tensor, "_ B 1 C"]]:
        same = (condition[:, None] == self.conditions).all(-1)
        if not bool(same.any(1).all()):
            raise ValueError("this visual decoder knows only the conditions it was folded for: fold these classes too")
        rows = same.int().argmax(1)
        return [self.get_buffer(f"modulation{i}")[:, rows] for i in range(self._count)]


@torch.no_grad()
def fold_conditions(var: NextScaleTransformer, classes: Sequence[int] | None = None) -> NextScaleTransformer:
    """Compute the adaptive norms' modulations of some classes once, and give up the Linears that made them.

    Those are a third of the weights (of the released decoder, 0.67 of 2.07 billion parameters), read again at every
    scale although they always say the same. The decoder is changed in place, and returned; it keeps all other names,
    but can neither be trained nor saved any more.

    Args:
        classes: by default the two that drawing uses, ``image_class`` and ``null_class``.

    Raises:
        ValueError: a decoder that is already folded.
    """
    if var.folded is not None:
        raise ValueError("this visual decoder is already folded: load it again to fold other classes")
    device = var.class_embed.weight.device
    rows = torch.tensor(classes if classes is not None else [var.image_class, var.null_class], device=device)
    conditions = var.condition(rows)
    var.folded = FoldedConditions(conditions, var.modulations(conditions))
    for block in var.blocks:
        assert isinstance(block, Block)
        if var.config.shared_adaln:
            del block.ada_offset
        else:
            del block.ada
    del var.shared_ada, var.head_ada
    return var
