"""Text, drawing and both in turn: the same alone and in a batch, cached and read again from the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.drawing import (
    CPU,
    SAMPLING,
    Null,
    Prompt,
    before_drawing,
    drawn,
    empty_prompt,
    read,
    same_maps,
    teacher_forced,
)
from tests.models import FIRST_WORD, TOKENS, VOCABULARY, close, numbers, schedules, seeds, small_llm, whole_model
from vargpt.choices import FIXED
from vargpt.generate import Context, TextRow, draw, generate_text, pad_left, read_token
from vargpt.model import VARGPT, require
from vargpt.sampling import GREEDY, Guidance, Sampling, generators, sample

prompts = st.lists(st.lists(st.integers(FIRST_WORD, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=3)
nulls = st.sampled_from(["noise", "class", "prompt"])


# Drawing


@settings(max_examples=50)
@given(schedules, prompts, nulls, st.sampled_from([0.0, 1.5]), st.sampled_from([GREEDY, SAMPLING]), seeds)
def test_a_drawing_does_not_depend_on_its_batch(
    sides: tuple[int, ...], rows: list[Prompt], null: Null, cfg: float, sampling: Sampling, seed: int
) -> None:
    """Rows of a batch are padded to the longest, so this is padding too."""
    model = whole_model(sides, seed=seed % 5)
    together, record = drawn(model, before_drawing(model, rows), seed, null=null, cfg=cfg, sampling=sampling)
    for i, row in enumerate(rows):
        single = before_drawing(model, [row])
        alone, expected = drawn(model, single, seed + i, null=null, cfg=cfg, sampling=sampling)
        close(record.logits[i : i + 1], expected.logits)
        same_maps(together, alone, slice(i, i + 1))


@settings(max_examples=60)
@given(
    schedules,
    prompts,
    nulls,
    st.sampled_from([0.0, 1.5]),
    st.sampled_from(["image", "null"]),
    st.booleans(),
    st.booleans(),
)
def test_drawing_equals_teacher_forcing(
    sides: tuple[int, ...],
    rows: list[Prompt],
    null: Null,
    cfg: float,
    condition_class: Any,
    shared: bool,
    cosine: bool,
) -> None:
    """Both branches of guidance, recomputed from the drawn picture alone."""
    choices = replace(FIXED, condition_class=condition_class)
    model = whole_model(sides, choices=choices, shared_adaln=shared, cosine_attention=cosine)
    var = require(model.var, "")
    noises: dict[int, Tensor] = {}

    def noise(scale: int, shape: torch.Size) -> Tensor:
        noises[scale] = numbers(*shape, seed=scale)
        return noises[scale]

    maps, record = drawn(model, before_drawing(model, rows), null=null, cfg=cfg, noise=noise)
    expected = teacher_forced(model, rows, maps, dropped=condition_class == "null")
    if cfg > 0:
        if null == "noise":
            states = torch.cat([noises[scale] for scale in range(len(sides))], dim=1)
            with torch.no_grad():
                condition = var.condition(torch.full((len(rows),), var.null_class))
                without = var(require(model.gen_out, "")(states), condition)
        else:
            said = rows if null == "class" else [[TOKENS.bos]] * len(rows)
            without = teacher_forced(model, said, maps, dropped=True)
        t = torch.tensor([Guidance(scale=cfg).weight(var.schedule, s) for s in var.schedule.level_ids().tolist()])
        expected = (1 + t[:, None]) * expected - t[:, None] * without
    close(record.logits, expected)
    if null != "noise" or cfg == 0:
        assert not noises


@given(schedules, prompts, st.integers(1, 3), nulls)
@settings(max_examples=30)
def test_several_pictures_share_one_reading_of_the_prompt(
    sides: tuple[int, ...], rows: list[Prompt], count: int, null: Null
) -> None:
    model = whole_model(sides)
    context = before_drawing(model, rows)
    each = torch.arange(len(rows)).repeat_interleave(count)
    together, _ = drawn(model, context.select(each), null=null)
    for i, row in enumerate(each.tolist()):
        alone, _ = drawn(model, before_drawing(model, [rows[row]]), i, null=null)
        same_maps(together, alone, slice(i, i + 1))
    again, _ = drawn(model, context.select(each), null=null)  # the context itself has not moved on
    same_maps(again, together)


def test_seeds_decide_the_drawing_and_its_noise() -> None:
    model = whole_model()
    first, again, other = (drawn(model, before_drawing(model, [[9], [12]]), s, null="noise") for s in (3, 3, 30))
    same_maps(first[0], again[0])
    assert torch.equal(first[1].logits, again[1].logits)
    assert not torch.equal(first[0].indices[-1], other[0].indices[-1])
    # Noise has its part: what is greedy still depends on the seed, and each row draws its own.
    twice = [before_drawing(model, [[9], [9]]) for _ in range(2)]
    greedy = [drawn(model, c, s, null="noise", sampling=GREEDY)[1].logits for c, s in zip(twice, (3, 30), strict=True)]
    assert not torch.equal(greedy[0], greedy[1])
    assert not torch.equal(greedy[0][0], greedy[0][1])
    for null in ("class", "prompt"):
        a, b = (drawn(model, before_drawing(model, [[9]]), s, null=null, sampling=GREEDY)[1].logits for s in (3, 30))
        assert torch.equal(a, b)


def test_the_branches_of_guidance_differ() -> None:
    model = whole_model()
    logits = {}
    for null in ("noise", "class", "prompt"):
        logits[null] = drawn(model, before_drawing(model, [[9, 12, 20]]), null=null, sampling=GREEDY)[1].steps[1].logits
    for a, b in (("noise", "class"), ("class", "prompt"), ("noise", "prompt")):
        assert (logits[a] - logits[b]).abs().max() > 1e-3
    for null in ("noise", "class"):
        choices = replace(FIXED, null=null)
        default = whole_model(choices=choices)
        ours = draw(
            default,
            before_drawing(default, [[9, 12, 20]]),
            generators=generators([0], CPU),
            guidance=Guidance(),
            sampling=GREEDY,
        )
        same_maps(ours, drawn(model, before_drawing(model, [[9, 12, 20]]), null=null, sampling=GREEDY)[0])


@given(schedules)
@settings(max_examples=20)
def test_every_scale_can_be_looked_at(sides: tuple[int, ...]) -> None:
    model = whole_model(sides)
    vqvae = require(model.vqvae, "")
    maps, record = drawn(model, before_drawing(model, [[9], [12, 9]]))
    assert [step.scale for step in record.steps] == list(range(len(sides)))
    for step in record.steps:
        assert step.schedule_length == len(sides)
        assert torch.equal(step.indices, maps.indices[step.scale])
        assert step.logits.shape == (*step.indices.shape, vqvae.vocab_size)
        with torch.no_grad():
            close(step.images(), vqvae.decode(maps.indices[: step.scale + 1]), 1e-5)
        assert step.images().shape == (2, 3, vqvae.image_size, vqvae.image_size)
    assert torch.equal(record.steps[-1].f_hat, maps.f_hat)
    assert torch.equal(record.steps[-1].images(), vqvae.decode_latent(maps.f_hat))


@given(schedules, prompts, st.integers(1, 2))
@settings(max_examples=30)
def test_what_follows_a_drawing_has_read_it(sides: tuple[int, ...], rows: list[Prompt], drawings: int) -> None:
    """Text after drawings continues from the same states as when the drawings are read again as known pictures."""
    model = whole_model(sides)
    var, llm, t = require(model.var, ""), require(model.llm, ""), TOKENS
    context, _ = read(model, rows, room=200)
    drawn_maps, hidden, tail = [], torch.empty(0), torch.empty(0)
    for _ in range(drawings):
        with torch.no_grad():
            read_token(context, t.gen_start)
        drawn_maps.append(drawn(model, context)[0].indices)
        with torch.no_grad():
            hidden = read_token(context, t.gen_end)
    after = generate_text(model, context, hidden, max_new_tokens=3, stop=())
    with torch.no_grad():
        tail = read_token(context, 10)[:, -1]

    for i, row in enumerate(rows):
        picture = [t.gen_start, *[t.gen_pad] * var.schedule.total, t.gen_end]
        ids = torch.tensor([[*row, *picture * drawings]])
        maps = [torch.cat([m[s][i : i + 1] for m in drawn_maps]) for s in range(len(sides))]
        condition = var.condition(torch.full((drawings,), var.image_class))
        with torch.no_grad():
            x = model.prompt_embeddings(ids, drawings=model.drawing_inputs(maps, condition))
            close(hidden[i, -1], llm(x)[0, -1])
            assert after[i].ids[0] == int(llm.logits(llm(x)[0, -1]).argmax())
            close(tail[i], llm(torch.cat((x, llm.embed(torch.tensor([[*after[i].ids, 10]]))), dim=1))[0, -1])


def test_a_drawing_refuses_what_it_cannot_use() -> None:
    model = whole_model()
    short = read(model, [[9, TOKENS.gen_start]], room=13)[0]
    usual: dict[str, Any] = {"null": "class", "generators": (), "guidance": Guidance(), "sampling": GREEDY}
    one = generators([0], CPU)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"null": "prompt"}, 'null="prompt" needs a context of the empty prompt, with as many rows'),
        ({"null": "prompt", "empty": empty_prompt(model, 1)}, 'null="prompt" needs'),
        ({"null": "noise", "generators": one}, 'null="noise" needs a generator for each of 2 rows, not 1'),
        ({"sampling": SAMPLING, "generators": one}, "1 generators for 2 rows"),
        ({"context": short}, "the cache holds 15 tokens; token 16 does not fit"),
        ({"model": VARGPT(llm=model.llm, tokens=TOKENS)}, "this model has no visual decoder"),
    ]
    for changes, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            draw(**{"model": model, "context": before_drawing(model, [[9]] * 2), **usual, **changes})


# Text


def text_only(seed: int = 0, **changes: Any) -> VARGPT:
    return VARGPT(llm=small_llm(seed, **changes), tokens=TOKENS)


def written(model: VARGPT, rows: Sequence[Prompt], **options: Any) -> tuple[list[TextRow], Context]:
    context, hidden = read(model, rows)
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop": ()}
    return generate_text(model, context, hidden, **settings | options), context


@torch.no_grad()
def last_state(model: VARGPT, ids: Sequence[int]) -> Tensor:
    """Of tokens read at once, without a cache; any tokens, as text."""
    llm = require(model.llm, "")
    return llm(llm.embed(torch.tensor([ids])))[0, -1]


@torch.no_grad()
def naive(
    model: VARGPT,
    prompt: Prompt,
    *,
    max_new_tokens: int = 8,
    stop: Sequence[int] = (),
    forbid: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> TextRow:
    """One row, read again from its start for every token."""
    random = generators([] if seed is None else [seed], CPU)
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        logits = require(model.llm, "").logits(last_state(model, [*prompt, *ids]))[None, None]
        for token in forbid:
            logits[..., token] = float("-inf")
        token = int(sample(logits, sampling, random))
        if token in stop:
            return TextRow(ids=ids, stop=token)
        ids.append(token)
    return TextRow(ids=ids, stop=None)


@settings(max_examples=50)
@given(
    prompts,
    seeds,
    st.integers(0, 9),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=6),
    st.sampled_from([GREEDY, Sampling(), SAMPLING]),
)
def test_writing_is_reading_again_for_every_token(
    rows: list[Prompt], seed: int, limit: int, stop: set[int], forbid: set[int], sampling: Sampling
) -> None:
    """And rows that end at different times do not disturb each other; nor the conversation that goes on from them."""
    model = text_only(seed % 7)
    options: dict[str, Any] = {
        "max_new_tokens": limit,
        "stop": sorted(stop),
        "forbid": sorted(forbid),
        "sampling": sampling,
    }
    together, context = written(model, rows, generators=generators(range(seed, seed + len(rows)), CPU), **options)
    with torch.no_grad():
        further = read_token(context, 10)[:, 0]
    for i, row in enumerate(rows):
        assert together[i] == naive(model, row, seed=seed + i, **options)
        close(further[i], last_state(model, [*row, *together[i].ids, 10]))


def test_a_row_stops_at_the_first_of_its_stop_tokens() -> None:
    model = text_only()
    free = written(model, [[9, 12]])[0][0]
    assert len(free.ids) == 8
    assert free.stop is None
    late = free.ids[-1] if free.ids[-1] not in free.ids[:3] else free.ids[3]
    for stop in ([free.ids[3]], [late, free.ids[3]]):
        first = min(free.ids.index(token) for token in stop)
        (row,), _ = written(model, [[9, 12]], stop=stop)
        assert row == TextRow(ids=free.ids[:first], stop=free.ids[first])


def test_forbidden_tokens_are_never_written() -> None:
    model = text_only()
    free = set(written(model, [[9, 12]])[0][0].ids)
    (row,), _ = written(model, [[9, 12]], forbid=sorted(free))
    assert not free & set(row.ids)
    assert len(row.ids) == 8
    everything_else = [i for i in range(VOCABULARY) if i != 11]
    assert written(model, [[9, 12]], forbid=everything_else)[0][0].ids == [11] * 8


def test_one_choice_of_top_k_or_top_p_is_greedy() -> None:
    model = text_only()
    greedy = written(model, [[9, 12], [20]])[0]
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)):
        assert written(model, [[9, 12], [20]], sampling=sampling, generators=generators([0, 1], CPU))[0] == greedy
    hot = Sampling(temperature=100.0)
    assert written(model, [[9, 12], [20]], sampling=hot, generators=generators([0, 1], CPU))[0] != greedy


def test_on_token_sees_every_token_and_can_end_a_row() -> None:
    model = text_only()
    rows = [[9, 12], [20]]
    free, seen = written(model, rows)[0], []

    def end_row_0_after_3(row: int, token: int) -> bool:
        seen.append((row, token))
        return row == 0 and len([s for s in seen if s[0] == 0]) == 3

    ended, context = written(model, rows, on_token=end_row_0_after_3)
    assert ended == [TextRow(ids=free[0].ids[:3], stop=None), free[1]]
    for i in range(2):
        assert [token for row, token in seen if row == i] == ended[i].ids
    with torch.no_grad():
        further = read_token(context, 10)[:, 0]
    for i, row in enumerate(rows):
        close(further[i], last_state(model, [*row, *ended[i].ids, 10]))


def test_a_stopping_token_is_not_shown() -> None:
    model, seen = text_only(), []
    first = written(model, [[9, 12]])[0][0].ids[0]
    (row,), _ = written(model, [[9, 12]], stop=[first], on_token=lambda _, token: seen.append(token) or False)
    assert (row.ids, row.stop, seen) == ([], first, [])


def test_nothing_is_written_into_no_room() -> None:
    model = text_only()
    rows, context = written(model, [[9, 12]], max_new_tokens=0)
    assert rows == [TextRow(ids=[], stop=None)]
    assert context.mask.shape == (1, 2)
    model = text_only(max_positions=6)
    with pytest.raises(ValueError, match="7 tokens exceed the model's context of 6"):
        written(model, [[9, 12]], max_new_tokens=8)
    assert len(written(model, [[9, 12]], max_new_tokens=4)[0][0].ids) == 4


@torch.no_grad()
def test_pictures_to_understand_are_read_with_the_prompt() -> None:
    model, t = whole_model(vision=True), TOKENS
    pixels = numbers(2, 3, 8, 8)
    rows = [[9, *[t.image] * 4, 12, 20], [*[t.image] * 4, 10]]
    ids, mask = pad_left(rows, t.pad, CPU)
    context = Context(require(model.llm, ""), 2, 20, CPU)
    hidden = context.extend(model.prompt_embeddings(ids, pixels), mask)
    together = generate_text(model, context, hidden, max_new_tokens=5, stop=())
    for i, row in enumerate(rows):
        ids = torch.tensor([row])
        for token in together[i].ids:
            assert token == int(model(ids, pixels[i : i + 1]).text_logits[0, -1].argmax())
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


# Contexts


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4], [5, 6]], 0, CPU)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4], [0, 5, 6]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]


@given(prompts, st.data())
@torch.no_grad()
def test_a_selection_goes_on_without_its_source(rows: list[Prompt], data: st.DataObject) -> None:
    model = text_only()
    context, _ = read(model, rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    copy = context.select(torch.tensor(chosen))
    read_token(context, 11)
    assert (copy.batch, context.batch) == (len(chosen), len(rows))
    ours, source = read_token(copy, 10)[:, 0], read_token(context, 10)[:, 0]
    for i, row in enumerate(chosen):
        close(ours[i], last_state(model, [*rows[row], 10]))
    for i, row in enumerate(rows):
        close(source[i], last_state(model, [*row, 11, 10]))
