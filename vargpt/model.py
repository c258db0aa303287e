"""The whole model: five parts and three projectors, injected and composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vargpt.choices import FIXED, Choices, TokenIds
from vargpt.interfaces import (
    ImageTokenizer,
    LanguageModel,
    Projector,
    VisionEncoder,
    VisualDecoder,
    teacher_forcing_inputs,
)
from vargpt.losses import IGNORE, next_scale_loss, next_token_loss
from vargpt.text import Tokenizer

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class VargptOutput:
    """What a training or teacher-forced forward gives."""

    hidden: Float[Tensor, "B T D"]
    """Final hidden states of the language model."""
    llm: LanguageModel = field(repr=False)
    image_logits: Float[Tensor, "G L X"] | None
    """Logits of the G drawings' tokens, against their own (unshifted) indices."""
    loss: Float[Tensor, ""] | None
    """text_loss + image_loss, of those that apply."""
    text_loss: Float[Tensor, ""] | None
    image_loss: Float[Tensor, ""] | None

    @property
    def text_logits(self) -> Float[Tensor, "B T V"]:
        """Logits at every position, computed when asked for: they are wide, and the loss needs few of them."""
        return self.llm.logits(self.hidden)


class VARGPT(nn.Module):
    """Understands pictures by next-token prediction and draws them by next-scale prediction (arXiv 2501.12327).

    Any part may be left out; a job that needs it then says so. Parts are anything that satisfies the Protocols of
    ``vargpt.interfaces``.

    Args:
        llm, vision, projector: understanding: vision features, projected, take the place of ``<image>`` tokens.
        var, vqvae, gen_in, gen_out: drawing: ``gen_in`` brings the visual decoder's inputs to the language model,
            ``gen_out`` its hidden states back.
        tokens: numbers of the special tokens.
        choices: the published code's choices or corrected ones.
        tokenizer: text to token numbers; only the functions that read text need it.
        config: what the parts were built from; only saving needs it.
    """

    def __init__(
        self,
        *,
        llm: LanguageModel | None = None,
        vision: VisionEncoder | None = None,
        projector: Projector | None = None,
        var: VisualDecoder | None = None,
        vqvae: ImageTokenizer | None = None,
        gen_in: Projector | None = None,
        gen_out: Projector | None = None,
        tokens: TokenIds = TokenIds(),
        choices: Choices = FIXED,
        tokenizer: Tokenizer | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.llm, self.vision, self.projector = llm, vision, projector
        self.var, self.vqvae, self.gen_in, self.gen_out = var, vqvae, gen_in, gen_out
        self.tokens, self.choices = tokens, choices
        self.tokenizer, self.config = tokenizer, config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def image_features(self, pixel_values: Float[Tensor, "I 3 height width"]) -> Float[Tensor, "I P D"]:
        """Pictures to understand, as the language model reads them."""
        vision = require(self.vision, "vision encoder")
        return require(self.projector, "projector")(vision(pixel_values))

    def prompt_embeddings(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "I 3 height width"] | None = None,
        drawings: Float[Tensor, "G L D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Token embeddings, with pictures in the place of their placeholder tokens.

        Args:
            pixel_values: the pictures to understand, of all rows, in the order of their P ``<image>`` tokens each.
            drawings: :meth:`drawing_inputs` of the pictures drawn, in the order of their L ``gen_pad`` tokens each.

        Raises:
            ValueError: placeholders and pictures do not match in number.
        """
        x = require(self.llm, "language model").embed(input_ids)
        features = None if pixel_values is None else self.image_features(pixel_values)
        x = fill(x, input_ids == self.tokens.image, features, "<image>")
        return fill(x, input_ids == self.tokens.gen_pad, drawings, "image_gen_pad")

    def drawing_inputs(
        self, indices: Sequence[Int[Tensor, "G _"]], condition: Float[Tensor, "G C"]
    ) -> Float[Tensor, "G L D"]:
        """Known pictures as the language model reads them: inputs of every scale, through ``gen_in``."""
        var, vqvae = require(self.var, "visual decoder"), require(self.vqvae, "image tokenizer")
        inputs = (None, *teacher_forcing_inputs(vqvae, indices))
        x = torch.cat([var.embed_scale(scale, x, condition) for scale, x in enumerate(inputs)], dim=1)
        return require(self.gen_in, "generation projector")(x)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "I 3 height width"] | None = None,
        draw_images: Float[Tensor, "G 3 side side"] | Sequence[Int[Tensor, "G _"]] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        attention_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | None = None,
        *,
        drop_condition: Bool[Tensor, " G"] | None = None,
    ) -> VargptOutput:
        """One teacher-forced pass over text, pictures to understand and pictures to draw.

        Args:
            input_ids: a picture to understand stands as P ``<image>`` tokens, a drawing as L ``gen_pad`` tokens.
            pixel_values: the I pictures to understand, in the order of their placeholders.
            draw_images: the G drawings in the order of their placeholders: pictures in [-1, 1], or their index maps.
            labels: the token numbers to learn, -100 elsewhere. Drawings' placeholders are never text to learn.
            attention_mask: false (or 0) at padding.
            drop_condition: drawings that learn from the "no condition" class (one in ten, in the published training).

        Raises:
            ValueError: placeholders and pictures do not match in number, or a part is missing.
        """
        llm = require(self.llm, "language model")
        attention_mask = None if attention_mask is None else attention_mask.bool()
        places = input_ids == self.tokens.gen_pad
        indices, condition, drawings = (), None, None
        if draw_images is not None:
            indices = self._index_maps(draw_images)
            condition = self._training_condition(len(indices[0]), drop_condition)
            drawings = self.drawing_inputs(indices, condition)
            if pixel_values is not None and not self.choices.scatter_in_mixed_batches:
                drawings = llm.embed(input_ids.new_full(drawings.shape[:2], self.tokens.gen_pad))
        x = self.prompt_embeddings(input_ids, pixel_values, drawings)
        hidden = llm(x, attention_mask=attention_mask)

        image_logits = image_loss = text_loss = None
        if condition is not None:
            var, gen_out = require(self.var, "visual decoder"), require(self.gen_out, "generation projector")
            states = hidden[places].view(len(condition), -1, hidden.shape[-1])
            image_logits = var(gen_out(states), condition)
            image_loss = next_scale_loss(image_logits, indices)
        if labels is not None:
            if draw_images is not None and self.choices.supervise_drawing_prompts:
                labels = input_ids
            ignored = places if attention_mask is None else places | ~attention_mask
            text_loss = next_token_loss(llm, hidden, labels.masked_fill(ignored, IGNORE))
        losses = [loss for loss in (text_loss, image_loss) if loss is not None]
        return VargptOutput(
            hidden=hidden,
            llm=llm,
            image_logits=image_logits,
            loss=torch.stack(losses).sum() if losses else None,
            text_loss=text_loss,
            image_loss=image_loss,
        )

    @torch.no_grad()
    def _index_maps(self, draw_images: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        if isinstance(draw_images, Tensor):
            return require(self.vqvae, "image tokenizer").encode(draw_images).indices
        return tuple(draw_images)

    def _training_condition(self, drawings: int, drop: Tensor | None) -> Tensor:
        var = require(self.var, "visual decoder")
        classes = torch.full((drawings,), var.image_class, device=self.device)
        if drop is not None:
            classes = classes.masked_fill(drop, var.null_class)
        return var.condition(classes)


def require(part: Part | None, name: str) -> Part:
    """The part, or one line that says what this model cannot do.

    Raises:
        ValueError: the model was built without it.
    """
    if part is None:
        raise ValueError(f"this model has no {name}, which the request needs: load a model that has one")
    return part


def fill(
    x: Float[Tensor, "B T D"], places: Bool[Tensor, "B T"], features: Float[Tensor, "I P D"] | None, token: str
) -> Float[Tensor, "B T D"]:
    """``x`` with the features, in order, at the places.

    Raises:
        ValueError: there are more or fewer places than features.
    """
    wanted = int(places.sum())
    given, each = (0, 0) if features is None else features.shape[:2]
    if wanted != given * each:
        raise ValueError(f"{wanted} {token} tokens do not match {given} pictures of {each} tokens each")
    return x if features is None else x.masked_scatter(places[..., None], features.to(x.dtype))
