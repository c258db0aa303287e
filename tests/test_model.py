"""VARGPT.forward: what goes where, batches and padding, the losses from their definitions, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import TOKENS, close, index_maps, numbers, schedules, seeds, whole_model, words
from vargpt.choices import FIXED
from vargpt.interfaces import teacher_forcing_inputs
from vargpt.losses import IGNORE
from vargpt.model import VARGPT, require

PATCHES = 4  # of the small vision encoder
SIDES = (1, 2)  # of the drawings here: 5 tokens

Row = list[int]
"""Tokens: an ``image`` token stands for a whole picture to understand, a ``gen_pad`` for a whole drawing."""

rows = st.lists(st.sampled_from([9, 12, 20, TOKENS.image, TOKENS.gen_pad]), min_size=1, max_size=4)


def spread(row: Row, tokens: int = 5) -> list[int]:
    """With as many placeholders as each picture has tokens."""
    t = TOKENS
    counts = {t.image: PATCHES, t.gen_pad: tokens}
    named = [piece for i in row for piece in ([t.gen_start, i, t.gen_end] if i == t.gen_pad else [i])]
    return [i for i in named for _ in range(counts.get(i, 1))]


def batch_of(some: list[Row], side: str) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, padded on the left or the right."""
    full = [spread(row) for row in some]
    longest = max(map(len, full))
    ids = torch.full((len(some), longest), TOKENS.pad)
    for i, row in enumerate(full):
        start = longest - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
    return ids, ids != TOKENS.pad


def arguments(some: list[Row], seed: int = 0) -> list[dict[str, Any]]:
    """Pictures and drawings of each row, alone."""
    out = []
    for i, row in enumerate(some):
        pictures, drawings = row.count(TOKENS.image), row.count(TOKENS.gen_pad)
        out.append(
            {
                "pixel_values": numbers(pictures, 3, 8, 8, seed=seed + i) if pictures else None,
                "draw_images": index_maps(SIDES, drawings, seed=seed + i) if drawings else None,
            }
        )
    return out


def joined(some: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of the whole batch, in the order of the rows."""
    pixels = [a["pixel_values"] for a in some if a["pixel_values"] is not None]
    maps = [a["draw_images"] for a in some if a["draw_images"] is not None]
    return {
        "pixel_values": torch.cat(pixels) if pixels else None,
        "draw_images": tuple(map(torch.cat, zip(*maps, strict=True))) if maps else None,
    }


@settings(max_examples=60)
@given(st.lists(rows, min_size=1, max_size=3), st.sampled_from(["left", "right"]), seeds)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(some: list[Row], side: str, seed: int) -> None:
    """Hidden states and both kinds of logits, with pictures to understand, drawings, both or neither."""
    model = whole_model(SIDES, vision=True, seed=seed % 7)
    ids, mask = batch_of(some, side)
    single = arguments(some, seed % 1000)
    together = model(ids, attention_mask=mask, **joined(single))
    drawings = 0
    for i, row in enumerate(some):
        alone = model(torch.tensor([spread(row)]), **single[i])
        close(together.hidden[i][mask[i]], alone.hidden[0])
        close(together.text_logits[i][mask[i]], alone.text_logits[0])
        count = row.count(TOKENS.gen_pad)
        if count:
            close(together.image_logits[drawings : drawings + count], alone.image_logits)
        drawings += count


@torch.no_grad()
def test_pictures_take_the_place_of_their_tokens_in_order() -> None:
    model = whole_model(SIDES, vision=True)
    ids, _ = batch_of([[9, TOKENS.image, TOKENS.gen_pad], [TOKENS.gen_pad, TOKENS.image, 12]], "left")
    pixels, drawings = numbers(2, 3, 8, 8), numbers(2, 5, 8)
    x = model.prompt_embeddings(ids, pixels, drawings)
    features = require(model.projector, "")(require(model.vision, "")(pixels))
    llm = require(model.llm, "")
    for row in range(2):
        close(x[row][ids[row] == TOKENS.image], features[row], 1e-6)
        close(x[row][ids[row] == TOKENS.gen_pad], drawings[row], 0)
    words_only = (ids != TOKENS.image) & (ids != TOKENS.gen_pad)
    close(x[words_only], llm.embed(ids)[words_only], 0)


@settings(max_examples=30)
@given(schedules, st.booleans(), st.booleans())
@torch.no_grad()
def test_a_drawing_passes_llm_and_visual_decoder(sides: tuple[int, ...], shared: bool, dropped: bool) -> None:
    """The steps of the published forward, one after the other."""
    model = whole_model(sides, shared_adaln=shared)
    var, vqvae, llm = require(model.var, ""), require(model.vqvae, ""), require(model.llm, "")
    gen_in, gen_out = require(model.gen_in, ""), require(model.gen_out, "")
    maps = index_maps(sides, 1)
    total = var.schedule.total
    ids = torch.tensor([[9, TOKENS.gen_start, *[TOKENS.gen_pad] * total, TOKENS.gen_end, 12]])
    out = model(ids, draw_images=maps, drop_condition=torch.tensor([dropped]))

    condition = var.condition(torch.tensor([var.null_class if dropped else var.image_class]))
    inputs = (None, *teacher_forcing_inputs(vqvae, maps))
    drawn = gen_in(torch.cat([var.embed_scale(s, x, condition) for s, x in enumerate(inputs)], dim=1))
    x = torch.cat((llm.embed(ids[:, :2]), drawn, llm.embed(ids[:, 2 + total :])), dim=1)
    hidden = llm(x)
    close(out.hidden, hidden, 1e-5)
    close(out.image_logits, var(gen_out(hidden[:, 2 : 2 + total]), condition), 1e-5)
    expected = F.cross_entropy(out.image_logits[0], torch.cat(maps, dim=1)[0])
    close(out.image_loss, expected, 1e-5)
    close(out.loss, expected, 1e-5)
    assert out.text_loss is None


@torch.no_grad()
def test_pictures_to_draw_are_tokenized() -> None:
    model = whole_model(SIDES)
    vqvae = require(model.vqvae, "")
    images = numbers(2, 3, 4, 4).clamp(-1, 1)
    ids, mask = batch_of([[9, TOKENS.gen_pad], [TOKENS.gen_pad]], "left")
    from_pictures = model(ids, draw_images=images, attention_mask=mask)
    from_indices = model(ids, draw_images=vqvae.encode(images).indices, attention_mask=mask)
    assert torch.equal(from_pictures.image_logits, from_indices.image_logits)
    assert torch.equal(from_pictures.loss, from_indices.loss)


@given(st.lists(rows, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.integers(0, 99))
@torch.no_grad()
def test_text_loss_is_taken_where_labels_say(some: list[Row], side: str, seed: int) -> None:
    model = whole_model(SIDES, vision=True, choices=replace(FIXED, supervise_drawing_prompts=False))
    ids, mask = batch_of(some, side)
    chance = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(chance < 0.5, IGNORE)
    out = model(ids, labels=labels, attention_mask=mask, **joined(arguments(some)))
    terms = [
        -out.text_logits[b, t - 1].log_softmax(-1)[labels[b, t]]
        for b in range(ids.shape[0])
        for t in range(1, ids.shape[1])
        if labels[b, t] != IGNORE and mask[b, t] and ids[b, t] != TOKENS.gen_pad
    ]
    close(out.text_loss, torch.stack(terms).mean() if terms else torch.tensor(0.0), 1e-5)
    if out.image_logits is None:
        close(out.loss, out.text_loss, 0)
    else:
        close(out.loss, out.text_loss + out.image_loss, 1e-6)


def test_without_labels_or_drawings_there_is_no_loss() -> None:
    out = whole_model(SIDES)(words(1, 3))
    assert out.loss is out.text_loss is out.image_loss is out.image_logits is None


def test_a_batch_without_text_to_learn_keeps_its_graph() -> None:
    model = whole_model(SIDES)
    out = model(words(1, 3), labels=torch.full((1, 3), IGNORE))
    assert out.loss is not None
    assert out.loss.item() == 0
    out.loss.backward()
    llm: Any = model.llm
    assert torch.equal(llm.norm.weight.grad, torch.zeros(8))


def test_every_part_learns() -> None:
    """All but the image tokenizer, which gives targets and inputs and stays as it is."""
    model = whole_model(SIDES, vision=True)
    ids, _ = batch_of([[9, TOKENS.image, 12, TOKENS.gen_pad, 20]], "left")
    drop = torch.tensor([True])
    for i in range(2):
        out = model(ids, numbers(1, 3, 8, 8), index_maps(SIDES, 1), labels=ids, drop_condition=drop if i else None)
        assert out.loss is not None
        out.loss.backward()
    late = ("vision.", "vqvae.")
    for name, parameter in model.named_parameters():
        if not name.startswith(late):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith("vqvae."))
    assert any(gradient is not None and gradient.any() for name, gradient in gradients.items() if "vision." in name)


@pytest.mark.parametrize("scatter", [True, False])
def test_pictures_and_placeholders_must_match(scatter: bool) -> None:
    model = whole_model(SIDES, vision=True, choices=replace(FIXED, scatter_in_mixed_batches=scatter))
    pixels, maps, t = numbers(2, 3, 8, 8), index_maps(SIDES, 1), TOKENS
    for ids, options, complaint in [
        ([9, *[t.image] * 4], {"pixel_values": pixels}, "4 <image> tokens do not match 2 pictures of 4"),
        ([9, *[t.image] * 4], {}, "4 <image> tokens do not match 0 pictures"),
        ([9], {"pixel_values": pixels}, "0 <image> tokens do not match 2"),
        ([9, *[t.gen_pad] * 4], {"draw_images": maps}, "4 image_gen_pad tokens do not match 1 pictures of 5"),
        ([9, *[t.gen_pad] * 5], {}, "5 image_gen_pad tokens do not match 0"),
        (
            [*[t.image] * 8, *[t.gen_pad] * 6],
            {"pixel_values": pixels, "draw_images": maps},
            "6 image_gen_pad tokens do not match 1 pictures of 5",
        ),
    ]:
        with pytest.raises(ValueError, match=complaint):
            model(torch.tensor([ids]), **options)


@pytest.mark.parametrize(
    ("left_out", "needed"),
    [
        ("llm", "language model"),
        ("vision", "vision encoder"),
        ("projector", "projector"),
        ("var", "visual decoder"),
        ("vqvae", "image tokenizer"),
        ("gen_in", "generation projector"),
        ("gen_out", "generation projector"),
    ],
)
def test_a_missing_part_is_named(left_out: str, needed: str) -> None:
    full = whole_model(SIDES, vision=True)
    names = ("llm", "vision", "projector", "var", "vqvae", "gen_in", "gen_out")
    model = VARGPT(**{n: getattr(full, n) for n in names if n != left_out}, tokens=TOKENS)
    ids, _ = batch_of([[9, TOKENS.image, TOKENS.gen_pad]], "left")
    with pytest.raises(ValueError, match=f"this model has no {needed}, which the request needs"):
        model(ids, numbers(1, 3, 8, 8), numbers(1, 3, 4, 4))


def test_parts_alone_are_enough_for_what_needs_them() -> None:
    full = whole_model(SIDES, vision=True)
    text_only = VARGPT(llm=full.llm, tokens=TOKENS)
    ids = words(2, 4)
    close(text_only(ids).hidden, full(ids).hidden, 0)
    assert text_only.device.type == "cpu"
    reader = VARGPT(llm=full.llm, vision=full.vision, projector=full.projector, tokens=TOKENS)
    ids, _ = batch_of([[9, TOKENS.image]], "left")
    close(reader(ids, numbers(1, 3, 8, 8)).hidden, full(ids, numbers(1, 3, 8, 8)).hidden, 0)


def test_rows_may_hold_several_drawings_each() -> None:
    """Drawings are counted over the batch, in reading order."""
    model = whole_model(SIDES)
    ids, mask = batch_of([[TOKENS.gen_pad, 9, TOKENS.gen_pad], [12, TOKENS.gen_pad]], "left")
    maps = index_maps(SIDES, 3)
    out = model(ids, draw_images=maps, attention_mask=mask)
    assert out.image_logits.shape == (3, 5, 12)
    swapped = [m[[0, 2, 1]] for m in maps]
    other = model(ids, draw_images=swapped, attention_mask=mask)
    close(other.image_logits[0], out.image_logits[0], 1e-6)
    assert (other.image_logits[1:] - out.image_logits[1:]).abs().amax(dim=(1, 2)).min() > 1e-4
