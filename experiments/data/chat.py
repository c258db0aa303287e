"""Conversations as training batches: text, pictures to understand and pictures to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor

from experiments.data.shapes import Split
from vargpt.interfaces import ImageTokenizer
from vargpt.losses import IGNORE
from vargpt.model import VARGPT, require
from vargpt.text import IMAGE, IMAGE_GEN, TEMPLATES

Kind = Literal["drawing", "question", "text"]
"""What a conversation teaches: to draw, to answer about a picture, or to answer without one."""

Drawing = Float[Tensor, "3 side side"] | tuple[Int[Tensor, " _"], ...]
"""A picture to draw: in [-1, 1], of the image tokenizer's size, or its index maps, one per scale."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation. ``<image>`` in its texts stands for the next picture to understand, ``<image_gen>`` for the
    next one to draw (the published form of records)."""

    messages: Sequence[Mapping[str, str]]
    images: Sequence[Image] = ()
    drawings: Sequence[Drawing] = ()


class ConversationSource(Protocol):
    """Examples that follow from their number alone."""

    def kinds(self) -> Mapping[Kind, float]:
        """The kinds of example that it has, and each one's share of them."""
        ...

    def example(self, kind: Kind, seed: int, index: int, split: Split) -> Example:
        """Example ``index`` of its kind and split, one of those in :meth:`kinds`."""
        ...


class Mixture:
    """Examples of several sources, each drawn in proportion to its weight among the sources that have its kind."""

    def __init__(self, sources: Sequence[ConversationSource], weights: Sequence[float]) -> None:
        self._sources, self._weights = sources, weights

    def kinds(self) -> Mapping[Kind, float]:
        shares: dict[Kind, float] = {}
        for source, weight in zip(self._sources, self._weights, strict=True):
            for kind, share in source.kinds().items():
                shares[kind] = shares.get(kind, 0.0) + share * weight / sum(self._weights)
        return shares

    def example(self, kind: Kind, seed: int, index: int, split: Split) -> Example:
        having = [i for i, source in enumerate(self._sources) if kind in source.kinds()]
        random = Random(f"mixture {kind} {split} {seed} {index}")
        chosen = random.choices(having, [self._weights[i] for i in having])[0]
        return self._sources[chosen].example(kind, seed, index, split)

    def any_example(self, seed: int, index: int) -> tuple[Kind, Example]:
        """An example to train on, of any source in proportion to its weight, and of any kind as often as it has it."""
        random = Random(f"mixture {seed} {index}")
        source = random.choices(self._sources, self._weights)[0]
        shares = source.kinds()
        kind = random.choices(list(shares), list(shares.values()))[0]
        return kind, source.example(kind, seed, index, "train")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What ``VARGPT.forward`` reads."""

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    pixel_values: Float[Tensor, "I 3 height width"] | None
    drawings: tuple[Int[Tensor, "G _"], ...] | None
    """Index maps."""
    drop_condition: Bool[Tensor, " G"] | None = field(default=None)


def collate(model: VARGPT, examples: Sequence[Example], *, dropped: Sequence[bool] = ()) -> Batch:
    """Examples as one batch, padded on the right; only the assistant's words are labels.

    Args:
        dropped: examples whose drawings learn without condition.

    Raises:
        ValueError: placeholders and pictures of an example that do not match in number.
    """
    tokenizer, t = require(model.tokenizer, "tokenizer"), model.tokens
    template = TEMPLATES[model.choices.training_template]
    drawn = "".join(tokenizer.names[i] for i in (t.gen_start, t.gen_pad, t.gen_end)) if t.gen_start >= 0 else ""
    counts = {
        t.image: model.vision.num_tokens if model.vision is not None else 1,
        t.gen_pad: model.var.schedule.total if model.var is not None else 1,
    }
    rows: list[tuple[list[int], list[int]]] = []
    for example in examples:
        text = "".join(message["content"] for message in example.messages)
        for mark, pictures in ((IMAGE, example.images), (IMAGE_GEN, example.drawings)):
            if text.count(mark) != len(pictures):
                raise ValueError(
                    f"{text.count(mark)} {mark} marks do not match {len(pictures)} pictures: {text[:80]!r}"
                )
        messages = [{**m, "content": m["content"].replace(IMAGE_GEN, drawn)} for m in example.messages]
        encoded = template.encode(tokenizer, messages)
        ids, labels = [], []
        for token, supervised in zip(encoded.ids, encoded.supervised, strict=True):
            copies = counts.get(token, 1)
            ids += [token] * copies
            labels += [token if supervised else IGNORE] * copies
        rows.append((ids, labels))
    longest = max(len(ids) for ids, _ in rows)
    pad = max(t.pad, 0)
    images = [image for example in examples for image in example.images]
    drawings = [drawing for example in examples for drawing in example.drawings]
    drops = [drop for example, drop in zip(examples, dropped, strict=False) for _ in example.drawings]
    device = model.device
    return Batch(
        input_ids=torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows], device=device),
        labels=torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in rows], device=device),
        attention_mask=torch.tensor([[i < len(ids) for i in range(longest)] for ids, _ in rows], device=device),
        pixel_values=torch.stack([require(model.vision, "vision encoder").preprocess(i) for i in images]).to(device)
        if images
        else None,
        drawings=index_maps(require(model.vqvae, "image tokenizer"), drawings, device) if drawings else None,
        drop_condition=torch.tensor(drops, device=device) if drops else None,
    )


@torch.no_grad()
def index_maps(
    tokenizer: ImageTokenizer, drawings: Sequence[Drawing], device: torch.device
) -> tuple[Int[Tensor, "G _"], ...]:
    """Pictures to draw as one batch of index maps; those that are not yet tokenized are, in one pass."""
    pixels = {i: drawing for i, drawing in enumerate(drawings) if isinstance(drawing, Tensor)}
    known = {i: drawing for i, drawing in enumerate(drawings) if not isinstance(drawing, Tensor)}
    if pixels:
        encoded = tokenizer.encode(torch.stack(list(pixels.values())).to(device)).indices
        for row, i in enumerate(pixels):
            known[i] = tuple(index_map[row] for index_map in encoded)
    scales = range(len(tokenizer.schedule))
    return tuple(torch.stack([known[i][scale].to(device) for i in range(len(drawings))]) for scale in scales)
