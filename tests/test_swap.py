"""Every part swapped for another through the Protocols alone: a few lines, no base class and no registration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from PIL.Image import Image
from PIL.Image import new as new_image
from torch import Tensor, nn

from tests.drawing import Null, before_drawing, drawn, read, same_maps, teacher_forced
from tests.models import CODES, LATENT, TOKENS, VOCABULARY, close, numbers, small_var, small_vqvae, stir, whole_model
from vargpt.choices import PUBLISHED
from vargpt.generate import generate_text
from vargpt.images import for_drawing
from vargpt.interfaces import ImageTokenizer, LanguageModel, Projector, TokenMaps, VisionEncoder, VisualDecoder
from vargpt.model import VARGPT, require
from vargpt.scales import ScaleSchedule
from vargpt.vision import TimmConfig, TimmEncoder

SIDES = (1, 2, 3)


@dataclass
class State:
    """All that a recurrent network remembers."""

    hidden: Tensor

    def select(self, rows: Tensor) -> State:
        return State(self.hidden[rows])


class Recurrent(nn.Module):
    """A language model: one GRU cell."""

    width, context_length = 8, 1000

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.words = nn.GRUCell(8, 8), nn.Embedding(VOCABULARY, 8)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids)

    def new_cache(self, batch: int, length: int) -> State:
        return State(torch.zeros(batch, 8))

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None, cache: State | None = None) -> Tensor:
        state, out = cache or self.new_cache(len(x), 0), []
        real = torch.ones(x.shape[:2]) > 0 if attention_mask is None else attention_mask[:, -x.shape[1] :]
        for new, keep in zip(x.unbind(1), real.unbind(1), strict=True):
            state.hidden = torch.where(keep[:, None], self.cell(new, state.hidden), state.hidden)
            out.append(state.hidden)
        return torch.stack(out, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.words.weight.T


@dataclass
class Read:
    """All inputs so far, and which are real."""

    x: Tensor
    mask: Tensor

    def select(self, rows: Tensor) -> Read:
        return Read(self.x[rows], self.mask[rows])


class Rereader(nn.Module):
    """A language model: torch's own transformer layer without positions, which reads all again for every token."""

    width, context_length = 8, 1000

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(VOCABULARY, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids)

    def new_cache(self, batch: int, length: int) -> Read:
        return Read(torch.empty(batch, 0, 8), torch.empty(batch, 0, dtype=torch.bool))

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None, cache: Read | None = None) -> Tensor:
        cache, new = cache or self.new_cache(len(x), 0), x.shape[1]
        cache.x = torch.cat((cache.x, x), dim=1)
        cache.mask = torch.ones(cache.x.shape[:2]) > 0 if attention_mask is None else attention_mask
        own = torch.eye(cache.x.shape[1], dtype=torch.bool)
        seen = (torch.ones_like(own).tril() & cache.mask[:, None]) | own  # heads of a row lie side by side
        return self.layer(cache.x, src_mask=~seen.repeat_interleave(2, dim=0))[:, -new:]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.words.weight.T


class Patches(nn.Module):
    """A vision encoder: one Linear on patches of 4 x 4 pixels."""

    width, num_tokens = 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 6)

    def preprocess(self, image: Image) -> Tensor:
        return for_drawing(image, 8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.linear(F.unfold(pixel_values, 4, stride=4).mT)


class Mosaic:
    """An image tokenizer that learns nothing: average colours, what is left of them, and a fixed random codebook."""

    vocab_size = CODES

    def __init__(self, sides: Sequence[int], pixels: int = 2) -> None:
        self.schedule = ScaleSchedule(sides)
        self.pixels, self.image_size = pixels, pixels * sides[-1]
        self.codes = numbers(CODES, 3)

    def encode(self, images: Tensor) -> TokenMaps:
        left, f_hat, maps = F.avg_pool2d(images, self.pixels), None, []
        for scale, side in enumerate(self.schedule.patch_nums):
            small = F.adaptive_avg_pool2d(left, side).flatten(2).mT
            maps.append(torch.cdist(small, self.codes).argmin(-1))
            f_hat = self.add_scale(scale, maps[-1], f_hat)
            left = F.avg_pool2d(images, self.pixels) - f_hat
        assert f_hat is not None
        return TokenMaps(indices=tuple(maps), f_hat=f_hat)

    def decode(self, indices: Sequence[Tensor]) -> Tensor:
        f_hat = None
        for scale, index_map in enumerate(indices):
            f_hat = self.add_scale(scale, index_map, f_hat)
        assert f_hat is not None
        return self.decode_latent(f_hat)

    def decode_latent(self, f_hat: Tensor) -> Tensor:
        return F.interpolate(f_hat, scale_factor=self.pixels).clamp(-1, 1)

    def add_scale(self, scale: int, indices: Tensor, f_hat: Tensor | None) -> Tensor:
        side = self.schedule.patch_nums[scale]
        added = F.interpolate(self.codes[indices].mT.unflatten(2, (side, side)), size=self.schedule.latent_side)
        return added if f_hat is None else f_hat + added

    def next_input(self, scale: int, f_hat: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(f_hat, self.schedule.patch_nums[scale]).flatten(2).mT


@dataclass
class Sums:
    """The sum over the scales so far, and how many tokens it holds."""

    total: Tensor
    tokens: int = 0

    def select(self, rows: Tensor) -> Sums:
        return Sums(self.total[rows], self.tokens)


class Averager(nn.Module):
    """A visual decoder: each token sees itself and the mean over its own and all earlier scales."""

    width, image_class, null_class = 8, 0, 1

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        self.schedule = ScaleSchedule(sides)
        self.classes, self.places = nn.Embedding(2, 8), nn.Embedding(self.schedule.total, 8)
        self.latents, self.head = nn.Linear(LATENT, 8), nn.Linear(8, CODES)

    def condition(self, classes: Tensor) -> Tensor:
        return self.classes(classes)

    def embed_scale(self, scale: int, next_input: Tensor | None, condition: Tensor) -> Tensor:
        x = condition[:, None] if next_input is None else self.latents(next_input)
        return x + self.places.weight[self.schedule.span(scale)]

    def new_cache(self, batch: int) -> Sums:
        return Sums(torch.zeros(batch, 1, 8))

    def forward(self, x: Tensor, condition: Tensor, *, cache: Sums | None = None) -> Tensor:
        sums, out = cache or self.new_cache(len(x)), []
        lengths = [x.shape[1]] if cache else self.schedule.lengths
        for scale in x.split(list(lengths), dim=1):
            sums.total, sums.tokens = sums.total + scale.sum(1, keepdim=True), sums.tokens + scale.shape[1]
            out.append(self.head(F.gelu(scale + sums.total / sums.tokens + condition[:, None])))
        return torch.cat(out, dim=1)


def assembled(
    *,
    llm: LanguageModel | None = None,
    vision: VisionEncoder | None = None,
    projector: Projector | None = None,
    var: VisualDecoder | None = None,
    vqvae: ImageTokenizer | None = None,
    gen_in: Projector | None = None,
    gen_out: Projector | None = None,
    sides: Sequence[int] = SIDES,
) -> VARGPT:
    """The small model, with the parts given in the place of its own."""
    own = whole_model(sides, vision=True)
    vision_used = vision or own.vision
    if vision is not None and projector is None:
        projector = stir(nn.Linear(require(vision_used, "").width, 8))
    return VARGPT(
        llm=llm or own.llm,
        vision=vision_used,
        projector=projector or own.projector,
        var=var or own.var,
        vqvae=vqvae or own.vqvae,
        gen_in=gen_in or own.gen_in,
        gen_out=gen_out or own.gen_out,
        tokens=TOKENS,
        choices=replace(PUBLISHED, condition_class="image", scatter_in_mixed_batches=True),
    ).eval()


def check(model: VARGPT, *learning: nn.Module) -> None:
    """Everything a model does: learn from both kinds of pictures, draw, write, and each row as if it were alone."""
    t, vision, vqvae = TOKENS, require(model.vision, ""), require(model.vqvae, "")
    total, side = vqvae.schedule.total, vqvae.image_size
    pixels = torch.stack([vision.preprocess(picture) for picture in (solid("red"), solid("teal"))])
    pictures = numbers(2, 3, side, side).clamp(-1, 1)
    row = [9, *[t.image] * vision.num_tokens, 12, t.gen_start, *[t.gen_pad] * total, t.gen_end]
    ids = torch.tensor([row, row])

    out = model(ids, pixels, pictures, labels=ids)
    assert out.loss is not None
    out.loss.backward()
    for part in learning:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    one = model(ids[:1], pixels[:1], pictures[:1], labels=ids[:1])
    close(out.image_logits[:1].detach(), one.image_logits.detach())

    rows = [[9, 12, 20], [10]]
    nulls: list[Null] = ["noise", "class", "prompt"]
    for null in nulls:
        maps, record = drawn(model, before_drawing(model, rows), 3, null=null)
        alone, expected = drawn(model, before_drawing(model, rows[1:]), 4, null=null)
        same_maps(maps, alone, slice(1, 2))
        close(record.logits[1:], expected.logits)
        assert record.steps[-1].images().shape == (2, 3, side, side)
    maps, record = drawn(model, before_drawing(model, rows), cfg=0.0)
    close(record.logits, teacher_forced(model, rows, maps, dropped=False))

    together = generate_text(model, *read(model, rows), max_new_tokens=4, stop=())
    for i, prompt in enumerate(rows):
        assert generate_text(model, *read(model, [prompt]), max_new_tokens=4, stop=()) == [together[i]]


def solid(colour: str) -> Image:
    return new_image("RGB", (20, 16), colour)


def test_the_small_model_itself() -> None:
    model = assembled()
    check(model, require(model.projector, ""))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [Recurrent, Rereader])
def test_another_language_model(make: type[Recurrent | Rereader]) -> None:
    part = stir(make())
    check(assembled(llm=part), part)


def test_another_vision_encoder() -> None:
    part = stir(Patches())
    check(assembled(vision=part), part)


def test_a_vision_encoder_of_timm() -> None:
    part = TimmEncoder(TimmConfig(model_name="test_vit", image_size=32)).eval()
    assert part.num_tokens == 4
    check(assembled(vision=part), part)


def test_another_projector() -> None:
    linears = [stir(nn.Linear(8, 8), seed) for seed in range(3)]
    check(assembled(projector=linears[0], gen_in=linears[1], gen_out=linears[2]), *linears)


@pytest.mark.parametrize("sides", [(2,), (1, 4), (1, 1, 2, 2, 3), (3, 4)])
def test_another_schedule(sides: Sequence[int]) -> None:
    var = small_var(sides)
    check(assembled(var=var, vqvae=small_vqvae(sides, channel_multipliers=(1, 1, 2))), var.blocks)


def test_another_image_tokenizer() -> None:
    var = small_var(SIDES, latent_channels=3)
    tokenizer = Mosaic(SIDES)
    check(assembled(var=var, vqvae=tokenizer), var.blocks)
    images = numbers(2, 3, 6, 6).clamp(-1, 1)
    maps = tokenizer.encode(images)
    close(tokenizer.decode(maps.indices), tokenizer.decode_latent(maps.f_hat), 1e-6)


def test_another_visual_decoder() -> None:
    part = stir(Averager(SIDES))
    check(assembled(var=part), part.head, part.latents)


def test_everything_at_once() -> None:
    """Nothing of the project's own parts is left."""
    llm, vision = stir(Recurrent()), stir(Patches())
    projectors = [stir(nn.Linear(width, 8)) for width in (6, 8, 8)]
    var = Averager((1, 3))
    var.latents = nn.Linear(3, 8)
    model = VARGPT(
        llm=llm,
        vision=vision,
        projector=projectors[0],
        var=stir(var),
        vqvae=Mosaic((1, 3)),
        gen_in=projectors[1],
        gen_out=projectors[2],
        tokens=TOKENS,
        choices=replace(PUBLISHED, condition_class="image", scatter_in_mixed_batches=True),
    )
    check(model, llm, vision, *projectors)
