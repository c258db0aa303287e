"""The drawing loop: one token map after the other, each from all that came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vargpt.interfaces import ImageTokenizer, TokenMaps, VisualDecoder
from vargpt.sampling import Guidance, Sampling, sample


@dataclass(frozen=True, kw_only=True)
class ScaleStep:
    """The state after one scale, handed to ``on_scale``."""

    scale: int
    schedule_length: int
    indices: Int[Tensor, "B N"]
    logits: Float[Tensor, "B N V"]
    f_hat: Float[Tensor, "B Z h w"]
    tokenizer: ImageTokenizer

    def images(self) -> Float[Tensor, "B 3 height width"]:
        """The pictures so far, in [-1, 1]. Decoded only when asked for: it costs as much as the scale itself."""
        return self.tokenizer.decode_latent(self.f_hat)


ScaleInputs = Callable[[int, Float[Tensor, "B N Z"] | None], Float[Tensor, "R N C"]]
"""Maps a scale and its next-scale input (None at scale 0) to what the visual decoder reads."""


@torch.no_grad()
def draw_scales(
    decoder: VisualDecoder,
    tokenizer: ImageTokenizer,
    inputs: ScaleInputs,
    condition: Float[Tensor, "R C"],
    *,
    generators: Sequence[torch.Generator],
    guidance: Guidance,
    sampling: Sampling,
    on_scale: Callable[[ScaleStep], None] | None = None,
) -> TokenMaps:
    """Draw B pictures scale by scale.

    Args:
        inputs: called once per scale. With guidance it returns R = 2B rows, B conditional ones and then B
            unconditional ones; with ``guidance.scale == 0`` just the R = B conditional ones.
        condition: R rows for the adaptive norms, in the same order.
        generators: one per picture.
        on_scale: called after every scale.
    """
    schedule = decoder.schedule
    if schedule != tokenizer.schedule:
        raise ValueError(
            f"the visual decoder draws scales {schedule.patch_nums}, "
            f"the image tokenizer reads {tokenizer.schedule.patch_nums}"
        )
    cache = decoder.new_cache(condition.shape[0])
    next_input, f_hat, index_maps = None, None, []
    for scale in range(len(schedule)):
        logits = decoder(inputs(scale, next_input), condition, cache=cache)
        if guidance.scale > 0:
            weight = guidance.weight(schedule, scale)
            conditional, unconditional = logits.chunk(2)
            logits = (1 + weight) * conditional - weight * unconditional
        indices = sample(logits, sampling, generators)
        f_hat = tokenizer.add_scale(scale, indices, f_hat)
        index_maps.append(indices)
        if scale + 1 < len(schedule):
            next_input = tokenizer.next_input(scale + 1, f_hat)
        if on_scale is not None:
            on_scale(
                ScaleStep(
                    scale=scale,
                    schedule_length=len(schedule),
                    indices=indices,
                    logits=logits,
                    f_hat=f_hat,
                    tokenizer=tokenizer,
                )
            )
    assert f_hat is not None
    return TokenMaps(indices=tuple(index_maps), f_hat=f_hat)
