"""Class-conditional drawing: the VAR of the original paper, without a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vargpt.interfaces import ImageTokenizer, TokenMaps
from vargpt.next_scale import ScaleStep, draw_scales
from vargpt.sampling import Guidance, Sampling, generators
from vargpt.var.model import NextScaleTransformer


def draw_classes(
    var: NextScaleTransformer,
    tokenizer: ImageTokenizer,
    labels: Sequence[int],
    *,
    seed: int = 0,
    guidance: Guidance = Guidance(scale=4.0),  # noqa: B008 (frozen)
    sampling: Sampling = Sampling(top_k=900, top_p=0.95),  # noqa: B008 (frozen)
    on_scale: Callable[[ScaleStep], None] | None = None,
) -> TokenMaps:
    """Draw one picture per label; picture i uses seed ``seed + i``.

    Raises:
        ValueError: no label, or one outside 0 .. num_classes - 1.
    """
    if not labels:
        raise ValueError("there is nothing to draw: labels is empty")
    for label in labels:
        if not 0 <= label < var.config.num_classes:
            raise ValueError(f"label {label} is not one of the {var.config.num_classes} classes")
    device = var.head.weight.device
    classes = torch.tensor(labels, device=device)
    if guidance.scale > 0:
        classes = torch.cat((classes, torch.full_like(classes, var.null_class)))
    condition = var.condition(classes)
    copies = len(classes) // len(labels)

    def inputs(scale: int, next_input: Float[Tensor, "B N Z"] | None) -> Float[Tensor, "R N C"]:
        rows = None if next_input is None else next_input.repeat(copies, 1, 1)
        return var.embed_scale(scale, rows, condition)

    return draw_scales(
        var,
        tokenizer,
        inputs,
        condition,
        generators=generators([seed + i for i in range(len(labels))], device),
        guidance=guidance,
        sampling=sampling,
        on_scale=on_scale,
    )
