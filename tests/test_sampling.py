"""Sampling against a naive reference, and against the probabilities it should have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import numbers, seeds
from vargpt.sampling import GREEDY, Guidance, Sampling, generators, sample
from vargpt.scales import ScaleSchedule

DRAWS = 20_000


def naive(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities after temperature, top-k and top-p, one token at a time."""
    scaled = [x / sampling.temperature for x in logits]
    best_first = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = best_first[: sampling.top_k or None]
    weights = {i: math.exp(scaled[i] - scaled[best_first[0]]) for i in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for i in kept:
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= sampling.top_p:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


def plain(logits: Tensor, sampling: Sampling, random: list[torch.Generator]) -> Tensor:
    """The same choice over the whole vocabulary at every step, from the same noise."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.sort(dim=-1, descending=True).values[..., sampling.top_k - 1, None]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    noise = torch.stack([torch.empty(logits.shape[1:]).exponential_(generator=g) for g in random])
    return (logits.softmax(-1) / noise).argmax(-1)


def frequencies(logits: Tensor, sampling: Sampling, seed: int = 0) -> Tensor:
    """How often each token was drawn, of DRAWS at N positions in one row."""
    chosen = sample(logits.expand(1, DRAWS, -1), sampling, generators([seed], "cpu"))
    return torch.bincount(chosen.flatten(), minlength=len(logits)).double()


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.05, 0.3, 0.6, 0.9, 0.99, 1.0]),
)


@settings(max_examples=60)
@given(samplings, seeds)
def test_draws_follow_the_probabilities(sampling: Sampling, seed: int) -> None:
    logits = 1.5 * numbers(8, seed=seed)
    expected = torch.tensor(naive(logits.tolist(), sampling), dtype=torch.float64)
    counts = frequencies(logits, sampling, seed=1)
    assert not counts[expected == 0].any(), "a token that was cut away has been drawn"
    likely = expected * DRAWS >= 5
    assert (counts[likely] > 0).all(), "a token that was kept is never drawn"
    if likely.sum() > 1:
        chi2 = ((counts - expected * DRAWS) ** 2 / (expected * DRAWS))[likely].sum()
        freedom = int(likely.sum()) - 1
        # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal; five deviations are never seen.
        spread = (2 / (9 * freedom)) ** 0.5
        assert (float(chi2 / freedom) ** (1 / 3) - (1 - spread**2)) / spread < 5


@settings(max_examples=100)
@given(samplings, st.integers(1, 3), seeds)
def test_the_plain_way_chooses_the_same_tokens(sampling: Sampling, batch: int, seed: int) -> None:
    logits = 1.5 * numbers(batch, 40, 12, seed=seed)
    ours, expected = ([seed + row for row in range(batch)] for _ in range(2))
    assert torch.equal(
        sample(logits, sampling, generators(ours, "cpu")), plain(logits, sampling, generators(expected, "cpu"))
    )


@settings(max_examples=60)
@given(st.sampled_from([0.7, 1.0]), st.integers(0, 9), seeds)
def test_equals_of_the_last_one_kept_are_kept_too(temperature: float, top_k: int, seed: int) -> None:
    """Positions differ in how many equals they have."""
    logits = (1.5 * numbers(2, 60, 8, seed=seed)).round()
    sampling = Sampling(temperature=temperature, top_k=top_k)
    random = [generators([seed, seed + 1], "cpu") for _ in range(2)]
    assert torch.equal(sample(logits, sampling, random[0]), plain(logits, sampling, random[1]))


@given(st.integers(1, 8), st.integers(1, 8))
def test_among_equals_top_p_keeps_as_many_as_it_needs(top_k: int, eighths: int) -> None:
    """Which of them is nobody's business, as long as it is the same number of them."""
    counts = frequencies(torch.zeros(8), Sampling(top_k=top_k, top_p=eighths / 8 - 1e-3))
    assert (counts > 0).sum() == eighths
    assert counts[counts > 0].min() > 0.8 * DRAWS / eighths


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3}),
        (2, 1.0, {3, 2}),
        (9, 1.0, {0, 1, 2, 3}),
        (0, 0.5, {3}),
        (0, 0.51, {3, 2}),
        (0, 0.80, {3, 2, 1}),
        (0, 1e-9, {3}),
        (2, 0.6, {3}),  # of the two kept, the best weighs 0.5 / 0.75
        (2, 0.7, {3, 2}),
    ],
)
def test_top_k_and_then_top_p_keep_the_fewest_best(top_k: int, top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.1, 0.15, 0.25, 0.5]).log()
    assert set(frequencies(logits, Sampling(top_k=top_k, top_p=top_p)).nonzero().flatten().tolist()) == kept


def test_the_same_shuffled_tokens_are_kept() -> None:
    weights, order = torch.tensor([0.1, 0.5, 0.15, 0.25]), torch.tensor([1, 3, 2, 0])
    counts = frequencies(weights.log(), Sampling(top_p=0.8))
    assert counts[order].tolist() == counts.sort(descending=True).values.tolist()
    assert counts[0] == 0


@given(st.integers(1, 4), st.integers(1, 5), seeds)
def test_temperature_zero_takes_the_best_without_a_generator(batch: int, length: int, seed: int) -> None:
    logits = numbers(batch, length, 7, seed=seed)
    assert torch.equal(sample(logits, GREEDY, ()), logits.argmax(-1))


def test_a_row_depends_on_its_own_generator_only() -> None:
    logits = numbers(3, 50, 9)
    together = sample(logits, Sampling(), generators([5, 6, 7], "cpu"))
    for row in range(3):
        alone = sample(logits[row : row + 1], Sampling(), generators([5 + row], "cpu"))
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together, sample(logits, Sampling(), generators([5, 6, 7], "cpu")))
    assert not torch.equal(together[0], sample(logits, Sampling(), generators([8, 6, 7], "cpu"))[0])
    assert not torch.equal(*sample(logits[:1].expand(2, -1, -1), Sampling(), generators([5, 6], "cpu")))


def test_a_generator_goes_on_between_draws() -> None:
    random, logits = generators([0], "cpu"), torch.zeros(1, 50, 9)
    assert not torch.equal(sample(logits, Sampling(), random), sample(logits, Sampling(), random))


def test_low_precision_logits_are_drawn_in_float32() -> None:
    logits = numbers(1, 400, 300).bfloat16()
    assert torch.equal(
        sample(logits, Sampling(top_p=0.9), generators([0], "cpu")),
        sample(logits.float(), Sampling(top_p=0.9), generators([0], "cpu")),
    )


def test_logits_are_left_as_they_were() -> None:
    logits = numbers(1, 4, 9)
    before = logits.clone()
    sample(logits, Sampling(temperature=0.7, top_k=3, top_p=0.5), generators([0], "cpu"))
    assert torch.equal(logits, before)


def test_every_row_needs_its_generator() -> None:
    for seeds_given in ([], [0], [0, 1, 2]):
        with pytest.raises(ValueError, match=f"{len(seeds_given)} generators for 2 rows"):
            sample(numbers(2, 3, 5), Sampling(), generators(seeds_given, "cpu"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint} must"):
        Sampling(**settings)  # pyright: ignore[reportArgumentType]


@given(st.floats(0, 10), st.lists(st.integers(1, 5), min_size=1, max_size=6).map(sorted))
def test_guidance_grows_linearly_or_stays(scale: float, sides: list[int]) -> None:
    schedule = ScaleSchedule(sides)
    last = len(sides) - 1
    for s in range(len(sides)):
        assert Guidance(scale=scale).weight(schedule, s) == pytest.approx(scale * s / last if last else 0.0)
        assert Guidance(scale=scale, ramp="constant").weight(schedule, s) == scale


@pytest.mark.usefixtures("unchecked")
def test_guidance_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="cfg must be 0"):
        Guidance(scale=-1.0)
    with pytest.raises(ValueError, match="cfg must be 0"):
        Guidance(scale=math.nan)
    with pytest.raises(ValueError, match="cfg ramp must be"):
        Guidance(ramp="cubic")  # pyright: ignore[reportArgumentType]
