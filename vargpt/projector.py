"""Projectors: the small networks that join parts of different widths."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


class MLPProjector(nn.Module):
    """Linear layers with GELU (erf) between them, token by token. Satisfies ``Projector``.

    Args:
        in_width, hidden, out_width: widths before, inside and after.
        depth: number of Linear layers; 1 has no nonlinearity.
        norm: begin with a layer norm.
    """

    def __init__(self, in_width: int, hidden: int, out_width: int, *, depth: int = 2, norm: bool = False) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a projector needs at least one layer, not {depth}")
        widths = [in_width] + [hidden] * (depth - 1) + [out_width]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for a, b in pairwise(widths[1:]):
            layers += [nn.GELU(), nn.Linear(a, b)]
        self.norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "*rows A"]) -> Float[Tensor, "*rows E"]:
        return self.layers(self.norm(x))
