"""The interfaces that join the parts: axis legend, Protocols, and the results that cross them.

Axis legend, used in names and in shapes everywhere:

    B  batch              T  text tokens (or any tokens of the language model)
    S  scales             L  image tokens of all scales      N  image tokens of one scale
    D  language width     C  visual-decoder width            W  vision width
    H  heads              K  head width                      M  keys (cached and new)
    V  vocabulary         P  patches                         Z  latent channels

A part is anything that satisfies its Protocol: nothing here or above asks for a base class. The sampler and
the whole model see these Protocols only, so a part can be replaced by a few lines in a test or a script.
Sizes of the parts are plain attributes; a part that learns is also a ``torch.nn.Module``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor

from vargpt.scales import ScaleSchedule


@runtime_checkable
class Cache(Protocol):
    """What a decoder remembers of the tokens it has seen. Opaque to everyone but the decoder that made it."""

    def select(self, rows: Int[Tensor, " R"]) -> Cache:
        """A copy whose row i is row ``rows[i]``: several continuations of one prompt share its first pass."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """A causal decoder from embeddings to final hidden states, with logits on request."""

    @property
    def width(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Most tokens (text, patches and image tokens together) that a row may hold."""
        ...

    def embed(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]: ...

    def new_cache(self, batch: int, length: int) -> Cache:
        """Room for ``length`` tokens of ``batch`` rows."""
        ...

    def __call__(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        attention_mask: Bool[Tensor, "B M"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm. ``attention_mask`` covers cached and new tokens and is false at
        padding, left or right; positions count real tokens only."""
        ...

    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]: ...


@runtime_checkable
class VisionEncoder(Protocol):
    """Pictures to patch features, with the preprocessing its weights were trained with."""

    @property
    def width(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Features per picture (P)."""
        ...

    def preprocess(self, image: Image) -> Float[Tensor, "3 height width"]: ...

    def __call__(self, pixel_values: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B P W"]: ...


@runtime_checkable
class Projector(Protocol):
    """A map between the widths of two parts, token by token."""

    def __call__(self, x: Float[Tensor, "*rows A"]) -> Float[Tensor, "*rows E"]: ...


@runtime_checkable
class VisualDecoder(Protocol):
    """The next-scale transformer: it predicts all the tokens of a scale from all earlier scales."""

    @property
    def schedule(self) -> ScaleSchedule: ...

    @property
    def width(self) -> int: ...

    @property
    def image_class(self) -> int:
        """The class row that stands for "a picture" where the prompt says which."""
        ...

    @property
    def null_class(self) -> int:
        """The class row that stands for "no condition"."""
        ...

    def condition(self, classes: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
        """The vector that steers every block."""
        ...

    def embed_scale(
        self, scale: int, next_input: Float[Tensor, "B N Z"] | None, condition: Float[Tensor, "B C"]
    ) -> Float[Tensor, "B N C"]:
        """Inputs of one scale; the first has no ``next_input``, its tokens start from the condition."""
        ...

    def new_cache(self, batch: int) -> Cache: ...

    def __call__(
        self, x_BLC: Float[Tensor, "B L C"], condition: Float[Tensor, "B C"], *, cache: Cache | None = None
    ) -> Float[Tensor, "B L V"]:
        """Logits: of all scales at once (block-causal), or of the scale after those in ``cache``."""
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """Pictures in [-1, 1] to one token map per scale, and back."""

    @property
    def schedule(self) -> ScaleSchedule: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def image_size(self) -> int:
        """Side of the square pictures, in pixels."""
        ...

    def encode(self, images: Float[Tensor, "B 3 height width"]) -> TokenMaps: ...

    def decode(self, indices: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "B 3 height width"]: ...

    def decode_latent(self, f_hat: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 height width"]: ...

    def add_scale(
        self, scale: int, indices: Int[Tensor, "B N"], f_hat: Float[Tensor, "B Z h w"] | None
    ) -> Float[Tensor, "B Z h w"]:
        """The running latent with one more scale in it (``None``: nothing drawn yet)."""
        ...

    def next_input(self, scale: int, f_hat: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B N Z"]:
        """What the visual decoder reads at ``scale``: the running latent, area-averaged to that scale."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenMaps:
    """A tokenized picture: S index maps, and the latent they add up to."""

    indices: tuple[Int[Tensor, "B _"], ...]
    f_hat: Float[Tensor, "B Z h w"]


@torch.no_grad()
def teacher_forcing_inputs(
    tokenizer: ImageTokenizer, indices: Sequence[Int[Tensor, "B _"]]
) -> tuple[Float[Tensor, "B _ Z"], ...]:
    """Inputs of scales 1 .. S-1 when the true tokens of every earlier scale are known.

    No gradient: what predicts a picture's tokens does not change what they mean.
    """
    f_hat, inputs = None, []
    for scale, index_map in enumerate(indices[:-1]):
        f_hat = tokenizer.add_scale(scale, index_map, f_hat)
        inputs.append(tokenizer.next_input(scale + 1, f_hat))
    return tuple(inputs)
